"""PASSION's rebalancing: the loss against loops, and who learns how much."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import bools, labels_of, nnunet_loss, objective_of, randn, slow_divergence, slow_prototype_distances
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunetv2_mgml.network.interface import SingleModalities, TrainingOutput, View
from nnunetv2_mgml.objective import ObjectiveValue, Options
from nnunetv2_mgml.objective.balance import ModalityBalance
from nnunetv2_mgml.objective.rebalancing import Balance, rebalancing_terms, relative_preference
from nnunetv2_mgml.objective.segmentation import modality_segmentation_loss

K, M, C, SHAPE = 4, 3, 5, (6, 4, 4)
AVAILABLE = torch.tensor([[True, True, True], [True, False, True]])
BALANCE = Balance(torch.tensor([0.5, 1.5, 1.0]), torch.tensor([1.0, 2.0, 4.0]))


def single(
    regions: bool = True, scales: int = 3, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SingleModalities:
    heads = K - 1 if regions else K
    sizes = [tuple(n // 2**s for n in SHAPE) for s in range(scales)]
    return SingleModalities(
        students=[
            randn(batch, M, heads, *size, seed=seed + s, dtype=dtype).requires_grad_() for s, size in enumerate(sizes)
        ],
        features=randn(batch, M, C, *SHAPE, seed=seed + 10, dtype=dtype).requires_grad_(),
        teacher=[
            randn(batch, heads, *size, seed=seed + 20 + s, dtype=dtype).requires_grad_() for s, size in enumerate(sizes)
        ],
        teacher_features=randn(batch, C, *SHAPE, seed=seed + 30, dtype=dtype).requires_grad_(),
    )


def terms_of(
    case: SingleModalities,
    labels: torch.Tensor,
    available: torch.Tensor = AVAILABLE,
    regions: bool = True,
    valid: list[torch.Tensor] | None = None,
    balance: Balance = BALANCE,
    temperature: float = 4.0,
) -> Any:
    return rebalancing_terms(
        case,
        labels,
        valid or [None] * len(case.students),
        available,
        balance,
        num_classes=K,
        temperature=temperature,
        regions=regions,
    )


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("scales", [1, 2, 3])
@pytest.mark.parametrize("ignore", [True, False])
def test_against_slow_reference(regions: bool, scales: int, ignore: bool) -> None:
    case = single(regions, scales, dtype=torch.float64)
    labels = labels_of(2, *SHAPE, classes=K)
    labels[1][labels[1] == 2] = 0  # a class that one of the samples lacks
    valid = [bools(2, *(n // 2**s for n in SHAPE), seed=s, chance=0.7) for s in range(scales)] if ignore else None
    found = terms_of(case, labels, regions=regions, valid=valid)
    plain = SingleModalities(*([x.detach() for x in f] if isinstance(f, list) else f.detach() for f in case))
    divergence = slow_divergence(plain.students, plain.teacher, 4.0, regions, valid)
    squared, distance = slow_prototype_distances(
        plain.features, plain.teacher_features, labels, valid[0] if ignore else None
    )
    there = AVAILABLE.numpy()
    distance = distance * there
    preference = there * (distance / (distance.sum(1, keepdims=True) / there.sum(1, keepdims=True)) - 1)
    switch = preference.sum(0) > 0
    beta, count = (weights.double().numpy() for weights in BALANCE)
    assert found.distance.numpy() == pytest.approx(distance, rel=1e-9)
    assert found.switch.tolist() == switch.tolist()
    assert 0 < switch.sum() < M
    assert found.distillation.item() == pytest.approx((beta * count * divergence * there).sum() / 2, rel=1e-9)
    assert found.prototype.item() == pytest.approx((switch * count * squared * there).sum() / 2, rel=1e-9)


@pytest.mark.parametrize("regions", [True, False])
def test_who_gets_a_gradient(regions: bool) -> None:
    """Absent modalities exactly none, the teacher none, the students of present ones some."""
    case = single(regions)
    found = terms_of(case, labels_of(2, *SHAPE, classes=K), regions=regions)
    (found.distillation + found.prototype).backward()
    for tensor in (*case.students[:-1], case.features):
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[~AVAILABLE].any()
    assert case.students[0].grad.flatten(2).abs().amax(2)[AVAILABLE].min() > 0
    assert case.students[-1].grad is None, "nnU-Net does not train the lowest head"
    assert all(tensor.grad is None for tensor in (*case.teacher, case.teacher_features))
    on = found.switch.bool()[None] & AVAILABLE
    assert torch.equal(case.features.grad.flatten(2).abs().amax(2) > 0, on)


def test_gradient_is_that_of_finite_differences() -> None:
    case = single(scales=1, dtype=torch.float64)
    labels = labels_of(2, *SHAPE, classes=K)
    switch = terms_of(case, labels).switch

    def objective(students: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        found = terms_of(case._replace(students=[students], features=features), labels)
        assert torch.equal(found.switch, switch)
        return found.distillation + found.prototype

    assert torch.autograd.gradcheck(objective, (case.students[0], case.features), fast_mode=True)


def test_two_samples_equal_the_mean_of_two_batches() -> None:
    """Different availability; the switch belongs to the batch, so the prototype term is compared per sample."""
    case, labels = single(), labels_of(2, *SHAPE, classes=K)
    both = terms_of(case, labels)
    alone = []
    for b in (0, 1):
        s = slice(b, b + 1)
        one = SingleModalities(
            [x[s] for x in case.students], case.features[s], [x[s] for x in case.teacher], case.teacher_features[s]
        )
        alone.append(terms_of(one, labels[s], AVAILABLE[s]))
    assert both.distillation.item() == pytest.approx(sum(a.distillation for a in alone).item() / 2, rel=1e-6)
    assert torch.allclose(both.distance, torch.cat([a.distance for a in alone]))
    assert both.distance[1, 1] == 0


def test_a_student_that_equals_its_teacher_costs_nothing() -> None:
    case = single()
    same = case.teacher_features[:, None].repeat(1, M, 1, 1, 1, 1)
    case = SingleModalities(
        [x[:, None].repeat(1, M, *[1] * (x.ndim - 1)) for x in case.teacher], same, case.teacher, case.teacher_features
    )
    found = terms_of(case, labels_of(2, *SHAPE, classes=K))
    assert abs(found.distillation.item()) < 1e-4
    assert found.prototype.item() == 0
    assert not found.distance.any()
    assert not found.switch.any()


def test_relative_preference_by_hand() -> None:
    distance = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.2], [0.7, 0.0, 0.0], [0.0, 0.0, 0.0]])
    available = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0], [1, 1, 0]]).bool()
    expected = torch.tensor([[-0.5, 0.0, 0.5], [1 / 3, 0.0, -1 / 3], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(relative_preference(distance, available), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype: torch.dtype) -> None:
    case = single()
    case = SingleModalities(
        [(100 * x.detach()).to(dtype).requires_grad_() for x in case.students],
        (100 * case.features.detach()).to(dtype).requires_grad_(),
        [(100 * x).to(dtype) for x in case.teacher],
        (100 * case.teacher_features).to(dtype),
    )
    with torch.no_grad():
        case.features[0, 0] = 0  # no direction at all
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = terms_of(case, labels_of(2, *SHAPE, classes=K))
    (found.distillation + found.prototype).backward()
    assert found.distillation.dtype == torch.float32
    assert all(value.isfinite().all() for value in (*found, case.features.grad, case.students[0].grad))


def test_nothing_to_count_costs_nothing() -> None:
    case = single(scales=1)
    found = terms_of(case, labels_of(2, *SHAPE, classes=K), valid=[torch.zeros(2, *SHAPE).bool()])
    (found.distillation + found.prototype).backward()
    assert found.distillation.item() == found.prototype.item() == 0
    assert not found.distance.any()


# --- inside the total loss --------------------------------------------------------------------------------------------
class Step:
    """One training step with everything on, MGML's terms included."""

    def __init__(
        self,
        changes: dict[str, Any] | None = None,
        regions: bool = True,
        ignore: bool = False,
        batch_dice: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.config = Options().updated(
            {"rebalancing": "passion", "mask_ratio": 0.0, "complete_view_weight": 0.0, **(changes or {})}
        )
        self.single = single(regions, scales=2)
        self.modality = randn(2, M, K, *SHAPE, seed=3).requires_grad_()
        self.labels = labels_of(2, *SHAPE, classes=K + ignore)
        coarse = self.labels[:, ::2, ::2, ::2]
        self.target = [
            torch.stack([(x >= k) & (x < K) for k in range(1, K)] + [x == K] * ignore, 1) if regions else x[:, None]
            for x in (self.labels, coarse)
        ]
        self.valid = self.labels < K if ignore else None
        heads = K - 1 if regions else K
        self.output = TrainingOutput(
            [randn(2, heads, *x.shape[1:], seed=s) for s, x in enumerate((self.labels, coarse))],
            [],
            torch.zeros(()),
            self.modality,
            [randn(2, heads, *x.shape[1:], seed=9) for x in (self.labels, coarse)],
            self.single,
        )
        stock = DeepSupervisionWrapper(nnunet_loss(regions, K if ignore else None), [1.0, 0.0])
        self.loss = objective_of(
            self.config,
            M,
            K,
            regions=regions,
            segmentation_loss=stock,
            ignore_label=K if ignore else None,
            batch_dice=batch_dice,
        )

    @property
    def balance(self) -> ModalityBalance:
        return self.loss.terms["rebalancing"].balance

    def run(self, ramp: float = 1.0, balance: Balance | None = BALANCE) -> ObjectiveValue:
        if balance is not None and "rebalancing" in self.loss.terms:
            self.balance.beta, self.balance.count_weights = balance.beta.double(), balance.count.double()
        visible = torch.tensor([[True, False, False], [False, False, True]])
        return self.loss(self.output, self.target, View(visible, AVAILABLE), ramp)


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("ramp", [0.0, 0.5, 1.0])
def test_total_is_the_published_sum(regions: bool, ignore: bool, ramp: float) -> None:
    step = Step({"modality_decoder_weight": 0.7}, regions, ignore)
    total, parts, *_ = step.run(ramp)
    expected = (
        parts["segmentation"]
        + 0.7 * parts["modality"]
        + parts["fusion"]
        + parts["meta"]
        + ramp
        * (
            0.5 * parts["soft_label"]
            + 0.03 * parts["consistency"]
            + 0.125 * parts["distillation"]
            + 0.1 * parts["prototype"]
        )
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    labels = torch.where(step.labels < K, step.labels, 0)
    own = terms_of(
        step.single,
        labels,
        regions=regions,
        valid=None if step.valid is None else [step.valid, step.valid[:, ::2, ::2, ::2]],
    )
    assert torch.allclose(step.balance._sums[0], own.distance.sum(0))
    assert parts["distillation"].item() == pytest.approx(own.distillation.item())
    # r_m beta_m w_m sep_m; in the warm-up the switch is open for all
    weights = (1 + ramp * (own.switch - 1)) * BALANCE.beta * BALANCE.count
    separate = 0.0
    for b, m in np.argwhere(AVAILABLE.numpy()):
        value = modality_segmentation_loss(
            step.modality[b : b + 1, m : m + 1],
            labels[b : b + 1],
            None if step.valid is None else step.valid[b : b + 1],
            torch.ones(1, 1).bool(),
        )
        separate += float(weights[m] * value.detach()) / 2
    assert parts["modality"].item() == pytest.approx(separate, rel=1e-4)


def test_absent_modalities_learn_nothing_and_every_input_takes_part() -> None:
    step = Step()
    step.run(ramp=0.0).total.backward()
    assert step.single.features.grad is not None, "DDP: the graph must not depend on the schedule"
    step.run().total.backward()
    for tensor in (step.single.students[0], step.single.features, step.modality):
        assert tensor.grad.isfinite().all()
        assert not tensor.grad[~AVAILABLE].any()


def test_off_is_what_it_was() -> None:
    """The same numbers with and without the students' output, and no new entry in the log."""
    step = Step({"rebalancing": "none"})
    without = step.loss(step.output._replace(single=None), step.target, View(AVAILABLE))
    found = step.run()
    assert set(found.parts | found.noted) == {
        "segmentation",
        "modality",
        "fusion",
        "soft_label",
        "consistency",
        "meta",
        "t1",
        "t2",
        "w_f",
        "beta",
        "alpha",
    }
    assert torch.equal(found.parts["modality"], without.parts["modality"])


def test_without_knowledge_all_modalities_weigh_the_same() -> None:
    even = Step().run(balance=Balance.even(M, torch.device("cpu")))
    assert torch.equal(Step().run(balance=None).total, even.total)


def test_works_without_mgml_and_without_the_shared_decoder() -> None:
    step = Step({"soft_label": "none", "consistency_weight": 0.0, "modality_decoder_weight": 0.0})
    step.output = step.output._replace(modality=None)
    assert set(step.run().parts) == {"segmentation", "fusion", "distillation", "prototype"}


def test_batch_dice_keeps_absent_modalities_out() -> None:
    step = Step(batch_dice=True)
    step.run().total.backward()
    assert not step.modality.grad[~AVAILABLE].any()
    assert step.modality.grad.isfinite().all()


def test_missing_output_and_readings_are_refused() -> None:
    step = Step()
    step.output = step.output._replace(single=None)
    with pytest.raises(ValueError, match=r"returned no single\. Call it with the needs"):
        step.run()
    with pytest.raises(ValueError, match=r"rebalancing=passion needs reading=ours; got reading=paper"):
        Options().updated({"rebalancing": "passion", "reading": "paper"})


def test_compiles_without_graph_breaks() -> None:
    case, labels = single(), labels_of(2, *SHAPE, classes=K)
    compiled = torch.compile(terms_of, backend="aot_eager", fullgraph=True)
    for available in (AVAILABLE, AVAILABLE.flip(0)):
        for a, b in zip(compiled(case, labels, available), terms_of(case, labels, available), strict=True):
            torch.testing.assert_close(a, b)
