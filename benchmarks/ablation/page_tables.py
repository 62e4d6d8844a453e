"""Tables of the results page: a row per variant, its difference to the baseline beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from collect import Difference, Result, difference, statistics

REGIONS = ("WT", "TC", "ET")
PAPER = {
    "baseline": (83.90, 73.97, 57.07),
    "consistency": (84.70, 75.79, 58.24),
    "meta_amf": (85.35, 76.67, 59.82),
    "fixed_soft_labels": (85.15, 76.28, 59.43),
    "mgml_paper_terms": (86.31, 77.08, 60.38),
}
"""WT, TC, ET of the paper's Tables 1 and 2 (mmFormer, BraTS2020)."""
CHANGE = ("difference", "95 % interval", "per seed")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, or a line saying that there is nothing yet."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return "No finished runs yet.\n"
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) + "\n"


def change_cells(change: Difference | None) -> list[str]:
    """Return difference, interval and values per seed."""
    if change is None:
        return ["-", "-", "-"]
    return [
        f"{change.mean:+.2f}",
        f"{change.low:+.2f} to {change.high:+.2f}",
        " ".join(f"{value:+.2f}" for value in change.per_seed),
    ]


def mark(results: Sequence[Result]) -> str:
    """Return the signs that belong behind figures of these results, after a space each; empty where there are none."""
    return " †" * any(r.of_old_design for r in results) + " ‡" * any(r.in_float32 for r in results)


def mean_cells(results: Sequence[Result]) -> list[str]:
    """Return mean with spread, marked where a design was another one, the regions, and the number of seeds."""
    values = statistics(results)
    spread = f" ± {values['sd']:.2f}" if values["seeds"] > 2 else ""  # of two values it says next to nothing
    return [
        f"{values['mean']:.2f}{spread}{mark(results)}",
        *(f"{values[region]:.2f}" for region in REGIONS),
        str(values["seeds"]),
    ]


def variant_rows(
    results: Sequence[Result], baseline: Sequence[Result], variants: Iterable[str], paper: bool = False
) -> Iterable[list[str]]:
    for variant in variants:
        chosen = [r for r in results if r.run.variant == variant]
        if chosen:
            change = difference(baseline, chosen) if variant != "baseline" else None
            cells = [f"`{variant}`", *mean_cells(chosen), *change_cells(change)]
            yield [*cells, *([f"{np.mean(PAPER[variant]):.2f}" if variant in PAPER else "-"] if paper else [])]
