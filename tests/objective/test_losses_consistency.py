from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bools, randn, slow_consistency_loss

from nnunetv2_mgml.objective.consistency import consistency_loss

ALL = torch.ones(2, 4).bool()
SOME = torch.tensor([[True, False, True, True], [True, True, False, False]])


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("spatial", [(4, 3), (2, 3, 2)])
@pytest.mark.parametrize("temperature", [1.0, 6.0])
def test_against_slow_reference(regions: bool, spatial: tuple[int, ...], temperature: float) -> None:
    student, teacher, valid = randn(2, 3, *spatial), randn(2, 3, *spatial, seed=1), bools(2, *spatial, chance=0.7)
    for mask in (SOME, torch.cat((SOME[:1], ALL[:1]))):
        for counted in (None, valid):
            expected = slow_consistency_loss(student, teacher, mask, ALL, temperature, regions, counted)
            found = consistency_loss(student, teacher, mask, ALL, temperature, regions, counted)
            assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 6.0])
def test_teaching_only_where_the_teacher_is_better(regions: bool, temperature: float) -> None:
    """Against the slow reference; and then descending it never lowers what the truth gets."""
    student, teacher = randn(2, 3, 4, 3), randn(2, 3, 4, 3, seed=1)
    truth = bools(2, 3, 4, 3, seed=2) if regions else bools(2, 4, 3, seed=2).long() + bools(2, 4, 3, seed=3).long()
    expected = slow_consistency_loss(student, teacher, SOME, ALL, temperature, regions, None, truth)
    student.requires_grad_()
    loss = consistency_loss(student, teacher, SOME, ALL, temperature, regions, None, truth)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert 0 < expected < slow_consistency_loss(student.detach(), teacher, SOME, ALL, temperature, regions)
    loss.backward()
    if regions:
        assert (student.grad[truth] <= 0).all()
        assert (student.grad[~truth] >= 0).all()
    else:
        assert (student.grad.gather(1, truth[:, None]) <= 0).all()


@pytest.mark.parametrize("regions", [True, False])
def test_students_that_saw_everything_are_skipped_but_stay_in_the_graph(regions: bool) -> None:
    """Acceptance 6, first half; also where a case is incomplete itself."""
    for available in (ALL, SOME):
        student = randn(2, 3, 4, 4).requires_grad_()
        loss = consistency_loss(student, randn(2, 3, 4, 4, seed=1), available, available, 6, regions)
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert not student.grad.any()


@pytest.mark.parametrize("regions", [True, False])
def test_patch_size_does_not_matter(regions: bool) -> None:
    """Acceptance 6, second half: the published term grows eightfold here."""
    student, teacher = randn(2, 3, 4, 4, 4), randn(2, 3, 4, 4, 4, seed=1)
    once, tiled = (
        consistency_loss(s, t, SOME, ALL, 6, regions)
        for s, t in ((student, teacher), (student.repeat(1, 1, 2, 2, 2), teacher.repeat(1, 1, 2, 2, 2)))
    )
    assert tiled.item() == pytest.approx(once.item(), rel=1e-6)


@pytest.mark.parametrize("regions", [True, False])
def test_agreement_costs_nothing_and_teacher_gets_no_gradient(regions: bool) -> None:
    logits = randn(2, 3, 4, 4).requires_grad_()
    teacher = randn(2, 3, 4, 4).requires_grad_()
    loss = consistency_loss(logits, teacher, SOME, ALL, 6, regions)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert teacher.grad is None
    assert logits.grad.abs().max() < 1e-6


@settings(max_examples=20, deadline=None)
@given(offset=st.floats(-100, 100), seed=st.integers(0, 99))
def test_softmax_form_ignores_offsets(offset: float, seed: int) -> None:
    student, teacher = randn(2, 4, 5, seed=seed), randn(2, 4, 5, seed=seed + 1)
    plain = consistency_loss(student, teacher, SOME, ALL, 6, False)
    assert consistency_loss(student + offset, teacher, SOME, ALL, 6, False).item() == pytest.approx(
        plain.item(), abs=1e-3
    )
    assert plain >= -1e-5


@pytest.mark.parametrize("regions", [True, False])
def test_two_samples_equal_two_batches(regions: bool) -> None:
    student, teacher = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    single = [
        consistency_loss(student[b : b + 1], teacher[b : b + 1], SOME[b : b + 1], ALL[b : b + 1], 6, regions)
        for b in (0, 1)
    ]
    assert consistency_loss(student, teacher, SOME, ALL, 6, regions).item() == pytest.approx(
        (sum(single) / 2).item(), rel=1e-5
    )


@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("regions", [True, False])
def test_gradcheck(regions: bool, better: bool) -> None:
    student, teacher = randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_(), randn(2, 3, 2, 2, seed=1).double()
    valid = bools(2, 2, 2)
    truth = (bools(2, 3, 2, 2, seed=2) if regions else bools(2, 2, 2, seed=2).long()) if better else None
    assert torch.autograd.gradcheck(
        lambda s: consistency_loss(s, teacher, SOME, ALL, 2.0, regions, valid, truth), student
    )


def test_regions_keep_the_logits_and_nothing_beside_them() -> None:
    """Without that a step's peak grows by three maps of the size of the prediction."""
    student, teacher = randn(2, 3, 8, 8).requires_grad_(), randn(2, 3, 8, 8, seed=1)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = consistency_loss(student, teacher, SOME, ALL, 6, True)
    others = [tensor for tensor in kept if tensor.data_ptr() not in (student.data_ptr(), teacher.data_ptr())]
    assert len(others) < len(kept)
    assert sum(tensor.numel() for tensor in others) < student.numel() / 3
    loss.backward()
    assert student.grad.any()


@settings(max_examples=40, deadline=None)
@given(
    regions=st.booleans(),
    scale=st.sampled_from([0.0, 2000.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    temperature=st.sampled_from([0.1, 6.0]),
)
def test_finite_for_extreme_logits(regions: bool, scale: float, dtype: torch.dtype, temperature: float) -> None:
    student, teacher = (randn(2, 3, 5, seed=seed, scale=1).clamp(-1, 1).mul(scale).to(dtype) for seed in (0, 1))
    student.requires_grad_()
    loss = consistency_loss(student, teacher, SOME, ALL, temperature, regions)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss >= -1e-4
    assert student.grad.isfinite().all()
