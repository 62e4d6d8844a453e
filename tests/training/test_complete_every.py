"""``complete_every``: full steps, and steps between them of which what is hidden is no part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_trainer, options_with, write_dataset
from training_cases import synthetic_batch

from nnunetv2_mgml.network.interface import View
from nnunetv2_mgml.objective import Options, Progress
from nnunetv2_mgml.objective.objective import complete_every
from nnunetv2_mgml.objective.terms.consistency import Consistency
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
from nnunetv2_mgml.upstream.training_step import optimise

FORMS = ("multi_encoder", "shared_encoder", "early_fusion")
WITHOUT = {"complete_view_weight": 0.0, "consistency_weight": 0.0, "complete_every": 1}


@pytest.fixture
def written(nnunet_folders: Path) -> Any:
    return write_dataset(nnunet_folders)


def trainer_with(written: Any, **options: Any) -> Any:
    trainer = make_trainer(
        nnUNetTrainerMGML, written, {"seed": 1, "num_epochs": 4, "gradient_checkpointing": False, **options}
    )
    trainer.initialize()
    trainer.network.double()
    trainer.learner.objective.double()
    return trainer


def batch_of(trainer: Any) -> dict[str, Any]:
    batch = synthetic_batch(trainer)
    return {**batch, "data": batch["data"].double()}


def step(trainer: Any, batch: dict[str, Any], number: int) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, columns and gradients of a step after ``number`` others; ramped terms have their full weight."""
    trainer.network.zero_grad()
    progress = Progress(2, 4, number, 8)
    torch.manual_seed(7)
    loss, columns = trainer.learner.loss(batch, progress)
    loss.backward()
    return (
        loss.item(),
        {name: value.item() for name, value in columns.items()},
        [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.network.parameters()],
    )


@pytest.mark.parametrize("every", [1, 2, 3, None])
def test_the_first_step_of_an_epoch_and_every_nth_after_it_are_full(every: int | None, written: Any) -> None:
    objective = trainer_with(written, complete_every=every).learner.objective
    full = [objective.is_full(Progress(epoch, 4, number, 9)) for epoch in (0, 3) for number in range(9)]
    assert full == [number % (every or 4) == 0 for _ in (0, 3) for number in range(9)]


@pytest.mark.parametrize("form", FORMS)
def test_a_step_between_is_one_of_cases_that_have_what_is_visible(form: str, written: Any) -> None:
    """Its loss and gradients are those of a training without the terms that it leaves out, on such cases."""
    fusion = {"network_form": form, "fusion": "mean"}
    trainer = trainer_with(written, complete_every=2, **fusion)
    other = trainer_with(written, **WITHOUT, **fusion)
    other.network.load_state_dict(trainer.network.state_dict())
    other.learner.objective.load_state_dict(trainer.learner.objective.state_dict())
    batch = batch_of(trainer)
    loss, columns, gradients = step(trainer, batch, 1)
    visible = batch["visible"]
    lacking = {**batch, "available": visible, "data": torch.where(visible[..., None, None, None], batch["data"], 0)}
    wanted, wanted_columns, wanted_gradients = step(other, lacking, 0)
    assert loss == pytest.approx(wanted, rel=1e-12)
    assert columns == pytest.approx(wanted_columns, rel=1e-10)
    for one, two in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_hidden_counts_in_full_steps_only(form: str, written: Any) -> None:
    trainer = trainer_with(written, complete_every=2, network_form=form, fusion="mean")
    batch = batch_of(trainer)
    hidden = ~batch["visible"][..., None, None, None]
    other = {**batch, "data": torch.where(hidden, torch.nan, batch["data"])}
    assert step(trainer, batch, 1)[0] == step(trainer, other, 1)[0]
    larger = {**batch, "data": torch.where(hidden, 2.0, batch["data"])}
    assert step(trainer, batch, 2)[0] != step(trainer, larger, 2)[0]
    assert {"train_complete", "train_consistency"} <= set(step(trainer, batch, 2)[1])
    assert not {"train_complete", "train_consistency"} & set(step(trainer, batch, 3)[1])


