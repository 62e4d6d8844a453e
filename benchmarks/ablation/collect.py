"""Reads result files and computes what tables and figures show; Dice in percent points throughout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from settings import Run, all_runs

from nnunetv2_mgml.scoring.regions import short_name
from nnunetv2_mgml.scoring.statistics import bootstrap_interval


@dataclass(frozen=True)
class Result:
    """One finished run."""

    run: Run
    content: dict[str, Any]

    @property
    def dice(self) -> np.ndarray:
        """Dice in percent, ``(regions, subsets, cases)``."""
        return 100 * np.array([list(subsets.values()) for subsets in self.content["dice"].values()])

    @property
    def of_old_design(self) -> bool:
        """Whether it was trained before its design changed: version 0.1 kept no ``fusion_revision``."""
        return self.run.design_changed and "fusion_revision" not in self.content["resolved"]["config"]

    @property
    def in_float32(self) -> bool:
        """Whether it was computed in float32: on a processor without bfloat16 instructions."""
        return self.content.get("precision", "bfloat16") == "float32"

    @property
    def regions(self) -> list[str]:
        """WT, TC, ET, in the order of `dice`."""
        return [short_name(region) for region in self.content["dice"]]

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets, in the order of `dice`."""
        return list(next(iter(self.content["dice"].values())))


def finished(settings: dict[str, Any]) -> list[Result]:
    """Return the results that belong to the settings as they are now; others are of older settings and left out."""
    return [Result(run, json.loads(run.file.read_text())) for run in all_runs(settings) if run.finished()]


def select(
    results: Sequence[Result], group: str | None = None, design: str | None = None, variant: str | None = None
) -> list[Result]:
    """Return the results of a group, design and variant; None: any."""
    return [
        r
        for r in results
        if group in (None, r.run.group) and design in (None, r.run.design) and variant in (None, r.run.variant)
    ]


def statistics(results: Sequence[Result]) -> dict[str, float]:
    """Return mean over subsets, regions and cases, its standard deviation over seeds, and the mean per region.

    Folds of a cross-validation are pooled before: every case counts once per seed.
    """
    per_seed = [
        np.concatenate([r.dice for r in results if r.run.seed == seed], axis=2)
        for seed in sorted({r.run.seed for r in results})
    ]
    means = [float(dice.mean()) for dice in per_seed]
    regions = np.mean([dice.mean((1, 2)) for dice in per_seed], axis=0)
    return {
        "mean": float(np.mean(means)),
        "sd": float(np.std(means, ddof=1)) if len(means) > 1 else float("nan"),
        "seeds": len(means),
        **dict(zip(results[0].regions, map(float, regions), strict=True)),
    }


@dataclass(frozen=True)
class Difference:
    """A variant minus its baseline, on the same seeds, folds and cases."""

    mean: float
    low: float
    """95 % bootstrap interval over cases."""
    high: float
    per_seed: tuple[float, ...]
    regions: dict[str, float]
    subsets: dict[str, float]


def _comparable(first: Result, second: Result) -> bool:
    """Whether both have the design in the same state; the stock network has none."""
    both = first.run.design_changed and second.run.design_changed
    return first.of_old_design == second.of_old_design or not both


def difference(baseline: Sequence[Result], variant: Sequence[Result]) -> Difference | None:
    """Return the paired difference over the runs both have, of one state of the design; None where there are none."""
    first = {(r.run.seed, r.run.fold): r for r in baseline}
    pairs = [(first[key], r) for r in variant if (key := (r.run.seed, r.run.fold)) in first]
    pairs = [(a, b) for a, b in pairs if _comparable(a, b)]
    if not pairs:
        return None
    seeds = sorted({b.run.seed for _, b in pairs})
    per_seed = [np.concatenate([b.dice - a.dice for a, b in pairs if b.run.seed == seed], axis=2) for seed in seeds]
    mean = np.mean(per_seed, axis=0)
    low, high = bootstrap_interval(mean.mean((0, 1)))
    example = pairs[0][1]
    return Difference(
        float(mean.mean()),
        low,
        high,
        tuple(float(d.mean()) for d in per_seed),
        dict(zip(example.regions, map(float, mean.mean((1, 2))), strict=True)),
        dict(zip(example.subsets, map(float, mean.mean((0, 2))), strict=True)),
    )
