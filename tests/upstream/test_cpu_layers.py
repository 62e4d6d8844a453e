"""Convolutions and norms by other kernels on a CPU: what PyTorch's modules compute."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_mgml.network.pointwise import make_pointwise
from nnunetv2_mgml.upstream import cpu_layers
from nnunetv2_mgml.upstream.cpu_layers import Conv3d, ConvTranspose3d, InstanceNorm2d, InstanceNorm3d, make_fast

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
    assert (x[0, :, :, :, 0].numel() > cpu_layers._SMALL) == (size == "large")
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
    with torch.no_grad():  # channels last
        assert torch.equal(ours(x), ours(x.contiguous(memory_format=torch.channels_last_3d)))
        torch.testing.assert_close(ours(x), runs[0][0], rtol=1e-4, atol=1e-5)


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
    """Other devices and dtypes, autocast to more than a few channels, tracing, no oneDNN, no samples, no batch."""
    _, ours = pair(2, 12, 3, padding=1)
    x = torch.randn(1, 2, 4, 4, 4)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(cpu_layers, "_convolved", refuse)
    with pytest.raises(AssertionError):
        ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert copy.deepcopy(ours).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).device.type == "meta"
    assert ours(x[0]).shape == (12, 4, 4, 4)
    assert ours(x[:0]).shape == (0, 12, 4, 4, 4)
    assert torch.jit.trace(ours, x, check_trace=False)(x).shape == (1, 12, 4, 4, 4)
    assert torch.export.export(ours, (x,)).module()(x).shape == (1, 12, 4, 4, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        assert ours(x).shape == (1, 12, 4, 4, 4)
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


@pytest.mark.parametrize(
    ("kernel", "padding", "stride", "width"),
    [(3, 1, 1, 1), (3, 1, 1, 2), (3, 1, 2, 1), (3, 1, 2, 2), (3, 1, 2, 3), (3, 1, 3, 3), (5, 0, 2, 6), (3, 0, 8, 8)],
)
@pytest.mark.parametrize("results", [3, 8])
def test_rows_that_become_one_voxel(kernel: int, padding: int, stride: int, width: int, results: int) -> None:
    """Of one channel, which oneDNN misreads where channels lie side by side."""
    kernels, paddings = (kernel,) * 3, (kernel // 2, kernel // 2, padding)
    stock, ours = pair(1, results, kernels, padding=paddings, stride=(1, 1, stride))
    x = torch.randn(1, 1, 5, 6, width)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).double(), stock.double()(x.double()), rtol=1e-5, atol=1e-5)


def test_keeps_what_it_is_not_meant_for() -> None:
    others = [
        nn.Conv3d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3, dilation=2),
        nn.Conv3d(4, 4, 3, padding="same"),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3),
        nn.ConvTranspose3d(4, 4, 3, 2),
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


# --- what is predicted goes through channels last ---------------------------------------------------------------------
def leaves_lanes_empty(conv: nn.Conv3d, x: torch.Tensor) -> bool:
    stride, padding = (list(cast("tuple[int, ...]", each)) for each in (conv.stride, conv.padding))
    return cpu_layers._leaves_lanes_empty(x, conv.weight, stride, padding)


def channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (1, 1, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_transposed_convolution(stride: tuple[int, ...], bias: bool, last: bool) -> None:
    torch.manual_seed(0)
    stock = nn.ConvTranspose3d(4, 3, stride, stride, bias=bias)
    ours = copy.deepcopy(stock)
    make_fast([ours])
    assert type(ours) is ConvTranspose3d
    x = torch.randn(2, 4, 3, 4, 5)
    given = x.contiguous(memory_format=torch.channels_last_3d) if last else x
    with torch.no_grad():
        torch.testing.assert_close(ours(given), stock(x))
        assert channels_last(ours(given))
    assert torch.equal(ours(given), stock(given))  # where something learns, PyTorch's
    others: list[nn.Module] = [nn.ConvTranspose3d(4, 3, 3, 2), nn.ConvTranspose3d(4, 4, 2, 2, groups=2)]
    make_fast(others)
    assert {type(other) for other in others} == {nn.ConvTranspose3d}


def test_a_block_of_layers_keeps_the_layout() -> None:
    """Also behind a first layer of one channel, which lies both ways; the values are those of PyTorch's layers."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.InstanceNorm3d(8, affine=True),
        nn.LeakyReLU(inplace=True),
        nn.Conv3d(8, 8, 3, 2, 1),
        nn.InstanceNorm3d(8),
        nn.ConvTranspose3d(8, 8, 2, 2),
        nn.Conv3d(8, 16, 1),
    )
    ours = copy.deepcopy(layers)
    make_fast(ours[:-1])
    make_pointwise(ours[-1])
    x = torch.randn(2, 1, 24, 22, 26)
    with torch.no_grad():
        expected = layers(x)
        for layer in ours:
            x = layer(x)
            assert channels_last(x), layer
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


