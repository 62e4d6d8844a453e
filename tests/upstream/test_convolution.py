"""Convolutions by oneDNN on a CPU: what `torch.nn.Conv3d` computes, also for sizes PyTorch leaves to other kernels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_mgml.upstream import convolution
from nnunetv2_mgml.upstream.convolution import Conv3d, make_fast

SIZES = {"small": (3, 6, 5, 4), "large": (3, 84, 83, 5)}
"""Channels and voxels per axis, on both sides of PyTorch's limit for one sample."""


def pair(*args: Any, **kwargs: Any) -> tuple[nn.Conv3d, nn.Conv3d]:
    """Return PyTorch's convolution and ours with its weights."""
    torch.manual_seed(0)
    stock = nn.Conv3d(*args, **kwargs)
    ours = copy.deepcopy(stock)
    make_fast([ours])
    assert type(ours) is Conv3d
    return stock, ours


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": (1, 2, 2)},
        {"kernel_size": 1, "stride": 2},
    ],
)
def test_equals_the_convolution(kwargs: dict[str, Any], size: str, batch: int) -> None:
    """Values and all gradients, up to the order of their sums."""
    channels, *spatial = SIZES[size]
    stock, ours = pair(channels, 4, **kwargs)
    x = torch.randn(batch, channels, *spatial, requires_grad=True)
    assert (x[0, :, :, :, 0].numel() > convolution._SMALL) == (size == "large")
    results = [module(x) for module in (stock, ours)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(results[0])
    gradients = [
        torch.autograd.grad((result * weights).sum(), [x, *module.parameters()])
        for module, result in zip((stock, ours), results, strict=True)
    ]
    for one, two in zip(*gradients, strict=True):
        assert torch.linalg.vector_norm(one - two) < 1e-5 * torch.linalg.vector_norm(one)


def test_gradients_only_where_they_are_wanted() -> None:
    """The first layer's input has none; frozen weights have none; without any nothing is kept."""
    stock, ours = pair(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 4, 4, 4)
    ours(x).sum().backward()
    stock(x).sum().backward()
    torch.testing.assert_close(ours.weight.grad, stock.weight.grad)
    ours.requires_grad_(False)
    assert not ours(x).requires_grad
    x.requires_grad_()
    (own,) = torch.autograd.grad(ours(x).sum(), x)
    (expected,) = torch.autograd.grad(stock(x).sum(), x)
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("size", SIZES)
def test_twice_the_same(size: str) -> None:
    _, ours = pair(3, 4, 3, padding=1)
    x = torch.randn(1, *SIZES[size])
    runs = []
    for _ in range(2):
        result = ours(x)
        runs.append([result, *torch.autograd.grad(result.square().sum(), list(ours.parameters()))])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))
    with torch.no_grad():
        assert torch.equal(ours(x), runs[0][0])


def test_by_onednn_and_not_by_the_slow_kernel() -> None:
    """The small case goes to PyTorch's own kernel; where this fails, PyTorch has changed and ours may be needless."""
    x = torch.randn(1, *SIZES["small"], requires_grad=True)
    profiles = []
    for module in pair(3, 4, 3, padding=1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            module(x).sum().backward()
        profiles.append({event.key for event in recorded.key_averages()})
    assert "aten::slow_conv3d_forward" in profiles[0]
    assert "aten::slow_conv3d_forward" not in profiles[1]
    assert "aten::mkldnn_convolution" in profiles[1]


def test_pytorchs_own_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices and dtypes, autocast, tracing, no oneDNN, nothing to convolve, one sample without a batch."""
    _, ours = pair(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 4, 4, 4)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(convolution, "_convolved", refuse)
    with pytest.raises(AssertionError):
        ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert copy.deepcopy(ours).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).device.type == "meta"
    assert ours(x[0]).shape == (3, 4, 4, 4)
    assert ours(x[:0]).shape == (0, 3, 4, 4, 4)
    assert torch.jit.trace(ours, x, check_trace=False)(x).shape == (1, 3, 4, 4, 4)
    assert torch.export.export(ours, (x,)).module()(x).shape == (1, 3, 4, 4, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        assert ours(x).shape == (1, 3, 4, 4, 4)
    assert torch.autograd.gradcheck(copy.deepcopy(ours).double(), x.double().requires_grad_())


def test_other_layouts_in_and_out() -> None:
    stock, ours = pair(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 5, 6, 7).to(memory_format=torch.channels_last_3d).requires_grad_()
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)


def test_a_counter_of_operations_sees_the_convolution() -> None:
    """It knows PyTorch's operator, not oneDNN's."""
    _, ours = pair(3, 4, 3, padding=1)
    with FlopCounterMode(display=False) as counter:
        ours(torch.randn(1, 3, 5, 6, 7))
    assert counter.get_total_flops() == 2 * 5 * 6 * 7 * 3 * 4 * 27


def test_keeps_what_it_is_not_meant_for() -> None:
    others = [
        nn.Conv3d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3, dilation=2),
        nn.Conv3d(4, 4, 3, padding="same"),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3),
        nn.ConvTranspose3d(4, 4, 2, 2),
    ]
    kinds = [type(other) for other in others]
    make_fast(others)
    assert [type(other) for other in others] == kinds


def test_is_the_same_module_otherwise() -> None:
    stock, ours = pair(2, 3, 3, padding=1)
    assert isinstance(ours, nn.Conv3d)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    x = torch.randn(1, 2, 4, 4, 4)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))
