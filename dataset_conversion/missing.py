"""One fixed subset of modalities per training case, drawn by rates: PASSION's protocol of imbalanced missing data."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence

from nnunetv2_mgml.modalities import BRATS_CHANNELS, canonical_name


def parse_rates(assignments: Sequence[str]) -> dict[str, float]:
    """Parse ``["t1=0.2", "flair=0.6"]`` to rates by canonical modality name; what is not named is never missing.

    Raises:
        ValueError: not of this form, another modality, one named twice, or a rate outside [0, 1).
    """
    return _checked((entry, *entry.partition("=")[::2]) for entry in assignments)


def check_rates(rates: Mapping[str, float]) -> dict[str, float]:
    """Return rates by canonical modality name.

    Raises:
        ValueError: another modality, one named twice, or a rate outside [0, 1).
    """
    return _checked((f"{name}={rate}", name, rate) for name, rate in rates.items())


def _checked(entries: Iterable[tuple[str, str, str | float]]) -> dict[str, float]:
    """Return rates by canonical name; the first of an entry is how it is called in a message."""
    rates: dict[str, float] = {}
    for entry, name, given in entries:
        modality = canonical_name(name)
        try:
            rate = float(given)
        except (ValueError, TypeError):
            rate = -1.0
        if modality not in BRATS_CHANNELS or modality in rates or not 0 <= rate < 1:
            raise ValueError(
                f"Bad missing rate '{entry}': give each modality ({', '.join(BRATS_CHANNELS)}) at most once, with a "
                f"number in [0, 1), such as t1=0.2."
            )
        rates[modality] = rate
    return rates


def draw_missing(
    cases: Collection[str],
    rates: Mapping[str, float],
    seed: int,
    available: Mapping[str, Collection[str]] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Draw what each case is to lack: every modality it has by its rate, drawn again where nothing would be left.

    A case's subset depends on its name, what it has, the rates and the seed alone, not on the other cases.

    Args:
        cases: case names.
        rates: canonical modality name -> chance to be missing, in [0, 1).
        seed: another seed gives other subsets.
        available: case -> canonical names of the modalities it has, one at least; cases that are not in it have all.

    Returns:
        Case -> missing modalities in channel order; cases from which none is taken are not in it.
    """
    drawn: dict[str, tuple[str, ...]] = {}
    for case in sorted(cases):
        generator = random.Random(f"{seed}:{case}")
        there = set((available or {}).get(case, BRATS_CHANNELS))
        missing: tuple[str, ...] = tuple(there)
        while len(missing) == len(there):
            drawn_for_all = [name for name in BRATS_CHANNELS if generator.random() < rates.get(name, 0.0)]
            missing = tuple(name for name in drawn_for_all if name in there)
        if missing:
            drawn[case] = missing
    return drawn