wide_registers = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a processor with registers of 512 bits"
)


@wide_registers
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [((3, 3, 3), (1, 1, 1), (5, 6, 8)), ((1, 3, 3), (1, 2, 1), (5, 6, 2)), ((3, 3, 3), (2, 1, 1), (64, 33, 34))],
)
def test_two_voxels_at_once(
    kernel: tuple[int, ...], stride: tuple[int, ...], size: tuple[int, ...], batch: int, bias: bool
) -> None:
    """Where eight channels fill half a register: the same sums, also of bfloat16, and channels last as elsewhere."""
    torch.manual_seed(0)
    stock = nn.Conv3d(3, 8, kernel, stride, tuple(k // 2 for k in kernel), bias=bias)
    ours = copy.deepcopy(stock)
    make_fast([ours])
    x = torch.randn(batch, 3, *size)
    assert leaves_lanes_empty(ours, x)
    for odd in (x[..., 1:], x[..., : size[2] - 1]):
        assert not leaves_lanes_empty(ours, odd)
    with torch.no_grad():
        found = ours(x)
        assert channels_last(found)
        torch.testing.assert_close(found, stock(x), rtol=1e-5, atol=1e-6)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            exact = copy.deepcopy(stock).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                errors = [torch.linalg.vector_norm(conv(x).double() - exact) for conv in (ours, stock)]
            rounding = 2**-8 * torch.linalg.vector_norm(exact)
            assert errors[0] < (1.1 * errors[1] if errors[1] < 4 * rounding else rounding), "PyTorch's may be wrong"


@pytest.mark.parametrize(
    "kwargs",
    [
        {"out_channels": 16, "kernel_size": 3, "padding": 1},
        {"out_channels": 8, "kernel_size": 3, "padding": 1, "stride": 2},
        {"out_channels": 8, "kernel_size": 3, "padding": 0},
        {"out_channels": 8, "kernel_size": 5, "padding": 2},
    ],
)
def test_others_go_voxel_by_voxel(kwargs: dict[str, Any]) -> None:
    assert not leaves_lanes_empty(nn.Conv3d(3, **kwargs), torch.randn(1, 3, 8, 8, 8))


def test_a_norm_of_few_voxels_is_done_on_a_copy() -> None:
    """Channels last, PyTorch's kernel for it would take many times as long; the values are the same."""
    norm = nn.InstanceNorm3d(8, affine=True)
    make_fast([norm])
    few, many = (
        torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last_3d) for size in ((8,) * 3, (12,) * 3)
    )
    with torch.no_grad():
        assert norm(few).is_contiguous()
        assert channels_last(norm(many))
        for x in (few, many):
            torch.testing.assert_close(norm(x), functional.instance_norm(x.contiguous()), rtol=1e-5, atol=1e-5)


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs a processor with bfloat16 instructions"
)


