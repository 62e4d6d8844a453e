"""`first_epoch`: when a training counts as begun, and what of nnU-Net that is read off."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from builders import make_trainer, write_dataset
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mgml.training import nnUNetTrainerMGML
from nnunetv2_mgml.upstream.first_epoch import noticed


def test_what_nnunet_does_is_what_is_bent() -> None:
    lines = [line.strip() for line in inspect.getsource(nnUNetTrainer.run_training).splitlines()]
    prepared, loop = lines.index("self.on_train_start()"), lines.index("self.on_epoch_start()")
    assert prepared < loop
    assert lines[loop - 1].startswith("for epoch in range(")
    source = inspect.getsource(run_training.run_training)
    order = ["get_trainer_from_args(", "maybe_load_checkpoint(", ".run_training()", ".perform_actual_validation("]
    assert sorted(order, key=source.rindex) == order


def test_a_training_begins_with_its_first_epoch(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = nnUNetTrainer.on_epoch_start, nnUNetTrainer.perform_actual_validation
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders))
    with noticed() as training:
        trainer.on_train_start()
        assert not training.begun
        trainer.on_epoch_start()
        assert training.begun
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, probabilities: None)
    with noticed() as training:
        nnUNetTrainer.perform_actual_validation(trainer, False)
        assert training.begun
    monkeypatch.undo()
    assert (nnUNetTrainer.on_epoch_start, nnUNetTrainer.perform_actual_validation) == stock
