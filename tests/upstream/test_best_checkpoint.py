"""The moving average by which the best checkpoint is chosen, and what a resumed training knows of it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_trainer, write_dataset
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunetv2_mgml.training import nnUNetTrainerMGML, nnUNetTrainerModalityDropout
from nnunetv2_mgml.upstream.best_checkpoint import best_average, keep_average_finite

OPTIONS = {"num_epochs": 8, "num_iterations_per_epoch": 1, "save_every": 1, "fusion": "mean"}


def run_epoch(trainer: Any, dice: float | None) -> None:
    """Let an epoch of one step have this Dice of every region; None: nothing there, and nothing predicted."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    hits, errors = (0.0, 0.0) if dice is None else (dice, 1 - dice)
    counts = {name: np.full(3, value) for name, value in (("tp_hard", hits), ("fp_hard", errors), ("fn_hard", errors))}
    trainer.on_validation_epoch_end([{"loss": np.float32(0), **counts}])
    trainer.on_epoch_end()


def best_epoch(trainer: Any) -> int:
    content = torch.load(Path(trainer.output_folder) / "checkpoint_best.pth", weights_only=False)
    return int(content["current_epoch"]) - 1


@pytest.mark.parametrize("kind", [nnUNetTrainerMGML, nnUNetTrainerModalityDropout])
def test_a_resumed_training_does_not_replace_the_best_by_a_worse_epoch(
    kind: type, nnunet_folders: Path, tmp_path: Path
) -> None:
    """nnU-Net writes the latest checkpoint before it looks at that epoch."""
    plans_dict = write_dataset(nnunet_folders)
    first = make_trainer(kind, plans_dict, OPTIONS)
    first.on_train_start()
    run_epoch(first, 0.5)
    run_epoch(first, 0.9)
    latest = shutil.copy(Path(first.output_folder) / "checkpoint_latest.pth", tmp_path / "latest.pth")
    assert torch.load(latest, weights_only=False)["_best_ema"] == pytest.approx(0.5), "nnU-Net's order has changed"
    second = make_trainer(kind, plans_dict, OPTIONS, resume=True)
    second.load_checkpoint(str(latest))
    assert second._best_ema == pytest.approx(0.54)
    second.on_train_start()
    run_epoch(second, 0.4)
    assert best_epoch(second) == 1
    run_epoch(second, 0.95)
    assert best_epoch(second) == 3


@pytest.mark.parametrize("empty", [0, 1])
def test_an_epoch_with_nothing_in_it_does_not_end_the_search(nnunet_folders: Path, empty: int) -> None:
    """Its patches may all be of background, and nothing predicted: there is no Dice of that."""
    trainer = make_trainer(nnUNetTrainerMGML, write_dataset(nnunet_folders), OPTIONS)
    trainer.on_train_start()
    for epoch in range(4):
        run_epoch(trainer, None if epoch == empty else 0.3 + 0.2 * epoch)
    averages = trainer.logger.get_value("ema_fg_dice", None)
    assert np.isfinite(averages).all()
    assert averages[empty] == (averages[0] if empty else 0)
    assert best_epoch(trainer) == 3
    assert all(math.isnan(value) for value in trainer.logger.get_value("dice_per_class_or_region", None)[empty])


def test_what_loggers_know() -> None:
    logger = LocalLogger()
    assert best_average(logger, None) is None
    for epoch, value in enumerate((0.2, 0.6, float("nan"))):
        logger.log("ema_fg_dice", value, epoch)
    assert best_average(logger, None) == 0.6
    assert best_average(logger, 0.7) == 0.7
    assert best_average(logger, float("nan")) == 0.6
    logger.log("mean_fg_dice", float("nan"), 0)
    keep_average_finite(logger, 1)
    assert logger.get_value("ema_fg_dice", None)[1] == 0.6