@needs_bfloat16
@pytest.mark.parametrize("size", [(6, 8, 10), (16, 12, 14)])
def test_a_prediction_in_bfloat16_goes_the_same_way(size: tuple[int, ...]) -> None:
    """As far from the exact sums as PyTorch's layers are in bfloat16, whose type the result has."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.InstanceNorm3d(8, affine=True),
        nn.LeakyReLU(inplace=True),
        nn.Conv3d(8, 24, 3, 2, 1),
        nn.InstanceNorm3d(24),
        nn.ConvTranspose3d(24, 16, 2, 2),
        nn.Conv3d(16, 16, 1),
    )
    ours = copy.deepcopy(layers)
    make_fast(ours[:-1])
    make_pointwise(ours[-1])
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        exact = copy.deepcopy(layers).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            stock, found = layers(x), ours(x)
            assert channels_last(found)
    assert found.dtype == stock.dtype == torch.bfloat16
    errors = [torch.linalg.vector_norm(result.double() - exact) for result in (found, stock)]
    assert errors[0] < 1.1 * errors[1] < 0.02 * torch.linalg.vector_norm(exact)


def test_gradients_have_gradients() -> None:
    """As a penalty of a loss term of somebody else's needs them; and function transforms go by PyTorch's layers."""
    stock, ours = pair(2, 3, 3, padding=1)
    x = torch.randn(2, 2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for conv in (stock, ours):
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(conv(given).sin().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [given, *conv.parameters()]))
        per_sample = torch.func.vmap(lambda one, conv=conv: conv(one[None])[0])(x)
        torch.testing.assert_close(per_sample, stock(x), rtol=1e-5, atol=1e-5)
    for ours_has, stock_has in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours_has, stock_has, rtol=1e-4, atol=1e-5)


def test_bfloat16_without_instructions_or_in_training_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training where there are more than a few outputs."""
    _, ours = pair(2, 12, 3, padding=1)
    x = torch.randn(1, 2, 4, 4, 4)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(cpu_layers, "_convolved", refuse)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert ours(x).dtype == torch.float16
    for there in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if there:
                with pytest.raises(AssertionError):
                    ours(x)
            else:
                assert ours(x).dtype == torch.bfloat16


