from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnunetv2_mgml.network.pointwise import make_pointwise, pointwise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv_op", [nn.Conv2d, nn.Conv3d])
def test_equals_the_convolution(conv_op: type[nn.Module], bias: bool) -> None:
    """Values and gradients, float64; half precision under autocast; the parameters keep their names."""
    torch.manual_seed(0)
    slow = conv_op(3, 5, 1, bias=bias).double()
    fast = pointwise(conv_op)(3, 5, 1, bias=bias).double()
    fast.load_state_dict(slow.state_dict(), strict=True)
    x = torch.randn(2, 3, *[4] * (slow.weight.ndim - 2), dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(slow(x))
    results = [module(x) for module in (slow, fast)]
    torch.testing.assert_close(results[1], results[0])
    gradients = [
        torch.autograd.grad((result * weights).sum(), [x, *module.parameters()])
        for module, result in zip((slow, fast), results, strict=True)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
    with torch.autocast("cpu", torch.bfloat16):
        one, two = (module.float()(x.float()) for module in (slow, fast))
    assert one.dtype == two.dtype == torch.bfloat16
    torch.testing.assert_close(one, two, atol=0.02, rtol=0.02)


def test_turns_a_convolution_into_one() -> None:
    conv = nn.Conv3d(3, 5, 1)
    changed = copy.deepcopy(conv)
    make_pointwise(changed)
    x = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(changed(x), conv(x), atol=1e-5, rtol=1e-5)
    assert isinstance(changed, nn.Conv3d)
    assert torch.equal(pickle.loads(pickle.dumps(changed))(x), changed(x))


class Calls(TorchDispatchMode):
    """Which operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("conv_op", [nn.Conv2d, nn.Conv3d])
def test_a_product_on_the_cpu_and_a_convolution_elsewhere(conv_op: type[nn.Module]) -> None:
    for device, called, other in (("cpu", "baddbmm", "convolution"), ("meta", "convolution", "baddbmm")):
        module = pointwise(conv_op)(3, 5, 1).to(device)
        with Calls() as calls:
            module(torch.zeros(2, 3, *[4] * (module.weight.ndim - 2), device=device))
        assert called in calls.names
        assert other not in calls.names


@pytest.mark.parametrize(
    "other",
    [
        {"kernel_size": 3},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "groups": 2},
        {"kernel_size": 1, "padding": 1},
    ],
)
def test_refuses_other_convolutions(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Not a 1x1 convolution"):
        make_pointwise(nn.Conv3d(4, 4, **other))
