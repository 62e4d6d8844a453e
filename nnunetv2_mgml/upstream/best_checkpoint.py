"""By what nnU-Net chooses the best checkpoint: a moving average of pseudo Dice, and the highest it has been.

Bends: the logger of ``nnUNetTrainer``, to which an epoch's mean is told once more, and its ``_best_ema``.
Why: an epoch in whose validation patches nothing was, and nothing predicted, has no mean Dice. NaN stays in the moving
    average, and no later epoch is better than NaN. And ``checkpoint_latest.pth`` is written before its own epoch has
    been looked at, so that after ``--c`` a worse epoch would take the place of the best.
Guarded by: tests/upstream/test_best_checkpoint.py
"""

from __future__ import annotations

from typing import Any

import numpy as np


def keep_average_finite(logger: Any, epoch: int) -> None:
    """Let an epoch without a mean Dice leave the moving average as it was; 0 where it is the first.

    Args:
        logger: of a trainer, when it has logged the epoch's validation.
        epoch: its number.
    """
    averages = logger.get_value("ema_fg_dice", None)
    if np.isfinite(averages[epoch]):
        return
    before = float(averages[epoch - 1]) if epoch else 0.0
    logger.log("mean_fg_dice", before, epoch)  # which logs the average too, from the one before it
    logger.log("ema_fg_dice", before, epoch)


def best_average(logger: Any, stored: float | None) -> float | None:
    """Return the highest moving average of all epochs that a logger knows; None before the first.

    Args:
        logger: of a trainer that has loaded a checkpoint.
        stored: what the checkpoint says itself.
    """
    known = [*logger.get_value("ema_fg_dice", None), *([] if stored is None else [stored])]
    return max((float(value) for value in known if np.isfinite(value)), default=None)