def test_a_narrow_1x1_convolution_is_a_product_and_lies_plainly() -> None:
    x = torch.randn(1, 8, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    stock = nn.Conv3d(8, 3, 1)
    ours = copy.deepcopy(stock)
    make_pointwise(ours)
    with torch.no_grad():
        assert ours(x).is_contiguous()
        torch.testing.assert_close(ours(x), stock(x))


# --- instance norms ---------------------------------------------------------------------------------------------------
def norm_pair(stock: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return PyTorch's norm, with weights that are not 1 and 0, and ours with the same."""
    torch.manual_seed(0)
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    ours = copy.deepcopy(stock)
    make_fast([ours])
    assert type(ours) in (InstanceNorm2d, InstanceNorm3d)
    return stock, ours


@pytest.mark.parametrize(("mean", "affine"), [(3, True), (3, False), (30, True)])
@pytest.mark.parametrize("shape", [(1, 3, 8, 9, 7), (2, 5, 1, 3, 2), (3, 4, 11, 6), (1, 3, 40, 41, 42)])
def test_equals_the_norm(shape: tuple[int, ...], mean: int, affine: bool) -> None:
    """Against float64: values and gradients; less exact where the mean is many deviations from 0."""
    kind: type[nn.Module] = nn.InstanceNorm3d if len(shape) == 5 else nn.InstanceNorm2d
    stock, ours = norm_pair(kind(shape[1], eps=1e-5, affine=affine))
    exact = copy.deepcopy(stock).double()
    x = torch.randn(shape) * torch.arange(1.0, shape[1] + 1).reshape(-1, *[1] * (len(shape) - 2)) + mean
    weights = torch.randn(shape)

    def run(norm: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        y = norm(given)
        gradients = torch.autograd.grad((y * weights.to(dtype)).sum(), [given, *norm.parameters()])
        return [each.detach().double() for each in (y, *gradients)]

    for found, expected in zip(run(ours, torch.float32), run(exact, torch.float64), strict=True):
        assert torch.linalg.vector_norm(found - expected) < 1e-5 * mean * torch.linalg.vector_norm(expected)


LAST = torch.channels_last_3d


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mean", [0, 1, 30])
@pytest.mark.parametrize(("channels", "size"), [(16, 64), (8, 64), (16, 11), (32, 9), (3, 30), (32, 16), (16, 17)])
def test_predictions_are_as_exact_as_the_norm(channels: int, size: int, mean: int, affine: bool) -> None:
    """Channels last, as they go through the network: every voxel within a few times PyTorch's own error.

    Whatever the number of voxels, and where one part of the image, empty background, is far from the rest.
    """
    stock, ours = norm_pair(nn.InstanceNorm3d(channels, affine=affine))
    x = torch.randn(2, channels, size, size, size + 1, generator=torch.Generator().manual_seed(1)) + mean
    x[:, :, : size // 3] = -5.0
    last = x.contiguous(memory_format=LAST)
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(x.double())
        errors = [(norm(given).double() - exact).abs().max() for norm, given in ((ours, last), (stock, x))]
        assert errors[0] < 4 * errors[1] + 1e-6
        if size**2 * (size + 1) > 1024:
            assert ours(last).is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_norm_writes_over_the_convolution_before_it_and_over_nothing_else(batch: int) -> None:
    layers = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.LeakyReLU(), nn.InstanceNorm3d(8))
    expected = copy.deepcopy(layers)
    make_fast(layers.modules())
    conv, norm, _, behind = layers
    x = torch.randn(batch, 1, 17, 18, 19)
    with torch.no_grad():
        torch.testing.assert_close(layers(x), expected(x), rtol=1e-4, atol=1e-5)
        made = conv(x)
        assert norm(made).data_ptr() == made.data_ptr()
        assert behind(made).data_ptr() != made.data_ptr()
    made, unchanged = conv(x), expected[0](x)
    norm(made).sum().backward()
    torch.testing.assert_close(made, unchanged)  # what learns is kept for the gradient


@needs_bfloat16
@pytest.mark.parametrize("mean", [1, 30])
def test_predictions_in_bfloat16_are_as_exact_as_the_norm(mean: int) -> None:
    stock, ours = norm_pair(nn.InstanceNorm3d(16, affine=True))
    x = (torch.randn(1, 16, 64, 64, 64, generator=torch.Generator().manual_seed(1)) + mean).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        exact = copy.deepcopy(stock).double()(x.double())
        found, expected = ours(x.contiguous(memory_format=LAST)), stock(x)
    assert found.dtype == torch.bfloat16
    errors = [torch.linalg.vector_norm(y.double() - exact) for y in (found, expected)]
    assert errors[0] < 1.1 * errors[1]


def test_a_sample_is_normalised_alone() -> None:
    """The same bits in a batch of any size, and twice the same."""
    _, ours = norm_pair(nn.InstanceNorm3d(4, affine=True))
    x = torch.randn(5, 4, 7, 6, 9)
    assert torch.equal(ours(x), torch.cat([ours(sample) for sample in x.split(1)]))


def test_norms_stay_pytorchs_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other dtypes, autocast to float16, tracing; and what it refuses is refused, in its words."""
    _, ours = norm_pair(nn.InstanceNorm3d(2, affine=True))
    x = torch.randn(1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        ours.train()(x[:, :, :1, :1, :1])
    with pytest.raises(ValueError, match="num_features"):
        ours(x[:, :1])

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(cpu_layers, "_grouped", refuse)
    with pytest.raises(AssertionError):
        ours(x)
    with torch.autocast("cpu", torch.float16):
        ours(x)
    copy.deepcopy(ours).double()(x.double())
    torch.jit.trace(ours, x, check_trace=False)
    assert torch.export.export(ours, (x,)).module()(x).shape == x.shape
    others = [nn.InstanceNorm3d(2, track_running_stats=True), nn.InstanceNorm1d(2), nn.BatchNorm3d(2)]
    kinds = [type(other) for other in others]
    make_fast(others)
    assert [type(other) for other in others] == kinds


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16")
@pytest.mark.parametrize("spatial", [(1, 9, 8), (5, 6, 2), (5, 6, 1), (4, 1, 1), (2, 8, 8), (6, 2, 5), (3, 3, 3)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)])
def test_few_voxels_in_bfloat16(spatial: tuple[int, ...], stride: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    """Values of predictions and trainings, and gradients, with channels side by side and without."""
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 8, kernel, stride, tuple(taps // 2 for taps in kernel))
    make_fast([conv])
    given = torch.randn(2, 3, *spatial).bfloat16().float()
    for x in (given, given.contiguous(memory_format=torch.channels_last_3d)):
        learns = x.clone().requires_grad_()
        exact = copy.deepcopy(conv).double()(learns.double())
        weights = torch.randn_like(exact)
        with torch.autocast("cpu", torch.bfloat16):
            found = conv(learns)
            with torch.no_grad():
                predicted = conv(x)
        assert found.dtype == predicted.dtype == torch.bfloat16
        for values in (found, predicted):
            assert torch.linalg.vector_norm(values.double() - exact) < 0.01 * torch.linalg.vector_norm(exact)
        with torch.enable_grad():
            expected = torch.autograd.grad(exact, learns, weights)[0]
            own = torch.autograd.grad(found, learns, weights.to(found.dtype))[0]
        assert torch.linalg.vector_norm(own - expected) < 0.01 * torch.linalg.vector_norm(expected)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16")
@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)])
def test_gradients_in_bfloat16_are_those_of_float32(slices: int, stride: tuple[int, ...]) -> None:
    """PyTorch's are none on some processors where an axis has one or two voxels: memory nobody has written."""
    torch.manual_seed(slices)
    conv = nn.Conv3d(8, 16, 3, stride, 1)
    make_fast([conv])
    x = torch.randn(2, 8, slices, 4, 4, requires_grad=True)
    exact = conv(x)
    weights = torch.randn_like(exact)
    expected = torch.autograd.grad((exact * weights).sum(), [*conv.parameters(), x])
    for _ in range(3):
        freed = [torch.full((conv.weight.numel(),), 1e30) for _ in range(8)]
        del freed
        with torch.autocast("cpu", torch.bfloat16):
            found = conv(x)
            assert found.dtype == torch.bfloat16
        for one, two in zip(
            expected, torch.autograd.grad((found * weights).sum(), [*conv.parameters(), x]), strict=True
        ):
            assert torch.linalg.vector_norm(one - two) < 0.02 * torch.linalg.vector_norm(one)


@needs_bfloat16
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("spatial", [(24, 22, 20), (3, 5, 4), (1, 9, 8), (4, 1, 1)])
@pytest.mark.parametrize("kwargs", [{"kernel_size": 3, "padding": 1}, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)}])
@pytest.mark.parametrize(("batch", "channels", "outputs"), [(2, 8, 8), (1, 16, 8), (3, 2, 3), (1, 5, 1)])
def test_narrow_convolutions_learn_in_bfloat16(
    batch: int, channels: int, outputs: int, kwargs: dict[str, Any], spatial: tuple[int, ...], learns: bool
) -> None:
    """Values are PyTorch's to the last bit, or float32's where those may be wrong; gradients as near to those of
    float64 as PyTorch's are, but for a rest."""
    stock, ours = pair(channels, outputs, **kwargs)
    exact = copy.deepcopy(stock).double()
    exact.load_state_dict({key: value.bfloat16().double() for key, value in stock.state_dict().items()})
    x = torch.randn(batch, channels, *spatial).bfloat16().float()
    weights = torch.randn(batch, outputs, *spatial).bfloat16()

    def run(module: nn.Conv3d, x: torch.Tensor) -> list[torch.Tensor]:
        given = x.clone().requires_grad_(learns)
        result = module(given)
        wanted = [given, *module.parameters()] if learns else [*module.parameters()]
        return [result, *torch.autograd.grad(result, wanted, weights.to(result.dtype))]

    with torch.autocast("cpu", torch.bfloat16):
        theirs, own = run(stock, x), run(ours, x)
    right = run(exact, x.double())
    if any(voxels <= 2 and taps > 1 for voxels, taps in zip(spatial, stock.kernel_size, strict=True)):
        assert torch.equal(own[0], stock(x).bfloat16())
    else:
        assert torch.equal(own[0], theirs[0])
    for found, other, expected in zip(own[1:], theirs[1:], right[1:], strict=True):
        assert found.dtype == other.dtype
        assert found.is_contiguous()
        size = torch.linalg.vector_norm(expected)
        off, as_pytorch = (torch.linalg.vector_norm(each.double() - expected) for each in (found, other))
        assert off <= as_pytorch + 2e-3 * size


@needs_bfloat16
@pytest.mark.parametrize("mean", [0, 5])
@pytest.mark.parametrize(("kind", "spatial"), [(nn.InstanceNorm3d, (9, 8, 10)), (nn.InstanceNorm2d, (20, 30))])
def test_norms_learn_in_bfloat16(kind: type[nn.Module], spatial: tuple[int, ...], mean: int) -> None:
    """Values and gradients are as near to those of float64 as PyTorch's norm brings them, but for a rest."""
    stock, ours = norm_pair(kind(6, affine=True))
    exact = copy.deepcopy(stock).double()
    x, weights = (torch.randn(2, 6, *spatial).bfloat16() for _ in range(2))
    x = x + mean

    def run(norm: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype).requires_grad_()
        result = norm(given)
        return [result, *torch.autograd.grad(result, [given, *norm.parameters()], weights.to(dtype))]

    with torch.autocast("cpu", torch.bfloat16):
        theirs, own = (run(norm, torch.bfloat16) for norm in (stock, ours))
    for found, other, expected in zip(own, theirs, run(exact, torch.float64), strict=True):
        assert found.dtype == other.dtype
        off, as_pytorch = (torch.linalg.vector_norm(each.double() - expected) for each in (found, other))
        assert off <= 1.1 * as_pytorch + 1e-3 * torch.linalg.vector_norm(expected)
