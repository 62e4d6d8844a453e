"""What a trainer tells its user before anything runs."""

from __future__ import annotations

from typing import Any

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import EXACT_REPETITION


def run_notes(trainer: str, planned: Options, fixed: dict[str, Any], workers: int) -> list[str]:
    """Return lines for the log.

    Args:
        trainer: class name.
        planned: the options in the plans.
        fixed: what the trainer fixes (``config_overrides``).
        workers: processes of data augmentation (``nnUNet_n_proc_DA``).
    """
    notes = []
    dropped = planned.options_dropped_by(fixed)
    if dropped:
        notes.append(
            f"{trainer} has fusion {fixed['fusion']}: the plans' fusion_options {dropped} were set for "
            f"{planned.network.fusion} and are not used"
        )
    if planned.training.seed is not None and workers > 0:
        notes.append(f"seed={planned.training.seed}: {EXACT_REPETITION} (now {workers} of them)")
    return notes
