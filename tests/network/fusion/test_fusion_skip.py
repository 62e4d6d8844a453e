"""The skip fusion against the convolution it stands for, over features that are zeroed and stacked."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import hide, make_spec

from nnunetv2_mgml.network.fusion.base import sum_present
from nnunetv2_mgml.network.fusion.skip import SkipFusion, skip_fusion

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
    with torch.autocast("cpu", torch.bfloat16):
        assert sum_present(parts.float(), MASKS).dtype == torch.float32
