from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bools, parameters, randn, slow_soft_label_loss

from nnunetv2_mgml.objective.adaptive_fusion import adaptive_fusion
from nnunetv2_mgml.objective.distillation import soft_label_loss


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("spatial", [(4, 3), (2, 3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 6.0])
def test_against_slow_reference(modalities: int, spatial: tuple[int, ...], temperature: float) -> None:
    logits, fused = randn(2, modalities, 4, *spatial), randn(2, 4, *spatial, seed=1)
    available, keep = bools(2, modalities), bools(2, 1, *spatial, chance=0.7)
    expected = slow_soft_label_loss(logits, fused, available, keep, temperature)
    assert soft_label_loss(logits, fused, available, keep, temperature).item() == pytest.approx(expected, rel=1e-4)
    valid = bools(2, *spatial, seed=5, chance=0.6)
    expected = slow_soft_label_loss(logits, fused, available, keep & valid[:, None], temperature)
    assert soft_label_loss(logits, fused, available, keep, temperature, valid).item() == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 6.0])
def test_teaching_only_where_the_soft_label_is_better(temperature: float) -> None:
    logits, fused = randn(2, 3, 4, 4, 3), randn(2, 4, 4, 3, seed=1)
    available, keep, valid = bools(2, 3), bools(2, 1, 4, 3, chance=0.7), bools(2, 4, 3, seed=5, chance=0.6)
    labels = torch.randint(4, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    expected = slow_soft_label_loss(logits, fused, available, keep & valid[:, None], temperature, labels)
    logits.requires_grad_()
    loss = soft_label_loss(logits, fused, available, keep, temperature, valid, labels=labels)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < slow_soft_label_loss(logits.detach(), fused, available, keep & valid[:, None], temperature)
    loss.backward()
    index = labels[:, None, None].expand(-1, 3, 1, -1, -1)
    assert (logits.grad.gather(2, index) <= 0).all()
    assert not logits.grad[~available].any()


@settings(max_examples=20, deadline=None)
@given(offset=st.floats(-50, 50), seed=st.integers(0, 99))
def test_offsets_that_change_no_prediction_change_nothing(offset: float, seed: int) -> None:
    """Acceptance 1: the published loss fell from 5.15 to 0.0004 under such an offset."""
    logits, fused = randn(2, 3, 4, 5, 5, seed=seed), randn(2, 4, 5, 5, seed=seed + 1)
    available, keep = torch.ones(2, 3).bool(), torch.ones(2, 1, 5, 5).bool()
    plain, shifted = (
        soft_label_loss(x.double(), fused.double(), available, keep, 6) for x in (logits, logits + offset)
    )
    assert abs(plain - shifted).item() <= 1e-6 * 36
    single = soft_label_loss(logits + offset, fused, available, keep, 6)
    assert single.item() == pytest.approx(plain.item(), rel=1e-4)


def test_minimum_is_at_the_soft_label_not_at_background() -> None:
    """Acceptance 2: with the published loss an all-background label costs 0; here only agreement does."""
    fused = randn(1, 4, 4, 4)
    available, keep = torch.ones(1, 2).bool(), torch.ones(1, 1, 4, 4).bool()
    agreeing = fused[:, None].expand(1, 2, 4, 4, 4)
    background = torch.zeros_like(agreeing).index_fill(2, torch.tensor([0]), 20.0)
    assert soft_label_loss(agreeing, fused, available, keep, 6).item() == pytest.approx(0, abs=1e-5)
    for other in (background, torch.zeros_like(agreeing)):
        assert soft_label_loss(other, fused, available, keep, 6) > 0.1
    # From there, descending the loss moves towards the label in every voxel.
    start = background.clone().requires_grad_()
    soft_label_loss(start, fused, available, keep, 6).backward()
    stepped = soft_label_loss(start.detach() - 0.1 * start.grad, fused, available, keep, 6)
    assert stepped < soft_label_loss(background, fused, available, keep, 6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), temperature=st.sampled_from([0.5, 1.0, 6.0, 10.0]))
def test_never_negative(seed: int, temperature: float) -> None:
    loss = soft_label_loss(
        randn(2, 3, 4, 6, seed=seed),
        randn(2, 4, 6, seed=seed + 1),
        bools(2, 3, seed=seed),
        bools(2, 1, 6, seed=seed),
        temperature,
    )
    assert loss >= -1e-5


def test_two_samples_are_the_mean_of_their_pairs() -> None:
    logits, fused, keep = randn(2, 3, 4, 5, 5), randn(2, 4, 5, 5, seed=1), bools(2, 1, 5, 5, chance=0.7)
    available = torch.tensor([[True, False, True], [False, False, True]])
    single = [
        soft_label_loss(logits[b : b + 1], fused[b : b + 1], available[b : b + 1], keep[b : b + 1], 6) for b in (0, 1)
    ]
    both = soft_label_loss(logits, fused, available, keep, 6)
    assert both.item() == pytest.approx(((2 * single[0] + single[1]) / 3).item(), rel=1e-5)


