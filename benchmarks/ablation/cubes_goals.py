"""What the trainings on the cubes were to show, beside what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cubes_specialists
import cubes_table
import numpy as np
from collect import Difference
from cubes_variants import BASELINE, DEFAULT, SPECIALISTS

from nnunetv2_mgml.scoring.statistics import bootstrap_interval

BEST = "conditional_dropout"
"""The variant in whose column the goals stand as well: what one would train where time is short."""
RIVAL = "modality_dropout"
ON = "test"
Result = dict[str, Any]


class Measured(NamedTuple):
    """A figure in words, and whether it is what was asked for; None where that was not measured."""

    words: str
    met: bool | None


_NOTHING = Measured("not measured", None)


def table(results: Sequence[Result], brains: Mapping[str, Difference | None], half: Sequence[Result] = ()) -> str:
    """Return a Markdown table, a column for the default and one for the best variant.

    Args:
        results: of one budget of equal time, with scores of test patients.
        brains: variant -> its difference to the baseline on whole brains at equal time.
        half: runs of half that budget; without any of a variant, its curve tells when it was as good.
    """
    lines = [f"| goal | `{DEFAULT}` (the default) | met | `{BEST}` | met |", "|---" * 5 + "|"]
    for words, measure in _GOALS:
        known = {variant for variant in (DEFAULT, BEST) if _of(results, variant)}
        found = [measure(results, variant) if variant in known else _NOTHING for variant in (DEFAULT, BEST)]
        if measure is _time:
            found = [_half_time(results, half, v) or seen for v, seen in zip((DEFAULT, BEST), found, strict=True)]
        lines.append(_line(words, found))
    on_brains = [_on_brains(brains.get(variant)) for variant in (DEFAULT, BEST)]
    lines.append(_line("ahead of the baseline on whole brains, interval above 0", on_brains))
    return "\n".join(lines) + "\n"


def _line(goal: str, found: Sequence[Measured]) -> str:
    cells = [f"{measured.words} | {_verdict(measured)}" for measured in found]
    return f"| {' | '.join([goal, *cells])} |"


def _verdict(measured: Measured) -> str:
    if measured.met is None:
        return "-" if measured == _NOTHING else "open"
    return "yes" if measured.met else "**no**"


def _ahead(results: Sequence[Result], variant: str, other: str, least: float) -> Measured:
    found = cubes_table.difference(_of(results, other), _of(results, variant), ON)
    if found is None:
        return _NOTHING
    low, high = bootstrap_interval(found[0])
    mean = found[0].mean()
    return Measured(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", bool(mean >= least and low > 0))


def _time(results: Sequence[Result], variant: str) -> Measured:
    """Return between which shares of the baseline's time its final Dice on validation patients was reached.

    Between two points of the curve nobody looked.
    """
    pairs = _pairs(results, variant)
    if not pairs or any(not r["curve"] for pair in pairs for r in pair):
        return _NOTHING
    found = []
    for reference, own in pairs:
        goal = reference["curve"][-1]
        seconds = np.array([0, *(point["step"] * cubes_table.seconds_per_step(own) for point in own["curve"])])
        reached = np.flatnonzero([point["mean"] >= goal["mean"] for point in own["curve"]])
        if not len(reached):
            return Measured("never" if len(pairs) == 1 else "not in every seed", False)
        shares = seconds / (goal["step"] * cubes_table.seconds_per_step(reference))
        found.append(shares[[reached[0], reached[0] + 1]])
    early, late = np.mean(found, axis=0)
    met = True if late <= 0.5 else False if early >= 0.5 else None
    return Measured(f"after {early:.2f} to {late:.2f} of it", met)


def _half_time(results: Sequence[Result], half: Sequence[Result], variant: str) -> Measured | None:
    """Return the Dice on validation patients of trainings of half the time beside the baseline's; None without any."""
    whole = {r["seed"]: r for r in _of(results, BASELINE)}
    pairs = [(whole[r["seed"]], r) for r in _of(half, variant) if r["seed"] in whole]
    if not pairs:
        return None
    told = [f"{own['validation']['mean']:.1f} for {reference['validation']['mean']:.1f}" for reference, own in pairs]
    met = all(own["validation"]["mean"] >= reference["validation"]["mean"] for reference, own in pairs)
    return Measured(f"{', '.join(told)} in half of it", met)


def _worst(results: Sequence[Result], variant: str) -> Measured:
    """Return the smallest difference to the baseline of any region and any number of modalities."""
    pairs = _pairs(results, variant)
    if not pairs:
        return _NOTHING
    reference, own = (cubes_table.summary(runs, ON) for runs in zip(*pairs, strict=True))
    changes = {name: own["regions"][name] - value for name, value in reference["regions"].items()}
    for count, value in reference["by_count"].items():
        changes["with one modality" if count == "1" else f"with {count} modalities"] = own["by_count"][count] - value
    worst = min(changes, key=lambda name: changes[name])
    return Measured(f"{changes[worst]:+.2f} ({worst})", changes[worst] >= 0)


def _behind(results: Sequence[Result], variant: str) -> Measured:
    alone = cubes_specialists.specialists(results, SPECIALISTS)
    if not alone:
        return _NOTHING
    ahead = cubes_specialists.ahead(alone, _of(results, variant), cubes_table.KEYS[ON][1])
    low, high = bootstrap_interval(ahead)
    return Measured(f"{ahead.mean():.2f} ({low:.2f} to {high:.2f}), {len(alone)} of 15", bool(ahead.mean() <= 0.5))


def _inversions(results: Sequence[Result], variant: str) -> Measured:
    pairs = _pairs(results, variant)
    if not pairs:
        return _NOTHING
    reference, own = (cubes_table.summary(runs, ON)["inversions"] for runs in zip(*pairs, strict=True))
    return Measured(f"{own:.1f} for {reference:.1f} %", own < reference)


def _on_brains(change: Difference | None) -> Measured:
    if change is None:
        return _NOTHING
    return Measured(f"{change.mean:+.2f} ({change.low:+.2f} to {change.high:+.2f})", change.low > 0)


_GOALS: tuple[tuple[str, Callable[[Sequence[Result], str], Measured]], ...] = (
    ("at least 1.5 ahead of the baseline, interval above 0", lambda r, v: _ahead(r, v, BASELINE, 1.5)),
    ("at least 3 ahead of modality dropout, interval above 0", lambda r, v: _ahead(r, v, RIVAL, 3.0)),
    ("the baseline's final Dice in at most half of its time", _time),
    ("no region and no number of modalities behind the baseline", _worst),
    ("at most 0.5 behind the specialists", _behind),
    ("fewer inversions than the baseline", _inversions),
)


def _of(results: Sequence[Result], variant: str) -> list[Result]:
    return [r for r in results if r["variant"] == variant]


def _pairs(results: Sequence[Result], variant: str) -> list[tuple[Result, Result]]:
    """Return baseline and variant of every seed that both have."""
    by_seed = {r["seed"]: r for r in _of(results, BASELINE)}
    return [(by_seed[r["seed"]], r) for r in _of(results, variant) if r["seed"] in by_seed]
