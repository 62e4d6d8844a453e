"""One fixed subset of modalities per training case, drawn by rates: PASSION's protocol of imbalanced missing data."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Mapping, Sequence

from nnunetv2_mgml.dataset_conversion.discovery import Case
from nnunetv2_mgml.modalities import BRATS_CHANNELS, canonical_name


def parse_rates(assignments: Sequence[str]) -> dict[str, float]:
    """Parse ``["t1=0.2", "flair=0.6"]`` to rates by canonical modality name; what is not named is never missing.

    Raises:
        ValueError: not of this form, another modality, one named twice, or a rate outside [0, 1).
    """
    rates: dict[str, float] = {}
    for entry in assignments:
        name, separator, text = entry.partition("=")
        modality = canonical_name(name)
        try:
            rate = float(text)
        except ValueError:
            rate = -1.0
        if not separator or modality not in BRATS_CHANNELS or modality in rates or not 0 <= rate < 1:
            raise ValueError(
                f"Bad missing rate '{entry}': give each modality ({', '.join(BRATS_CHANNELS)}) at most once, with a "
                f"number in [0, 1), such as t1=0.2."
            )
        rates[modality] = rate
    return rates


def draw_missing(cases: Collection[str], rates: Mapping[str, float], seed: int) -> dict[str, tuple[str, ...]]:
    """Draw what each case lacks: every modality by its own rate, drawn again where nothing would be left.

    A case's subset depends on its name, the rates and the seed alone, not on the other cases.

    Args:
        cases: case names.
        rates: canonical modality name -> chance to be missing, in [0, 1).
        seed: another seed gives other subsets.

    Returns:
        Case -> missing modalities in channel order; cases that lack none are not in it.
    """
    drawn: dict[str, tuple[str, ...]] = {}
    for case in sorted(cases):
        generator = random.Random(f"{seed}:{case}")
        missing: tuple[str, ...] = BRATS_CHANNELS
        while len(missing) == len(BRATS_CHANNELS):
            missing = tuple(name for name in BRATS_CHANNELS if generator.random() < rates.get(name, 0.0))
        if missing:
            drawn[case] = missing
    return drawn


def without_missing(case: Case, missing: Mapping[str, Sequence[str]]) -> Case:
    """Return the case without the files of the modalities it is to lack."""
    left = {name: file for name, file in case.images.items() if name not in missing.get(case.name, ())}
    return dataclasses.replace(case, images=left)
