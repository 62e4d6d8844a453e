"""The skip fusion against the convolution it stands for, over features that are zeroed and stacked."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import hide, make_spec

from nnunetv2_mgml.network.fusion.base import build_fusion, span, sum_present
from nnunetv2_mgml.network.fusion.skip import SkipFusion, skip_fusion
from nnunetv2_mgml.network.pointwise import products

MASKS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()


def make(layout: str = "3d", **changes: object) -> tuple[SkipFusion, torch.Tensor]:
    """A float64 fusion of three modalities and features of three samples, absent ones included."""
    torch.manual_seed(0)
    spec = make_spec(layout, **changes)
    module = skip_fusion(spec, 0, out_channels=5, inner=6).double()
    return module, torch.randn(3, 3, spec.channels[0], *[6] * spec.dimension, dtype=torch.float64)


@pytest.mark.parametrize("layout", ["3d", "2d"])
@pytest.mark.parametrize("changes", [{}, {"conv_bias": False}, {"norm_op": None}], ids=["plan", "no bias", "no norm"])
def test_equals_the_convolution_over_zeroed_features(layout: str, changes: dict[str, object]) -> None:
    """Values and the gradients of every parameter and feature, mask in the weights or shares summed."""
    module, features = make(layout, **changes)
    expected = module(hide(features, MASKS).flatten(1, 2))
    weights = torch.randn_like(expected)
    features.requires_grad_()
    slow = torch.autograd.grad(
        (module(hide(features, MASKS).flatten(1, 2)) * weights).sum(), [features, *module.parameters()]
    )
    for shared in (False, True):
        result = module.fuse(features, MASKS, module.share(features) if shared else None)
        torch.testing.assert_close(result, expected)
        fast = torch.autograd.grad((result * weights).sum(), [features, *module.parameters()])
        for one, two in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("samples", [1, 3])
def test_features_that_lie_channels_last_stay_so(samples: int) -> None:
    """As a prediction's do; what absent modalities hold still changes no bit."""
    module, features = make(norm_op=None)
    features = features[:samples]
    last = features.permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)
    mask = MASKS[:samples]
    with torch.no_grad():
        torch.testing.assert_close(module.fuse(last, mask), module.fuse(features, mask))
        weight = torch.rand(samples, 6, 3 * features.shape[2], dtype=torch.float64)
        for bias in (None, torch.rand(6, dtype=torch.float64)):
            product = products(weight, last.flatten(3).flatten(1, 2), bias)
            expected = weight @ features.flatten(3).flatten(1, 2)
            torch.testing.assert_close(product, expected if bias is None else expected + bias[:, None])
            assert product.stride()[1] == 1
        other = last + hide(1e6 * torch.randn_like(last), ~mask)
        assert torch.equal(module.fuse(last, mask), module.fuse(other, mask))
        shared = module.share(last)
        torch.testing.assert_close(shared, module.share(features))
        if samples == 1:  # as of a case for which all subsets are predicted
            assert shared.stride(2) == sum_present(shared, mask).stride(1) == 1
        torch.testing.assert_close(module.fuse(last, mask, shared), module.fuse(features, mask))
        assert torch.equal(module.fuse(last, mask, shared), module.fuse(other, mask, module.share(other)))


def test_shares_of_one_sample_serve_every_mask() -> None:
    module, features = make()
    one = features[:1]
    repeated = one.expand(3, *one.shape[1:])
    torch.testing.assert_close(module.fuse(repeated, MASKS, module.share(one)), module.fuse(repeated, MASKS))
    assert module.share(one).shape == (1, 3, 6, 6, 6, 6)


def test_what_an_absent_modality_holds_changes_no_bit() -> None:
    module, features = make()
    other = features + hide(1e6 * torch.randn_like(features), ~MASKS)
    assert torch.equal(module.fuse(features, MASKS), module.fuse(other, MASKS))
    assert torch.equal(
        module.fuse(features, MASKS, module.share(features)), module.fuse(other, MASKS, module.share(other))
    )


@pytest.mark.parametrize("samples", [1, 3])
def test_sum_over_present_modalities(samples: int) -> None:
    parts = torch.randn(samples, 3, 2, 4, 5, dtype=torch.float64)
    expected = torch.stack([parts[min(b, samples - 1)][MASKS[b]].sum(0) for b in range(3)])
    torch.testing.assert_close(sum_present(parts, MASKS), expected)
    last = parts.movedim(2, -1).contiguous().movedim(-1, 2)
    torch.testing.assert_close(sum_present(last, MASKS), expected)
    assert sum_present(last, MASKS).stride(1) == 1
    row = parts[:, :, :, 0, 0].contiguous()  # what lies side by side is all there is
    torch.testing.assert_close(sum_present(row, MASKS), expected[:, :, 0, 0])
    with torch.autocast("cpu", torch.bfloat16):
        assert sum_present(parts.float(), MASKS).dtype == torch.float32


@pytest.mark.parametrize("rows", [[[0, 1, 0]], [[1, 0, 1]], [[0, 1, 0], [0, 1, 1]], [[1, 1, 1]]])
@pytest.mark.parametrize("form", ["plain", "shared", "weights", "both"])
def test_what_no_sample_sees_is_not_read(rows: list[list[int]], form: str) -> None:
    """Where nothing learns: the same sums as with gradients, which read all; what is never seen may be anything."""
    mask = torch.tensor(rows).bool()
    module, features = make()
    features = features[: len(mask)]
    weights = torch.rand(len(mask), 3, 6, 6, 6).double() * mask[:, :, None, None, None]
    own = {"weights": weights} if form in ("weights", "both") else {}
    expected = module.fuse(features, mask, module.share(features) if form in ("shared", "both") else None, **own)
    with torch.no_grad():
        seen = span(mask)
        outside = [m for m in range(3) if not seen.start <= m < seen.stop]
        features = features.clone()
        features[:, outside] = float("nan")
        shared = module.share(features) if form in ("shared", "both") else None
        torch.testing.assert_close(module.fuse(features, mask, shared, **own), expected)


@pytest.mark.parametrize("rows", [[[0, 0, 1, 0]], [[0, 1, 0, 1], [0, 0, 1, 0]]])
def test_regions_of_what_is_seen(rows: list[list[int]]) -> None:
    """`region_aware`: the same with and without gradients, of which only the latter leaves out what no sample sees."""
    torch.manual_seed(0)
    spec = make_spec(modalities=4)
    design, mask = build_fusion("region_aware", spec).double().eval(), torch.tensor(rows).bool()
    scale = spec.num_scales - 1
    size = [4] * spec.dimension
    features = torch.randn(len(mask), 4, spec.channels[scale], *size, dtype=torch.float64)
    expected = design.fuse_scale(scale, features, mask, None, None)
    with torch.no_grad():
        found = design.fuse_scale(scale, features, mask, None, None)
    torch.testing.assert_close(found.fused, expected.fused)
    torch.testing.assert_close(found.auxiliary, expected.auxiliary)


def test_where_the_mask_is_not_looked_at() -> None:
    mask = torch.tensor([[False, True, False]])
    assert span(mask) == slice(0, 3)
    with torch.no_grad():
        assert span(mask) == slice(1, 2)
        assert span(mask & False) == slice(0, 3)
        assert sum_present(torch.randn(1, 3, 2, 4), mask & False).eq(0).all()
        assert span(mask.to("meta")) == slice(0, 3)
        traced = torch.jit.trace(lambda m: m[:, span(m)], mask, check_trace=False)
    assert traced(~mask).tolist() == [[True, False, True]]
