from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bools, parameters, randn, slow_fusion

from nnunetv2_mgml.objective.adaptive_fusion import adaptive_fusion, mean_fusion, smooth_max, smooth_min
from nnunetv2_mgml.objective.meta_network import MetaParameters


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("spatial", [(4, 3), (2, 3, 2)])
def test_against_slow_reference(modalities: int, spatial: tuple[int, ...]) -> None:
    logits, available, p = randn(2, modalities, 4, *spatial), bools(2, modalities), parameters(2)
    expected = torch.from_numpy(slow_fusion(logits, available, p)).reshape(2, 4, *spatial)
    torch.testing.assert_close(adaptive_fusion(logits, available, p).double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(adaptive_fusion(logits.double(), available, p), expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(modalities=st.integers(1, 5), seed=st.integers(0, 999), sharpness=st.sampled_from([0.5, 5.0, 20.0, 100.0]))
def test_smooth_extremes_lie_between_mean_and_extreme(modalities: int, seed: int, sharpness: float) -> None:
    values, available = randn(2, modalities, 3, 4, seed=seed, dtype=torch.float64), bools(2, modalities, seed=seed)
    b = torch.full((2,), sharpness, dtype=torch.float64)
    high, low = smooth_max(values, available, b), smooth_min(values, available, b)
    for sample in (0, 1):
        present = values[sample, available[sample]]
        assert (high[sample] <= present.amax(0) + 1e-9).all()
        assert (high[sample] >= present.mean(0) - 1e-9).all()
        assert (low[sample] >= present.amin(0) - 1e-9).all()
        assert (low[sample] <= present.mean(0) + 1e-9).all()


def test_limits_are_extreme_and_mean() -> None:
    values, available = randn(2, 4, 3, 5, dtype=torch.float64), torch.tensor([[True] * 4, [True, False, True, False]])
    sharp, flat = torch.full((2,), 1e6).double(), torch.full((2,), 1e-6).double()
    for sample, rows in ((0, [0, 1, 2, 3]), (1, [0, 2])):
        present = values[sample, rows]
        for function, extreme in ((smooth_max, present.amax(0)), (smooth_min, present.amin(0))):
            torch.testing.assert_close(function(values, available, sharp)[sample], extreme, atol=1e-4, rtol=0)
            torch.testing.assert_close(function(values, available, flat)[sample], present.mean(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("modalities", [1, 4])
def test_a_single_modality_gives_itself(modalities: int) -> None:
    logits, p = randn(2, modalities, 4, 3, 3), parameters(2)
    available = torch.zeros(2, modalities).bool()
    available[:, modalities - 1] = True
    itself = logits[:, modalities - 1].log_softmax(1)
    torch.testing.assert_close(adaptive_fusion(logits, available, p), itself, atol=2e-6, rtol=1e-6)
    assert torch.equal(mean_fusion(logits, available), itself)


def test_mean_fusion_is_the_mean_of_log_probabilities() -> None:
    logits, available = randn(2, 3, 4, 3, 3), torch.tensor([[True, True, False], [True, True, True]])
    logs = logits.log_softmax(2)
    torch.testing.assert_close(mean_fusion(logits, available), torch.stack([logs[0, :2].mean(0), logs[1].mean(0)]))
    flat = MetaParameters.fixed(2, 0.5, 1e-3)
    torch.testing.assert_close(
        adaptive_fusion(logits, available, flat), mean_fusion(logits, available), atol=5e-3, rtol=0
    )


@settings(max_examples=20, deadline=None)
@given(offset=st.floats(-1000, 1000), seed=st.integers(0, 99))
def test_offsets_that_change_no_prediction_change_nothing(offset: float, seed: int) -> None:
    logits, available, p = randn(2, 3, 4, 4, seed=seed, dtype=torch.float64), bools(2, 3), parameters(2)
    shifted = logits.clone()
    shifted[:, 1] += offset
    torch.testing.assert_close(
        adaptive_fusion(shifted, available, p), adaptive_fusion(logits, available, p), atol=1e-6, rtol=0
    )


def test_absent_modalities_have_exactly_no_influence_and_samples_do_not_mix() -> None:
    logits, p = randn(2, 3, 4, 2, 5), parameters(2)
    available = torch.tensor([[True, False, True], [False, True, True]])
    fused = adaptive_fusion(logits, available, p)
    other = logits.clone()
    other[~available] = 1e4
    assert torch.equal(adaptive_fusion(other, available, p), fused)
    assert torch.equal(mean_fusion(other, available), mean_fusion(logits, available))
    for b in (0, 1):
        alone = adaptive_fusion(logits[b : b + 1], available[b : b + 1], MetaParameters(*(x[b : b + 1] for x in p)))
        torch.testing.assert_close(alone[0], fused[b], atol=1e-6, rtol=1e-6)


def test_batch_as_large_as_another_axis_does_not_mix() -> None:
    """The published code broadcast beta (B, 1) against the last axes: silent where the sizes agreed."""
    logits, available = randn(3, 3, 3, 3, 3), torch.ones(3, 3).bool()
    p = MetaParameters(*(torch.tensor([0.1, 0.5, 0.9]) for _ in range(3)), *(torch.tensor([0.5, 5, 20]),) * 2)
    expected = torch.from_numpy(slow_fusion(logits, available, p)).reshape(3, 3, 3, 3).float()
    torch.testing.assert_close(adaptive_fusion(logits, available, p), expected, atol=2e-5, rtol=1e-5)


def test_gradcheck_of_parameters_and_of_the_differentiable_extremes() -> None:
    logits, available = randn(2, 3, 3, 2, dtype=torch.float64), torch.tensor([[True, True, False], [True, True, True]])
    p = parameters(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, b, a: adaptive_fusion(logits, available, MetaParameters(p.t1, p.t2, w, b, a)),
        (p.w_f, p.beta, p.alpha),
    )
    values, sharpness = logits.clone().requires_grad_(), p.beta
    assert torch.autograd.gradcheck(lambda v, s: smooth_max(v, available, s), (values, sharpness))
    assert torch.autograd.gradcheck(lambda v, s: smooth_min(v, available, s), (values, sharpness))


def test_gradient_reaches_the_parameters_and_not_the_logits() -> None:
    logits, available = randn(2, 3, 4, 3, 3).requires_grad_(), bools(2, 3)
    p = parameters(2, requires_grad=True)
    fused = adaptive_fusion(logits, available, p)
    fused.square().sum().backward()
    assert logits.grad is None
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (p.w_f, p.beta, p.alpha))
    assert p.t1.grad is None
    assert not mean_fusion(logits, available).requires_grad


@settings(max_examples=40, deadline=None)
@given(
    scale=st.sampled_from([1.0, 2000.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    sharpness=st.sampled_from([1e-3, 20.0, 100.0]),
    w_f=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_finite_for_extreme_logits(scale: float, dtype: torch.dtype, sharpness: float, w_f: float, seed: int) -> None:
    logits = randn(2, 4, 4, 3, seed=seed, scale=1).clamp(-1, 1).mul(scale).to(dtype)
    values = [torch.full((2,), x).requires_grad_() for x in (w_f, sharpness, sharpness)]
    fused = adaptive_fusion(logits, bools(2, 4, seed=seed), MetaParameters(values[0], values[0], *values))
    assert fused.dtype == torch.float32
    (fused / 6).log_softmax(1).square().mean().backward()
    assert fused.isfinite().all()
    assert all(x.grad.isfinite().all() for x in values)