@pytest.mark.parametrize("fusion", ["mean", "concat", "region_aware", "mmformer"])
def test_what_is_left_out_of_the_encoder_changes_nothing(fusion: str, written: Any) -> None:
    """On a CPU hidden modalities do not go through it; on a GPU, which would have to be asked, they do."""
    trainer = trainer_with(written, complete_every=2, network_form="shared_encoder", fusion=fusion)
    batch = batch_of(trainer)
    shown: list[int] = []
    trainer.network.encoders.register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    loss, columns, gradients = step(trainer, batch, 1)
    assert sum(shown) == int(batch["visible"].sum())
    shown.clear()
    trainer.learner.compiled = True  # as far as the learner knows
    wanted, wanted_columns, wanted_gradients = step(trainer, batch, 1)
    assert sum(shown) == batch["visible"].numel()
    assert loss == pytest.approx(wanted, rel=1e-12)
    assert columns == pytest.approx(wanted_columns, rel=1e-10)
    for one, two in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


def test_places_are_those_of_what_a_view_has() -> None:
    visible = torch.tensor([[True, False, True], [False, True, False]])
    assert View(visible).of_available().encoded.tolist() == [0, 2, 4]
    assert View(visible, torch.ones_like(visible)).of_available().encoded.tolist() == list(range(6))


def test_it_is_one_where_a_term_or_a_publication_needs_every_step() -> None:
    assert complete_every(Options()) == 4
    assert complete_every(options_with(rebalancing="passion")) == 1
    assert complete_every(options_with(reading="paper")) == 1
    assert complete_every(options_with(reading="paper", complete_every=3)) == 3
    with pytest.raises(ValueError, match=r"complete_every is 2, but rebalancing=passion needs all .* in every step"):
        options_with(rebalancing="passion", complete_every=2)
    assert complete_every(options_with(reading="reference", complete_every=1)) == 1
    with pytest.raises(ValueError, match="complete_every is 2, but reading=reference teaches all"):
        options_with(reading="reference", complete_every=2)


def test_a_term_of_another_package_can_need_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Consistency, "in_every_step", True)
    assert complete_every(Options()) == 1
    with pytest.raises(
        ValueError, match="complete_every is 3, but consistency needs all that a case has in every step"
    ):
        complete_every(options_with(complete_every=3))


def test_plans_and_models_of_before_have_full_steps_only() -> None:
    before = {"mgml": {"version": "0.2.0", "config": {"temperature": 4.0}}}
    assert complete_every(Options.from_plans(before)) == 1
    assert complete_every(Options.from_plans({})) == 4


def test_an_optimizer_whose_parameters_a_step_does_not_use_rests() -> None:
    """As that of a term of its own network in the steps between; a gradient scaler alone would refuse it."""
    used, unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizers = [torch.optim.Adam(module.parameters(), 0.1) for module in (used, unused)]
    before = [parameter.clone() for module in (used, unused) for parameter in module.parameters()]
    optimise(used(torch.ones(3, 2)).sum(), optimizers, used, torch.amp.GradScaler("cpu"))
    now = [*used.parameters(), *unused.parameters()]
    moved = [not torch.equal(one, two) for one, two in zip(before, now, strict=True)]
    assert moved == [True, True, False, False]


def test_a_training_logs_what_its_full_steps_are(written: Any) -> None:
    """Every epoch has one, its first, so that no row lacks a column."""
    trainer = make_trainer(
        nnUNetTrainerMGML, written, {"num_epochs": 2, "num_iterations_per_epoch": 3, "complete_every": 2}
    )
    trainer.run_training()
    rows = read_log(Path(trainer.output_folder) / LOG_NAME)
    assert len(rows) == 2
    assert all({"train_complete", "train_consistency", "train_total"} <= set(row) for row in rows)
