"""The option ``reading``: our form of the terms, the paper's text taken literally, or what its code does."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.objective.base import OURS, register_options
from nnunetv2_mgml.plans.options import OptionGroup, Options, option

_ALLOWED = {
    "soft_label": ("meta_amf", "fixed", "none"),
    "teaching": ("everywhere",),
    "rebalancing": ("none",),
}
"""What the published readings have of options with choices of ours."""
_OF_THE_CODE = ("criterion", "mask_mode")
"""Options whose value ``published`` only the published code's reading has."""


@register_options
@dataclass(frozen=True)
class ReadingOptions(OptionGroup):
    """Which form of the terms is computed."""

    reading: str = option(
        OURS,
        "ours; paper: the text taken literally; reference: what the published code does. "
        "The last two are for reproduction, without soft_label=mean, teaching=better and "
        "rebalancing",
        choices=(OURS, "paper", "reference"),
    )
    criterion: str = option(
        "nnunet",
        "losses of all predictions of labels. nnunet: its own; published, with reading=reference: the weighted "
        "cross-entropy and Dice of the published code, of fused labels at full resolution alone (regions keep "
        "nnU-Net's loss), as a sum over modalities and over the fusion design's heads, those brought to full size",
        choices=("nnunet", "published"),
    )

    def check(self, options: Options) -> None:
        """Refuse, in a published reading, what was not published."""
        for name, allowed in _ALLOWED.items() if self.reading != OURS else ():
            if options.value(name) not in allowed:
                raise ValueError(
                    f"{name}={options.value(name)} needs reading=ours; got reading={self.reading}, which "
                    f"allows {name}={' or '.join(allowed)}."
                )
        every = options.value("complete_every")
        if self.reading == "reference" and every not in (None, 1):
            raise ValueError(
                f"complete_every is {every}, but reading=reference teaches all that a case has in every step. Set it "
                "to 1 or null."
            )
        for name in _OF_THE_CODE if self.reading != "reference" else ():
            if options.value(name) == "published":
                raise ValueError(f"{name}=published needs reading=reference; got reading={self.reading}.")


def note_on_regions(options: Options, regions: bool) -> str:
    """Return what a user who learns regions should know of the published losses; empty where there is nothing.

    Args:
        options: of the training.
        regions: whether the labels are regions.
    """
    if not regions or options.objective[ReadingOptions].criterion != "published":
        return ""
    return (
        "criterion=published is of labels; the fused prediction of regions keeps nnU-Net's loss, so this is not the "
        "published total. For that convert with mgml convert brats --plain_labels"
    )
