from __future__ import annotations

import pytest
import torch
from fusion_cases import LAYOUTS, OTHER_SIZE, make_design, make_pass, make_spec, run

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.attention import SelfAttention
from nnunetv2_mgml.network.silence import silence


@pytest.mark.parametrize("name", ["sfusion", "sfusion+interpolated"])
def test_weights_are_a_softmax_over_the_present_modalities(name: str) -> None:
    """Equal features come back unchanged, so the weights sum to one and absent modalities have none."""
    spec = make_spec()
    design = make_design(name, spec).eval()
    for subset in all_subsets(3):
        inputs = make_pass(spec, [subset])
        common = inputs.features[0][:, subset.index(True)]
        features = common[:, None] * inputs.mask[:, :, None, None, None, None]
        fused = design.fuse_scale(0, features, inputs.mask, None, None).fused
        torch.testing.assert_close(fused, common, atol=1e-5, rtol=1e-5)


def test_order_of_modalities_does_not_matter() -> None:
    """Mask and features are read in the same order (the ported original permutes one of them).

    In the form without codes that run on from one modality to the next.
    """
    spec = make_spec()
    design = make_design("sfusion+interpolated", spec).eval()
    inputs = make_pass(spec, [[1, 0, 1]])
    order = [2, 0, 1]
    permuted = run(design, inputs._replace(features=[f[:, order] for f in inputs.features], mask=inputs.mask[:, order]))
    for one, two in zip(run(design, inputs), permuted, strict=True):
        torch.testing.assert_close(one.fused, two.fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sfusion", "sfusion+interpolated"])
def test_a_single_modality_comes_back_unchanged(name: str) -> None:
    spec = make_spec("anisotropic")
    design = make_design(name, spec).eval()
    inputs = make_pass(spec, [[0, 1, 0]])
    for features, result in zip(inputs.features, run(design, inputs), strict=True):
        assert torch.equal(result.fused, features[:, 1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bigger", [False, True])
def test_removing_and_hiding_are_the_same(layout: str, bigger: bool) -> None:
    """In evaluation absent modalities are taken out, in training they are hidden: one result, and one gradient."""
    spec = make_spec(layout, options={"dropout": 0.0})
    design = make_design("sfusion", spec)
    inputs = make_pass(spec, list(all_subsets(3)), OTHER_SIZE[layout] if bigger else None)
    results, gradients = [], []
    for training in (True, False):
        features = [f.clone().requires_grad_() for f in inputs.features]
        results.append(run(design.train(training), inputs._replace(features=features)))
        sum(result.fused.square().sum() for result in results[-1]).backward()
        gradients.append([f.grad for f in features])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one.fused, two.fused, atol=1e-5, rtol=1e-5)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_tokens_of_absent_modalities_are_not_made_in_evaluation() -> None:
    """Two rows of two, one of three, none for single modalities, whatever the order of the masks."""
    spec = make_spec()
    design = make_design("sfusion", spec).eval()
    seen: list[tuple[int, ...]] = []
    design.scales[0].layers[0].register_forward_hook(lambda _, inputs, output: seen.append(tuple(inputs[0].shape[:2])))
    inputs = make_pass(spec, [[1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 1, 1]])
    design.fuse_scale(0, inputs.features[0], inputs.mask, None, None)
    assert seen == [(2, 2 * 4**3), (1, 3 * 4**3)]


@pytest.mark.parametrize(
    ("patch", "cell", "size", "grid"),
    [
        ((128, 128, 128), (16, 16, 16), (128, 128, 128), (8, 8, 8)),
        ((80, 80, 80), (10, 10, 10), (96, 80, 41), (10, 8, 5)),
        ((5, 16, 9), (1, 2, 2), (5, 16, 9), (5, 8, 5)),
    ],
)
def test_cells(patch: tuple[int, ...], cell: tuple[int, ...], size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """At most 8 cells per axis on the plan's patch; other sizes have the same cells, the last one cut off."""
    spec = make_spec(patch_size=patch, options={"grid": 8, "depth": 1})
    scores = make_design("sfusion", spec).scales[0]
    assert scores.cell == cell
    assert scores.grid(size) == grid
    assert scores.spread.weight.shape == (cell[0] * cell[1] * cell[2] * 8, 8)


def test_cells_are_means_of_their_voxels_also_at_the_border() -> None:
    spec = make_spec("2d", patch_size=(10, 14), options={"grid": 4, "depth": 1})
    scores = make_design("sfusion", spec).scales[0]
    assert scores.cell == (3, 4)
    features = torch.randn(1, 1, 8, 10, 14)
    tokens = scores.pool(features)
    assert tokens.shape == (1, 1, 16, 8)
    torch.testing.assert_close(tokens[0, 0, 0], features[0, 0, :, :3, :4].mean((1, 2)))
    torch.testing.assert_close(tokens[0, 0, 15], features[0, 0, :, 9:, 12:].mean((1, 2)))


@pytest.mark.parametrize(("size", "grid"), [((128, 128, 128), (8, 8, 8)), ((5, 16, 9), (5, 8, 8))])
def test_token_grid_of_the_interpolated_form(size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    """At most 8 tokens per axis, fewer where the features have fewer voxels."""
    spec = make_spec(patch_size=size, options={"form": "interpolated", "grid": 8, "depth": 1})
    transformer = make_design("sfusion", spec).scales[0]
    assert transformer.pooled_size(size) == grid
    assert [axis.shape[2] for axis in transformer.positions.axes] == list(grid)


def test_attention_weights_are_dropped_for_the_student_alone() -> None:
    torch.manual_seed(0)
    attention, tokens = SelfAttention(16, 2, dropout=0.5), torch.randn(2, 9, 16)
    assert not torch.equal(attention(tokens), attention(tokens)), "another draw each time"
    with silence():
        assert torch.equal(attention(tokens), attention(tokens)), "the teacher's pass"
    expected = SelfAttention(16, 2)
    expected.load_state_dict(attention.state_dict())
    assert torch.equal(attention.eval()(tokens), expected(tokens))


@pytest.mark.parametrize(("narrow", "heads"), [(False, 2), (True, 4)])
def test_heads_as_published_where_they_are_narrow(narrow: bool, heads: int) -> None:
    spec = make_spec(channels=(16, 32), options={"narrow_heads": narrow, "depth": 1})
    layer = build_fusion("sfusion", spec).scales[0].layers[0]
    assert layer.attention.heads == heads
