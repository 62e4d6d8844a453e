"""Complete view."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class CompleteViewOptions(OptionGroup):
    """Of `CompleteView`."""

    complete_view_weight: float = option(
        1.0,
        "weight of nnU-Net's loss on the teacher's own prediction, from all modalities the case has. Not in the "
        "paper, whose teacher learns only when it is drawn as a student; 0: off. On phantoms it added 2.3 "
        "Dice points (docs/results.md)",
        low=0,
    )
