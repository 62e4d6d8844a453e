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
        fixed: what the trainer fixes on these plans (``config_overrides``).
        workers: processes of data augmentation (``nnUNet_n_proc_DA``).
        cascaded: whether it reads the label map of a previous stage.
        regions: whether it learns regions.
    """
    notes = []
    resolved = planned.overridden(fixed)
    dropped = planned.options_dropped_by(fixed)
    if dropped:
        notes.append(
            f"{trainer} has fusion {fixed['fusion']}: the plans' fusion_options {dropped} were set for "
            f"{planned.network.fusion} and are not used"
        )
    if changed := _changed(planned, resolved, {"fusion", "fusion_options"} if dropped else set()):
        notes.append(f"{trainer} fixes {', '.join(changed)}")
    if resolved.training.seed is not None and workers > 0:
        notes.append(f"seed={resolved.training.seed}: {EXACT_REPETITION} (now {workers} of them)")
    if cascaded and resolved.sampling.mask_sampling != "fixed":
        notes.append(
            "WARNING: the previous stage's label maps come from all modalities a case has, also where this stage is "
            "shown fewer; predictions feed it what the previous stage makes of those fewer. It may rely on them too "
            "much, and the pseudo Dice of this training is too high. See docs/training.md, Cascades"
        )
    if note := note_on_regions(resolved, regions):
        notes.append(f"WARNING: {note}")
    idle = [name for name in _OF_THE_TEACHER if resolved.value(name)]
    if idle and not Consistency.active(resolved):
        notes.append(f"{', '.join(idle)}: of the consistency term, which is off, so without effect")
    return notes


def _changed(planned: Options, resolved: Options, told: set[str]) -> list[str]:
    """Return an entry for each option that the plans set to another value than the default, and the trainer changes.

    Options of a fusion design that a trainer only adds to are not changed.

    Args:
        planned: those of the plans.
        resolved: those that are trained with.
        told: options of which another line tells.
    """
    default, changed = Options(), []
    for name in planned.names():
        then, now = planned.value(name), resolved.value(name)
        kept = then.items() <= now.items() if name == "fusion_options" else then == now
        if not kept and then != default.value(name) and name not in told:
            changed.append(f"{name}={now} (the plans have {then})")
    return changed