def test_one_modality_has_nothing_to_learn() -> None:
    logits = randn(2, 1, 4, 5, 5).requires_grad_()
    available, keep = torch.ones(2, 1).bool(), torch.ones(2, 1, 5, 5).bool()
    loss = soft_label_loss(logits, adaptive_fusion(logits, available, parameters(2)), available, keep, 6)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert logits.grad.abs().max() < 1e-6


def test_gradient_is_exactly_zero_where_it_must_be() -> None:
    """Acceptance 5: none into the soft label, absent pairs, dropped voxels."""
    logits, fused = randn(2, 3, 4, 5, 5).requires_grad_(), randn(2, 4, 5, 5, seed=1).requires_grad_()
    available = torch.tensor([[True, False, True], [False, False, True]])
    keep = bools(2, 1, 5, 5, chance=0.7)
    soft_label_loss(logits, fused, available, keep, 6).backward()
    assert fused.grad is None
    assert not logits.grad[~available].any()
    assert not logits.grad.movedim(2, -1)[~keep.expand(2, 3, 5, 5)].any()
    assert logits.grad[available].abs().amax((1, 2, 3)).gt(0).all()


def test_nothing_kept_is_zero_and_attached() -> None:
    logits = randn(1, 2, 4, 5).requires_grad_()
    loss = soft_label_loss(logits, randn(1, 4, 5), torch.ones(1, 2).bool(), torch.zeros(1, 1, 5).bool(), 6)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_gradcheck_with_and_without_training_the_target() -> None:
    logits, fused = randn(2, 2, 3, 2, dtype=torch.float64), randn(2, 3, 2, seed=1, dtype=torch.float64)
    available, keep = torch.tensor([[True, True], [False, True]]), bools(2, 1, 2)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_label_loss(x, fused, available, keep, 2.0), logits)
    fused.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, s: soft_label_loss(x, s, available, keep, 2.0, train_target=True), (logits, fused)
    )


@settings(max_examples=30, deadline=None)
@given(
    scale=st.sampled_from([0.0, 1.0, 2000.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    temperature=st.sampled_from([0.1, 1.0, 6.0]),
)
def test_finite_for_extreme_logits(scale: float, dtype: torch.dtype, temperature: float) -> None:
    """Acceptance 4."""
    logits = randn(2, 4, 4, 5, scale=1).clamp(-1, 1).mul(scale).to(dtype).requires_grad_()
    available = bools(2, 4)
    fused = adaptive_fusion(logits, available, parameters(2))
    loss = soft_label_loss(logits, fused, available, torch.ones(2, 1, 5).bool(), temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_gradient_hardly_depends_on_the_temperature_for_small_logits() -> None:
    norms = []
    for temperature in (2.0, 6.0):
        logits = randn(1, 3, 4, 6, 6, scale=0.3).requires_grad_()
        soft_label_loss(
            logits,
            randn(1, 4, 6, 6, seed=1, scale=0.3),
            torch.ones(1, 3).bool(),
            torch.ones(1, 1, 6, 6).bool(),
            temperature,
        ).backward()
        norms.append(logits.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_the_plain_formula(masked: bool) -> None:
    """Students are gone through one by one, and their probabilities found again on the way back."""
    logits, fused = randn(2, 3, 4, 5, 3).double(), randn(2, 4, 5, 3, seed=1).double()
    available = torch.tensor([[True, False, True], [True, True, True]])
    keep, valid = bools(2, 1, 5, 3, chance=0.7), bools(2, 5, 3, seed=5, chance=0.6) if masked else None
    mine, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = soft_label_loss(mine, fused, available, keep, 6.0, valid)
    target = (fused / 6).log_softmax(1)
    share = (available / available.sum(1, keepdim=True)).double()[:, :, None, None, None]
    divergence = (target.exp() * (target - ((plain / 6).log_softmax(2) * share).sum(1))).sum(1)
    kept = (keep[:, 0] if valid is None else keep[:, 0] & valid).double()
    counts = available.sum(1)
    expected = 36 * (((divergence * kept).sum((1, 2)) / kept.sum((1, 2))) * counts).sum() / counts.sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, plain.grad)
    assert not mine.grad[0, 1].any()


def test_keeps_nothing_of_the_students() -> None:
    """For the backward pass only the students themselves are kept, which are there anyway."""
    logits, fused = randn(1, 4, 4, 6, 6).requires_grad_(), randn(1, 4, 6, 6, seed=1)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        soft_label_loss(logits, fused, torch.ones(1, 4).bool(), torch.ones(1, 1, 6, 6).bool(), 6.0)
    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert all(tensor.data_ptr() == logits.data_ptr() for tensor in large)
