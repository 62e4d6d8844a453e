from __future__ import annotations

import pytest
import torch
from fusion_cases import make_design, make_pass, make_spec, run

from nnunetv2_mgml.modalities import all_subsets


def test_weights_are_a_softmax_over_the_present_modalities() -> None:
    """Equal features come back unchanged, so the weights sum to one and absent modalities have none."""
    spec = make_spec()
    design = make_design("sfusion", spec).eval()
    for subset in all_subsets(3):
        inputs = make_pass(spec, [subset])
        common = inputs.features[0][:, subset.index(True)]
        features = common[:, None] * inputs.mask[:, :, None, None, None, None]
        fused = design.fuse_scale(0, features, inputs.mask, None, None).fused
        torch.testing.assert_close(fused, common, atol=1e-5, rtol=1e-5)


def test_order_of_modalities_does_not_matter() -> None:
    """Mask and features are read in the same order (the ported original permutes one of them)."""
    spec = make_spec()
    design = make_design("sfusion", spec).eval()
    inputs = make_pass(spec, [[1, 0, 1]])
    order = [2, 0, 1]
    permuted = run(design, inputs._replace(features=[f[:, order] for f in inputs.features], mask=inputs.mask[:, order]))
    for one, two in zip(run(design, inputs), permuted, strict=True):
        torch.testing.assert_close(one.fused, two.fused, atol=1e-5, rtol=1e-5)


def test_a_single_modality_comes_back_unchanged() -> None:
    spec = make_spec("anisotropic")
    design = make_design("sfusion", spec).eval()
    inputs = make_pass(spec, [[0, 1, 0]])
    for features, result in zip(inputs.features, run(design, inputs), strict=True):
        assert torch.equal(result.fused, features[:, 1])


@pytest.mark.parametrize(("size", "grid"), [((128, 128, 128), (8, 8, 8)), ((5, 16, 9), (5, 8, 8))])
def test_token_grid(size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """At most 8 tokens per axis, fewer where the features have fewer voxels."""
    spec = make_spec(patch_size=size, options={"grid": 8, "depth": 1})
    transformer = make_design("sfusion", spec).scales[0]
    assert transformer.pooled_size(size) == grid
    assert [axis.shape[2] for axis in transformer.positions.axes] == list(grid)
