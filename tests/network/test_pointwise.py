from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

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
