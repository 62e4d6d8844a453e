"""What a trainer tells its user before anything runs."""

from __future__ import annotations

from typing import Any

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.reading import note_on_regions
from nnunetv2_mgml.objective.terms.consistency import Consistency
from nnunetv2_mgml.plans.options import EXACT_REPETITION

_OF_THE_TEACHER = ("teacher_augmentation", "teacher_dropout")


def run_notes(
    trainer: str,
    planned: Options,
    fixed: dict[str, Any],
    workers: int,
    cascaded: bool = False,
    regions: bool = False,
) -> list[str]:
    """Return lines for the log.

    Args:
        trainer: class name.
        planned: the options in the plans.
        fixed: what the trainer fixes (``config_overrides``).
        workers: processes of data augmentation (``nnUNet_n_proc_DA``).
        cascaded: whether it reads the label map of a previous stage.
        regions: whether it learns regions.
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
    if cascaded and planned.sampling.mask_sampling != "fixed":
        notes.append(
            "WARNING: the previous stage's label maps come from all modalities a case has, also where this stage is "
            "shown fewer; predictions feed it what the previous stage makes of those fewer. It may rely on them too "
            "much, and the pseudo Dice of this training is too high. See docs/training.md, Cascades"
        )
    if note := note_on_regions(planned.overridden(fixed), regions):
        notes.append(f"WARNING: {note}")
    idle = [name for name in _OF_THE_TEACHER if planned.value(name)]
    if idle and not Consistency.active(planned.overridden(fixed)):
        notes.append(f"{', '.join(idle)}: of the consistency term, which is off, so without effect")
    return notes
