"""A convolution of raised features from the coarser ones: what the two layers compute."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from builders import network, options_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunetv2_mgml.upstream import raised_convolution as module
from nnunetv2_mgml.upstream.cpu_layers import make_fast
from nnunetv2_mgml.upstream.raised_convolution import raised_convolution


def layers(
    stride: tuple[int, ...], kernel: tuple[int, ...], widths: tuple[int, int, int, int], bias: bool = True
) -> tuple[nn.ConvTranspose3d, nn.Conv3d]:
    """Return both layers of PyTorch: ``widths`` are of the coarser scale, raised, of the skip, and of the result."""
    coarse, raised, skip, result = widths
    up = nn.ConvTranspose3d(coarse, raised, stride, stride, bias=bias)
    return up, nn.Conv3d(raised + skip, result, kernel, padding=tuple(k // 2 for k in kernel), bias=bias)


def one_by_one(up: nn.Module, convolution: nn.Module, coarse: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = convolution(torch.cat((up(coarse), skip), 1))
    return result


def fast(*stock: nn.Module) -> list[nn.Module]:
    ours = copy.deepcopy([*stock])
    make_fast(ours)
    return ours


def inputs(up: nn.ConvTranspose3d, skip: int, size: tuple[int, ...], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    fine = [n * s for n, s in zip(size, up.stride, strict=True)]
    return torch.randn(batch, up.in_channels, *size), torch.randn(batch, skip, *fine)


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VOXELS", 1)


@settings(max_examples=40, deadline=None)
@given(
    axes=st.lists(st.sampled_from([(2, 3), (1, 3), (1, 1)]), min_size=3, max_size=3).filter(
        lambda axes: any(stride == 2 for stride, _ in axes)
    ),
    size=st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(3, 5)),
    widths=st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([3, 8])),
    batch=st.integers(1, 2),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_layers_in_float64(
    axes: list[tuple[int, int]],
    size: tuple[int, ...],
    widths: tuple[int, int, int, int],
    batch: int,
    bias: bool,
    seed: int,
) -> None:
    """At every voxel, borders included, where the bias of what is raised ends."""
    torch.manual_seed(seed)
    stride, kernel = (tuple(each) for each in zip(*axes, strict=True))
    up, convolution = layers(stride, kernel, widths, bias)
    if bias:
        assert up.bias is not None
        up.bias.data += 3  # so that a border that is wrong shows
    coarse, skip = inputs(up, widths[2], size, batch)
    with torch.no_grad():
        exact = one_by_one(*copy.deepcopy([up.double(), convolution.double()]), coarse.double(), skip.double())
        found = raised_convolution(*fast(up.float(), convolution.float()), coarse, skip)
    assert found is not None
    assert found.is_contiguous(memory_format=torch.channels_last_3d)  # the layers behind it are faster so
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-5)


def test_is_deterministic() -> None:
    torch.manual_seed(0)
    up, convolution = layers((2, 2, 2), (3, 3, 3), (16, 8, 8, 8))
    ours, given_ = fast(up, convolution), inputs(up, 8, (16, 16, 16), 1)
    with torch.no_grad():
        first, second = (raised_convolution(*ours, *given_) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("stride", "kernel", "changes"),
    [
        ((2, 2, 2), (3, 3, 3), {"padding": 0}),
        ((2, 2, 2), (3, 3, 3), {"dilation": 2, "padding": 2}),
        ((2, 2, 2), (3, 3, 3), {"padding_mode": "reflect"}),
        ((2, 2, 2), (5, 3, 3), {}),
        ((2, 2, 2), (1, 3, 3), {}),
        ((4, 2, 2), (3, 3, 3), {}),
        ((1, 1, 1), (3, 3, 3), {}),
    ],
)
def test_other_layers_are_left_alone(stride: tuple[int, ...], kernel: tuple[int, ...], changes: dict[str, Any]) -> None:
    up, _ = layers(stride, kernel, (2, 2, 2, 2))
    convolution = nn.Conv3d(4, 2, kernel, **{"padding": tuple(k // 2 for k in kernel), **changes})
    with torch.no_grad():
        assert raised_convolution(*fast(up, convolution), *inputs(up, 2, (4, 4, 4), 1)) is None


def test_only_large_predictions_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients, of other types, in bfloat16, where sums of rounded parts are less exact, and of few voxels."""
    up, convolution = layers((2, 2, 2), (3, 3, 3), (2, 2, 2, 2))
    ours, given_ = fast(up, convolution), inputs(up, 2, (4, 4, 4), 1)
    assert raised_convolution(*ours, *given_) is None
    with torch.no_grad():
        assert raised_convolution(up, convolution, *given_) is None
        assert raised_convolution(*ours, *(each.double() for each in given_)) is None
        assert raised_convolution(*ours, *(each.to("meta") for each in given_)) is None
        assert raised_convolution(*ours, *given_) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert raised_convolution(*ours, *given_) is None
        monkeypatch.setattr(module, "_VOXELS", 513)
        assert raised_convolution(*ours, *given_) is None


def test_without_onednn_the_layers_run_themselves() -> None:
    up, convolution = layers((2, 2, 2), (3, 3, 3), (2, 2, 2, 2))
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert raised_convolution(*fast(up, convolution), *inputs(up, 2, (4, 4, 4), 1)) is None


@pytest.mark.parametrize("size", [(7, 8, 8), (8, 8, 9), (9, 8, 8)])
def test_sizes_that_do_not_fit_are_refused_by_the_layers(size: tuple[int, ...]) -> None:
    up, convolution = layers((2, 2, 2), (3, 3, 3), (2, 2, 2, 2))
    coarse, skip = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 2, *size)
    with torch.no_grad():
        assert raised_convolution(*fast(up, convolution), coarse, skip) is None
        assert raised_convolution(*fast(up, convolution), coarse, torch.randn(2, 2, 8, 8, 8)) is None


@pytest.mark.parametrize("place", ["transpconvs.1", "stages.1", "stages.1.convs", "stages.1.convs.0.conv"])
def test_hooks_see_what_they_would(place: str) -> None:
    """A prediction calls a layer that somebody watches; the result is the same."""
    net = network(options_with(fusion="mean", width_factor=1.0)).eval()
    x = torch.randn(1, 4, 16, 16, 16)
    calls: list[str] = []
    with torch.no_grad():
        expected = net(x)
        handle = net.decoder.get_submodule(place).register_forward_hook(lambda *_: calls.append(place))
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
        net(x)
    assert calls == [place]


def test_one_voxel_of_an_axis_that_is_kept() -> None:
    """It is both borders at once."""
    torch.manual_seed(0)
    up, convolution = layers((1, 2, 2), (3, 3, 3), (2, 2, 2, 2))
    coarse, skip = inputs(up, 2, (1, 4, 4), 1)
    with torch.no_grad():
        assert raised_convolution(*fast(up, convolution), coarse, skip) is None
