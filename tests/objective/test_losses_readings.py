"""The published forms, with the facts their analysis measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bools, kl, log_softmax, parameters, randn, softmax

from nnunetv2_mgml.objective.meta_network import MetaParameters
from nnunetv2_mgml.objective.published.fusion import raw_fusion
from nnunetv2_mgml.objective.published.paper import paper_consistency_loss, paper_soft_label_loss
from nnunetv2_mgml.objective.published.reference import reference_consistency_loss, reference_soft_label_loss


def log_sum_exp(values: np.ndarray) -> float:
    return float(values.max() + math.log(np.exp(values - values.max()).sum()))


def slow_raw_fusion(logits: np.ndarray, present: np.ndarray, w_f: float, beta: float, alpha: float) -> np.ndarray:
    """Eq. 3-5 for one sample ``(M, K, N)``."""
    fused = np.zeros(logits.shape[1:])
    for k, v in np.ndindex(*fused.shape):
        scores = logits[present, k, v]
        fused[k, v] = w_f * log_sum_exp(beta * scores) / beta - (1 - w_f) * log_sum_exp(-alpha * scores) / alpha
    return fused


def test_raw_fusion_is_equations_3_to_5() -> None:
    logits, available, p = randn(2, 3, 4, 5, dtype=torch.float64), bools(2, 3), parameters(2, high=100)
    fused = raw_fusion(logits, available, p)
    for b in (0, 1):
        expected = slow_raw_fusion(logits[b].numpy(), available[b].numpy(), *(float(x[b]) for x in p[2:]))
        torch.testing.assert_close(fused[b], torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


def test_raw_fusion_depends_on_offsets_that_change_no_prediction() -> None:
    """Why `ours` starts from log-probabilities."""
    logits, available, p = randn(1, 4, 4, 500), torch.ones(1, 4).bool(), MetaParameters.fixed(1, 0.5, 100)
    shifted = logits + randn(1, 4, 1, 1, seed=1, scale=5)
    changed = raw_fusion(logits, available, p).argmax(1) != raw_fusion(shifted, available, p).argmax(1)
    assert changed.float().mean() > 0.1


def test_paper_soft_label_loss_is_equations_7_and_8() -> None:
    logits = randn(2, 3, 4, 6, dtype=torch.float64)
    available, p = torch.tensor([[True, False, True], [True, True, True]]), parameters(2)
    expected = 0.0
    for b in (0, 1):
        fused = slow_raw_fusion(logits[b].numpy(), available[b].numpy(), *(float(x[b]) for x in p[2:]))
        for m in np.flatnonzero(available[b].numpy()):
            probabilities = np.stack([softmax(logits[b, m, :, v].numpy()) for v in range(6)], 1)
            weights = 1 - probabilities.sum(1) / probabilities.sum()
            logs = np.stack([log_softmax(fused[:, v]) for v in range(6)], 1)
            expected -= (weights * (probabilities * logs).sum(1)).sum() / int(available[b].sum()) / 2
    assert paper_soft_label_loss(logits, available, p, 0.0).item() == pytest.approx(expected, rel=1e-5)


def test_paper_soft_label_loss_is_a_sum_over_voxels() -> None:
    logits, available, p = randn(1, 3, 4, 6), torch.ones(1, 3).bool(), parameters(1)
    once, tiled = (paper_soft_label_loss(x, available, p, 0.0) for x in (logits, logits.repeat(1, 1, 1, 8)))
    assert tiled.item() == pytest.approx(8 * once.item(), rel=1e-5)


def test_reference_soft_label_loss_without_mask() -> None:
    logits, p, temperature = randn(2, 3, 4, 6, dtype=torch.float64), parameters(2), 6.0
    expected = 0.0
    for b in (0, 1):
        fused = slow_raw_fusion(logits[b].numpy(), np.ones(3, bool), *(float(x[b]) for x in p[2:]))
        label = np.stack([softmax(fused[:, v] / temperature) for v in range(6)], 1)
        weights = 1 - label.sum(1) / label.sum()
        for m in range(3):
            logs = np.log(np.clip(logits[b, m].numpy(), 0.005, 1))
            expected -= (weights * (label * logs).mean(1)).sum() / 2
    assert reference_soft_label_loss(logits, p, temperature, 0.0).item() == pytest.approx(expected, rel=1e-5)


def test_reference_facts() -> None:
    """6.3 rows 6-8: a constant offset, and an all-background soft label, make the published loss vanish."""
    logits, p = randn(1, 4, 4, 1000), MetaParameters.fixed(1, 0.5, 100)
    plain = reference_soft_label_loss(logits, p, 8, 0.0)
    assert reference_soft_label_loss(logits + 50, p, 8, 0.0) < 1e-6 < plain
    background = torch.zeros_like(logits).index_fill(2, torch.tensor([0]), 1000.0)
    assert abs(reference_soft_label_loss(background, p, 8, 0.0).item()) < 1e-4
    uniform = reference_soft_label_loss(torch.zeros_like(logits), p, 8, 0.0)
    assert uniform.item() == pytest.approx(4 * 0.75 * -math.log(0.005), rel=1e-4)


def test_reference_mask_leaves_the_denominator_and_drops_18_percent() -> None:
    torch.manual_seed(0)
    logits, p = torch.zeros(1, 4, 4, 50000), MetaParameters.fixed(1, 0.5, 100)
    full, masked = (reference_soft_label_loss(logits, p, 8, ratio).item() for ratio in (0.0, 0.2))
    assert masked / full == pytest.approx(1 - 0.181, abs=0.005)


@pytest.mark.parametrize("regions", [True, False])
def test_paper_consistency_is_equation_9(regions: bool) -> None:
    student, teacher = randn(2, 3, 5, dtype=torch.float64), randn(2, 3, 5, seed=1, dtype=torch.float64)
    expected = []
    for b, v in np.ndindex(2, 5):
        t, s = teacher[b, :, v].numpy() / 6, student[b, :, v].numpy() / 6
        expected.append(
            sum(kl(log_softmax(np.array([x, 0])), log_softmax(np.array([y, 0]))) for x, y in zip(t, s, strict=True))
            if regions
            else kl(log_softmax(t), log_softmax(s))
        )
    assert paper_consistency_loss(student, teacher, 6, regions).item() == pytest.approx(np.mean(expected), rel=1e-6)


@pytest.mark.parametrize(("temperature", "highest"), [(6, 0.0072), (8, 0.0040)])
def test_reference_consistency_is_bounded_per_voxel_and_grows_with_the_patch(
    temperature: float, highest: float
) -> None:
    """6.3 rows 18 and 19."""
    student, teacher = torch.zeros(2, 4, 10), torch.zeros(2, 4, 10)
    student[:, 0], teacher[:, 1] = 1000, 1000
    per_voxel = reference_consistency_loss(student, teacher, temperature, False).item() / 10
    assert per_voxel == pytest.approx(highest, abs=1e-4)
    tiled = reference_consistency_loss(student.repeat(1, 1, 8), teacher.repeat(1, 1, 8), temperature, False)
    assert tiled.item() == pytest.approx(8 * 10 * per_voxel, rel=1e-5)
    valid = torch.zeros(2, 10).bool()
    valid[:, :5] = True
    assert reference_consistency_loss(student, teacher, temperature, False, valid).item() == pytest.approx(
        5 * per_voxel, rel=1e-5
    )


@settings(max_examples=30, deadline=None)
@given(
    scale=st.sampled_from([0.0, 10.0, 2000.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    regions=st.booleans(),
)
def test_finite_for_extreme_logits(scale: float, dtype: torch.dtype, regions: bool) -> None:
    logits = randn(2, 4, 4, 8, scale=1).clamp(-1, 1).mul(scale).to(dtype).requires_grad_()
    available, p = bools(2, 4), parameters(2, low=1, high=100, requires_grad=True)
    valid = bools(2, 8)
    losses = [
        paper_soft_label_loss(logits, available, p, 0.2, valid),
        reference_soft_label_loss(logits, p, 8, 0.2),
        *(f(logits[:, 0], logits[:, 1], 6, regions) for f in (paper_consistency_loss, reference_consistency_loss)),
    ]
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert logits.grad.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (p.w_f, p.beta, p.alpha))
