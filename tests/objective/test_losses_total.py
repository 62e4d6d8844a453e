from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import options_with
from loss_cases import bools, labels_of, meta_network_of, nnunet_loss, objective_of, randn
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnunetv2_mgml.network.interface import Needs, TrainingOutput, View
from nnunetv2_mgml.objective import ObjectiveValue
from nnunetv2_mgml.objective.segmentation import auxiliary_loss, modality_segmentation_loss

K, M, SHAPE = 4, 3, (6, 5, 4)
AVAILABLE = torch.tensor([[True, True, True], [True, False, True]])
MASK = torch.tensor([[True, False, False], [True, False, True]])


class Step:
    """One training step's inputs, every tensor a leaf whose gradient can be looked at."""

    def __init__(
        self,
        changes: dict[str, Any] | None = None,
        regions: bool = True,
        ignore: bool = False,
        deep: bool = False,
        seed: int = 0,
        shape: tuple[int, ...] = SHAPE,
        modalities: int = M,
        available: torch.Tensor = AVAILABLE,
        mask: torch.Tensor = MASK,
        stock: nn.Module | None = None,
    ) -> None:
        torch.manual_seed(seed)
        self.config = options_with(complete_view_weight=0.0).updated(changes or {})
        batch, heads = len(available), K - 1 if regions else K
        self.student = [
            randn(batch, heads, *(n // 2**s for n in shape), seed=s).requires_grad_() for s in range(2 if deep else 1)
        ]
        self.modality = randn(batch, modalities, K, *shape, seed=3).requires_grad_()
        self.teacher = randn(batch, heads, *shape, seed=4).requires_grad_()
        self.auxiliary = randn(batch, K, *(n // 2 for n in shape), seed=5).requires_grad_()
        self.fusion_loss = torch.tensor(0.25, requires_grad=True)
        self.mask, self.available = mask, available
        labels = labels_of(batch, *shape, classes=K + ignore)
        target = (
            torch.stack([(labels >= k) & (labels < K) for k in range(1, K)] + [labels == K] * ignore, 1)
            if regions
            else labels[:, None]
        )
        self.target = (
            [
                target,
                target[(slice(None),) * 2 + (slice(None, None, 2),) * len(shape)][
                    (slice(None),) * 2 + tuple(slice(n // 2) for n in shape)
                ],
            ]
            if deep
            else target
        )
        self.labels = torch.where(labels < K, labels, 0)
        self.valid = labels < K if ignore else None
        stock = stock or nnunet_loss(regions, K if ignore else None)
        self.loss = objective_of(
            self.config,
            modalities,
            K,
            regions=regions,
            segmentation_loss=DeepSupervisionWrapper(stock, [0.7, 0.3]) if deep else stock,
            ignore_label=K if ignore else None,
        )
        self.meta = meta_network_of(self.loss)

    @property
    def view(self) -> View:
        return View(self.mask, self.available)

    def output(self) -> TrainingOutput:
        complete = [self.teacher, *(randn(*other.shape, seed=7) for other in self.student[1:])]
        return TrainingOutput(self.student, [self.auxiliary], self.fusion_loss, self.modality, complete)

    def run(self, ramp: float = 1.0) -> ObjectiveValue:
        return self.loss(self.output(), self.target, self.view, ramp)

    def gradients(self, ramp: float = 1.0) -> dict[str, torch.Tensor | None]:
        self.run(ramp).total.backward()
        return {
            "student": self.student[0].grad,
            "modality": self.modality.grad,
            "teacher": self.teacher.grad,
            "auxiliary": self.auxiliary.grad,
            "meta": None if self.meta is None else torch.cat([p.grad.flatten() for p in self.meta.parameters()]),
        }


NO_SEGMENTATION = {"segmentation_weight": 0.0}


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("deep", [True, False])
def test_total_is_the_weighted_sum_of_its_parts(regions: bool, ignore: bool, deep: bool) -> None:
    step = Step(
        {
            "segmentation_weight": 1.5,
            "modality_decoder_weight": 0.7,
            "auxiliary_weight": 0.4,
            "soft_label_weight": 0.8,
            "consistency_weight": 0.03,
        },
        regions,
        ignore,
        deep,
    )
    found = step.run(ramp=0.5)
    total, parts = found.total, found.parts | found.noted
    expected = (
        1.5 * (parts["segmentation"] + 0.7 * parts["modality"] + 0.4 * (parts["auxiliary"] + parts["fusion"]))
        + 0.5 * (0.8 * parts["soft_label"] + 0.03 * parts["consistency"])
        + parts["meta"]
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not any(value.requires_grad for value in parts.values())
    assert all(value.ndim == 0 for value in parts.values())
    assert set(parts) == {
        "segmentation",
        "modality",
        "auxiliary",
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
    stock = step.loss.spec.segmentation_loss(step.student if deep else step.student[0], step.target)
    assert torch.equal(parts["segmentation"], stock)
    assert parts["modality"].item() == pytest.approx(
        modality_segmentation_loss(step.modality, step.labels, step.valid, step.available).item(), rel=1e-6
    )
    assert parts["auxiliary"].item() == pytest.approx(auxiliary_loss([step.auxiliary], step.labels, step.valid).item())


def test_teacher_never_gets_a_gradient() -> None:
    for reading in ("ours", "paper", "reference"):
        assert Step({"reading": reading}).gradients()["teacher"] is None


def test_soft_label_term_reaches_the_modality_logits_only() -> None:
    reached = Step({**NO_SEGMENTATION, "soft_label": "fixed", "consistency_weight": 0.0}).gradients()
    assert reached["modality"].abs().max() > 0
    assert not reached["student"].any()
    assert not reached["modality"][~AVAILABLE].any()


def test_meta_objective_ground_truth_reaches_the_meta_network_only() -> None:
    """With ramp 0 only L_meta is left: exactly nothing on the logits, something on every layer of the MetaNetwork."""
    step = Step(NO_SEGMENTATION)
    reached = step.gradients(ramp=0.0)
    assert not reached["modality"].any()
    assert not reached["student"].any()
    assert all(p.grad.abs().max() > 0 for p in step.meta.parameters())


def test_distillation_does_not_train_the_meta_network_unless_asked() -> None:
    weak, strong = (
        Step({**NO_SEGMENTATION, "soft_label_weight": weight}).gradients()["meta"] for weight in (0.1, 10.0)
    )
    assert torch.equal(weak, strong)
    asked = Step({**NO_SEGMENTATION, "meta_objective": "soft_label"}).gradients()
    assert asked["meta"].abs().max() > 0
    plain = Step(NO_SEGMENTATION).gradients()
    torch.testing.assert_close(asked["modality"], plain["modality"])


def test_consistency_term_reaches_the_student_only() -> None:
    reached = Step({**NO_SEGMENTATION, "soft_label": "none"}).gradients()
    assert reached["student"][0].abs().max() > 0
    assert not reached["student"][1].any(), "this student saw everything its case has"
    assert not reached["modality"].any()


@pytest.mark.parametrize("reading", ["ours", "paper", "reference"])
def test_every_parameter_takes_part_at_ramp_zero(reading: str) -> None:
    """DDP: the graph must not depend on the schedule or the data."""
    nobody_learns = Step({"reading": reading}, mask=AVAILABLE)
    nobody_learns.run(ramp=0.0).total.backward()
    leaves = [
        *nobody_learns.student,
        nobody_learns.modality,
        nobody_learns.auxiliary,
        nobody_learns.fusion_loss,
        *nobody_learns.meta.parameters(),
    ]
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_ignored_voxels_teach_nothing() -> None:
    step = Step(ignore=True)
    step.gradients()
    ignored = ~step.valid
    assert ignored.any()
    for gradient in (step.student[0].grad, step.modality.grad[:, 0]):
        assert not gradient.movedim(1, -1)[ignored].any()


def test_absent_modalities_get_exactly_no_gradient() -> None:
    assert not Step().gradients()["modality"][~AVAILABLE].any()


@pytest.mark.parametrize("soft_label", ["meta_amf", "fixed", "mean", "none"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6, 4)])
def test_all_soft_labels_in_two_and_three_dimensions(soft_label: str, shape: tuple[int, ...]) -> None:
    step = Step({"soft_label": soft_label}, shape=shape)
    terms = step.run()
    terms.total.backward()
    assert terms.total.isfinite()
    assert ("soft_label" in terms.parts) == (soft_label != "none")
    assert ("meta" in terms.parts) == (soft_label == "meta_amf")


@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_any_number_of_modalities(modalities: int) -> None:
    available = bools(2, modalities)
    terms = Step(modalities=modalities, available=available, mask=available).run()
    assert terms.total.isfinite()
    assert terms.parts["consistency"] == 0


def test_two_samples_equal_two_batches() -> None:
    """Acceptance 3, with equally many modalities per sample and no random mask."""
    step = Step({"mask_ratio": 0.0}, regions=False, available=torch.ones(2, M).bool(), mask=MASK)
    both = step.run().total
    single = []
    for b in (0, 1):
        s = slice(b, b + 1)
        output = TrainingOutput(
            [step.student[0][s]], [step.auxiliary[s]], step.fusion_loss, step.modality[s], [step.teacher[s]]
        )
        single.append(step.loss(output, step.target[s], View(step.mask[s], step.available[s])).total)
    assert both.item() == pytest.approx((sum(single) / 2).item(), rel=1e-5)


@pytest.mark.parametrize("reading", ["ours", "paper", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_autocast_is_finite(reading: str, dtype: torch.dtype) -> None:
    step = Step({"reading": reading}, regions=False)
    step.modality = randn(2, M, K, *SHAPE, scale=1).clamp(-1, 1).mul(1000).to(dtype).requires_grad_()
    step.student = [step.student[0].detach().mul(100).to(dtype).requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = step.run()
    terms.total.backward()
    assert all(value.isfinite() for value in terms.parts.values())
    assert step.modality.grad.isfinite().all()
    assert step.student[0].grad.isfinite().all()


def test_its_parameters_are_the_meta_networks_and_have_an_optimiser() -> None:
    step = Step()
    (optimizer,) = step.loss.optimizers
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in step.loss.parameters()} == {id(p) for p in step.meta.parameters()}
    assert not Step({"soft_label": "fixed"}).loss.optimizers


def test_meta_network_learns_the_ground_truth() -> None:
    """A modality that is right and others that are confidently wrong: the soft label's loss falls."""
    step = Step({"meta_lr": 1e-2}, regions=False)
    right = nn.functional.one_hot(step.labels, K).movedim(-1, 1).float()
    with torch.no_grad():
        step.modality.copy_(randn(2, M, K, *SHAPE, seed=9, scale=2))
        step.modality[:, 0] += 3 * right
    optimizer = torch.optim.Adam(step.meta.parameters(), 1e-2)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        terms = step.run()
        terms.total.backward()
        optimizer.step()
        history.append(terms.parts["meta"].item())
    assert history[-1] < history[0] - 0.01


@pytest.mark.parametrize("objective", ["ground_truth", "soft_label"])
def test_compiles_without_graph_breaks(objective: str) -> None:
    step = Step({"mask_ratio": 0.0, "meta_objective": objective}, stock=_MeanSquare())  # nnU-Net's is its business
    compiled = torch.compile(step.loss, backend="aot_eager", fullgraph=True)
    eager = step.run()
    traced = compiled(step.output(), step.target, step.view, 1.0)
    for name, value in eager.columns.items():
        torch.testing.assert_close(traced.columns[name], value, msg=name)
    expected = torch.autograd.grad(eager.total, [step.modality, *step.meta.parameters()])
    found = torch.autograd.grad(traced.total, [step.modality, *step.meta.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


class _MeanSquare(nn.Module):
    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - target.float()).square().mean()


def test_an_output_that_lacks_something_is_refused() -> None:
    step = Step()
    for missing, message in (
        ({"modality": None}, r"returned no modality\. Call it with the needs of the objective: .*modality=True"),
        ({"complete": None}, r"returned no complete\. .*complete='target'"),
        ({"modality": step.modality[:, :, 1:]}, rf"3 classes, the labels {K} .*num_classes={K}"),
    ):
        with pytest.raises(ValueError, match=message):
            step.loss(step.output()._replace(**missing), step.target, step.view)


def test_baseline_needs_neither_modalities_nor_teacher() -> None:
    step = Step({"soft_label": "none", "consistency_weight": 0.0, "modality_decoder_weight": 0.0})
    assert step.loss.needs == Needs()
    output = step.output()._replace(modality=None, complete=None, auxiliary=[])
    terms = step.loss(output, step.target, step.view)
    assert terms.total.item() == pytest.approx((terms.parts["segmentation"] + 0.25).item())
    assert set(terms.columns) == {"train_segmentation", "train_fusion"}


def test_works_with_a_meta_network_wrapped_for_ddp(tmp_path: Any) -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        plain, wrapped = Step({"mask_ratio": 0.0}), Step({"mask_ratio": 0.0})
        wrapped.loss.distribute(nn.parallel.DistributedDataParallel)
        assert isinstance(meta_network_of(wrapped.loss), nn.parallel.DistributedDataParallel)
        assert set(wrapped.loss.training_state()["meta_network"]) == set(wrapped.meta.state_dict())
        for _ in range(2):  # the second pass fails where the first left a parameter without gradient
            wrapped.run(ramp=0.0).total.backward()
        plain.run(ramp=0.0).total.backward()
        plain.run(ramp=0.0).total.backward()
        for a, b in zip(plain.meta.parameters(), wrapped.meta.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("deep", [True, False])
def test_complete_view_is_supervised_by_nnunets_loss(deep: bool) -> None:
    step = Step({"complete_view_weight": 0.5, "consistency_weight": 0.0}, deep=deep)
    complete = [randn(*student.shape, seed=9).requires_grad_() for student in step.student]
    assert step.loss.needs.complete == "learns"
    output = step.output()._replace(complete=complete)
    found = step.loss(output, step.target, step.view)
    stock = step.loss.spec.segmentation_loss(complete if deep else complete[0], step.target)
    assert torch.equal(found.parts["complete"], stock.detach())
    found.total.backward()
    (gradient,) = torch.autograd.grad(0.5 * stock, complete[:1])
    assert torch.allclose(complete[0].grad, gradient)
