"""Networks trained on one subset of the modalities alone, beside one model for all of them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from cubes_variants import CHANNELS

from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.scoring.statistics import bootstrap_interval

ONE_MODEL = {"baseline": ("mgml", "baseline"), "modality_dropout": ("conditional_dropout", "modality_dropout")}
"""Variant whose network the specialists are -> the models for every subset that they are compared with."""
Result = dict[str, Any]


def of_subset(variant: str) -> tuple[str, str] | None:
    """Return variant and subset of a specialist with no other change; None of any other run."""
    found = re.fullmatch(r"(\w+):only=([\w+]+)", variant)
    return (found[1], found[2]) if found else None


def specialists(results: Sequence[Result], network: str) -> dict[str, list[Result]]:
    """Return the runs of a network's specialists by subset, in the order of the tables."""
    found: dict[str, list[Result]] = {}
    for subset in all_subsets(len(CHANNELS)):
        name = subset_name(subset, CHANNELS)
        runs = [r for r in results if of_subset(r["variant"]) == (network, name)]
        if runs:
            found[name] = runs
    return found


def gap(results: Sequence[Result]) -> dict[str, Any] | None:
    """Return how far specialists are ahead of the one model, in points of mean Dice; None without either.

    Args:
        results: of one budget; the first of `ONE_MODEL` of which both are there counts.

    Returns:
        ``model``, ``specialists``, ``mean`` over ``subsets``, by name, the mean over seeds of each.
    """
    for network, (model, *_) in ONE_MODEL.items():
        alone, one_model = specialists(results, network), [r for r in results if r["variant"] == model]
        if not alone or not one_model:
            continue
        gaps = {
            name: round(
                _mean(r["test"]["mean"] for r in runs) - _mean(r["test"]["subsets"][name] for r in one_model), 2
            )
            for name, runs in alone.items()
        }
        return {"model": model, "specialists": network, "mean": round(_mean(gaps.values()), 2), "subsets": gaps}
    return None


def table(results: Sequence[Result], summary: str, cases: str) -> str:
    """Return Markdown tables, one per network that has specialists; empty without any.

    Args:
        results: of one budget.
        summary: where a result has its means.
        cases: where it has Dice per patient.
    """
    parts = []
    for network, models in ONE_MODEL.items():
        alone = specialists(results, network)
        chosen = {m: runs for m in models if (runs := [r for r in results if r["variant"] == m and summary in r])}
        if not alone or not chosen:
            continue
        heads = [f"`{model}` | ahead of it | 95 % interval" for model in chosen]
        lines = [f"| `{network}` trained on | mean | seeds | {' | '.join(heads)} |"]
        lines.append("|---" * (3 + 3 * len(chosen)) + "|")
        for name, runs in alone.items():
            own = _of_patients(runs, name, cases)
            cells = [name, f"{own.mean():.1f}", str(len(runs))]
            for ours in chosen.values():
                theirs = _of_patients(ours, name, cases)
                cells += [f"{theirs.mean():.1f}", *_change(own - theirs)]
            lines.append(f"| {' | '.join(cells)} |")
        if len(alone) > 1:
            own_means = (_of_patients(runs, name, cases).mean() for name, runs in alone.items())
            cells = [f"mean of these {len(alone)}", f"{_mean(own_means):.1f}", ""]
            for ours in chosen.values():
                cells += [f"{_mean(_of_patients(ours, n, cases).mean() for n in alone):.1f}"]
                cells += _change(ahead(alone, ours, cases))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def ahead(alone: dict[str, list[Result]], ours: Sequence[Result], cases: str) -> np.ndarray:
    """Return how far specialists are ahead of one model, mean over their subsets, per patient in percent, ``(N,)``.

    Args:
        alone: what `specialists` returns.
        ours: the runs of the one model.
        cases: where a result has Dice per patient.
    """
    changes = [_of_patients(runs, name, cases) - _of_patients(ours, name, cases) for name, runs in alone.items()]
    mean: np.ndarray = np.mean(changes, axis=0)
    return mean


def _of_patients(runs: Sequence[Result], subset: str, cases: str) -> np.ndarray:
    """Return Dice in percent, mean over regions and seeds, ``(N,)``."""
    return 100 * np.mean([[subsets[subset] for subsets in run[cases].values()] for run in runs], axis=(0, 1))


def _change(per_patient: np.ndarray) -> list[str]:
    low, high = bootstrap_interval(per_patient)
    return [f"{per_patient.mean():+.2f}", f"{low:+.2f} to {high:+.2f}"]


def _mean(values: Any) -> float:
    return statistics.mean(map(float, values))
