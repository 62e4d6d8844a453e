from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import randn

from nnunetv2_mgml.objective.voxel_masking import drop_chance, keep_map


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(["confidence", "uniform"]),
    w_f=st.floats(0, 1),
    ratio=st.floats(0, 0.95),
    scale=st.sampled_from([0.0, 0.5, 5.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_mean_chance_is_what_w_f_and_ratio_ask_for(
    mode: str, w_f: float, ratio: float, scale: float, seed: int
) -> None:
    label = randn(2, 4, 5, 6, seed=seed, scale=scale).softmax(1)
    chance = drop_chance(label, torch.tensor([w_f, 0.5]), ratio, mode)
    assert chance.shape == (2, 1, 5, 6)
    assert chance.ge(0).all()
    assert chance.le(1).all()
    assert chance.mean((1, 2, 3)).tolist() == pytest.approx([min(2 * ratio * (1 - w_f), 0.95), ratio], abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(w_f=st.floats(0, 1), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_mean_chance_is_that_of_the_voxels_that_are_taught(w_f: float, share: float, seed: int) -> None:
    """Sparse annotation often lies where the doubt is: ignored voxels must not stand for it."""
    label = randn(2, 3, 400, seed=seed, scale=3.0).softmax(1)
    doubt = 1 - label.amax(1)
    valid = doubt >= doubt.quantile(1 - share, 1, keepdim=True)
    chance = drop_chance(label, torch.full((2,), w_f), 0.2, "confidence", valid)[:, 0]
    for sample in range(2):
        assert chance[sample][valid[sample]].mean().item() == pytest.approx(0.4 * (1 - w_f), abs=1e-5)
    everywhere = torch.ones_like(valid)
    everything = drop_chance(label, torch.full((2,), w_f), 0.2, "confidence", everywhere)
    torch.testing.assert_close(everything, drop_chance(label, torch.full((2,), w_f), 0.2, "confidence"))
    nothing = drop_chance(label, torch.full((2,), w_f), 0.2, "confidence", ~everywhere)
    assert nothing.isfinite().all()


def test_chance_is_proportional_to_doubt() -> None:
    label = randn(1, 4, 8, 8, scale=0.5).softmax(1)
    chance = drop_chance(label, torch.tensor([0.5]), 0.2, "confidence")
    doubt = 1 - label.amax(1, keepdim=True)
    torch.testing.assert_close(chance, doubt * 0.2 / doubt.mean())


def test_doubt_in_few_voxels_is_cut_and_the_rest_spread() -> None:
    label = torch.zeros(1, 2, 1, 100)
    label[:, 0] = 1
    label[0, :, 0, 0] = 0.5
    chance = drop_chance(label, torch.tensor([0.5]), 0.2, "confidence").flatten()
    assert chance[0] > 0.9
    assert chance[1:].unique().numel() == 1
    assert chance.mean().item() == pytest.approx(0.2, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.5, 5.0, 50.0]))
def test_less_sure_voxels_are_never_safer(seed: int, scale: float) -> None:
    label = randn(1, 3, 40, seed=seed, scale=scale).softmax(1)
    order = label.amax(1).flatten().argsort()
    chance = drop_chance(label, torch.tensor([0.3]), 0.3, "confidence").flatten()[order]
    assert chance.diff().le(1e-6).all()


@pytest.mark.parametrize("mode", ["confidence", "uniform"])
@pytest.mark.parametrize("spatial", [(64, 64), (16, 16, 16)])
def test_drawn_share_follows_the_chance(mode: str, spatial: tuple[int, ...]) -> None:
    label = randn(2, 4, *spatial).softmax(1)
    keep = keep_map(label, torch.tensor([0.5, 0.9]), 0.4, mode, torch.Generator().manual_seed(0))
    assert keep.shape == (2, 1, *spatial)
    assert keep.dtype == torch.bool
    dropped = 1 - keep.float().flatten(1).mean(1)
    assert dropped.tolist() == pytest.approx([0.4, 0.08], abs=0.03)


def test_redrawn_every_time_reproducible_with_a_generator_and_complete_at_ratio_zero() -> None:
    label, w_f = randn(1, 4, 16, 16).softmax(1), torch.tensor([0.5])
    assert not torch.equal(keep_map(label, w_f, 0.4, "confidence"), keep_map(label, w_f, 0.4, "confidence"))
    drawn = [keep_map(label, w_f, 0.4, "confidence", torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert keep_map(label, w_f, 0.0, "confidence").all()


def test_no_gradient_and_half_precision_labels() -> None:
    label = randn(1, 4, 8, 8).softmax(1).half().requires_grad_()
    chance = drop_chance(label, torch.tensor([0.5], requires_grad=True), 0.2, "confidence")
    assert not chance.requires_grad
    assert chance.dtype == torch.float32


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence, uniform"):
        keep_map(torch.ones(1, 2, 3), torch.ones(1), 0.2, "random")
