"""Writes results/summary.json, docs/results.md and its figure from the result files.

python benchmarks/ablation/report.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import cubes_figure
import cubes_specialists
import cubes_table
import figure
import pages
from collect import Result, finished, select
from collect import statistics as statistics_of
from cubes_variants import BASELINE, DEFAULT
from settings import FOLDER, RESULTS, read_settings

from nnunetv2_mgml.io.files import write_json, write_text

DOCS = FOLDER.parents[1] / "docs"
REFERENCE = "region_aware"
"""The design beside which the stock network stands, as in the phantoms' table."""


def main() -> None:
    """Write everything."""
    settings = read_settings()
    results = finished(settings)
    write_json(RESULTS / "summary.json", summary(settings, results))
    write_text(DOCS / "results.md", pages.page(settings, results))
    figure.draw(results, DOCS / "images" / "results.png")
    if cubes := cubes_table.headline_budget()[1]:
        cubes_figure.draw(cubes, DOCS / "images" / "cubes.png")
    print(f"{len(results)} results; wrote {RESULTS / 'summary.json'} and {DOCS / 'results.md'}")


def summary(settings: dict[str, Any], results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return, per fusion design and variant, percent Dice on the held-out phantoms: mean, sd over seeds, regions.

    The key ``cubes`` has the same for the test patients of the cubes, at equal time; see `of_cubes`.
    """
    found = [r for r in results if r.run.group in ("main", "designs")]
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for design in dict.fromkeys(r.run.design for r in found):
        for variant in settings["variants"]:
            chosen = select(found, design=design, variant=variant)
            if chosen:
                entries.setdefault(design, {})[variant] = {
                    key: value if key == "seeds" else None if value != value else round(value, 2)
                    for key, value in statistics_of(chosen).items()
                }
    return {**entries, "cubes": of_cubes()}


def of_cubes() -> dict[str, Any]:
    """Return design -> variant -> figures on the test patients, of the largest budget of equal time there is.

    ``budget`` says what that is, and on which device; see `cubes_specialists.gap`. ``mgml`` is the plugin's default and
    ``baseline`` the same network without our terms, whatever the variants of the cubes are called (`_called`).
    """
    budget, chosen = cubes_table.headline_budget()
    if not chosen:
        return {}
    designs: dict[str, dict[str, Any]] = {}
    for result in chosen:
        variants = designs.setdefault(REFERENCE if result["design"] == "none" else result["design"], {})
        name = _called(result["variant"])
        if name not in variants and not result["training"]["only"]:
            variants[name] = _figures([r for r in chosen if r["variant"] == result["variant"]])
    return {**designs, "specialists_gap": cubes_specialists.gap(chosen), "budget": budget}


def _called(variant: str) -> str:
    """Return what a variant of the cubes is to a user of today's defaults."""
    names = {DEFAULT: "mgml", BASELINE: "baseline"}
    for name in ("mgml", "baseline"):
        each = f"{name}:network_form=multi_encoder,complete_every=1"
        names |= {f"{name}:conditional_norms=true": each, name: f"{each},conditional_norms=false"}
    return names.get(variant, variant)


def _figures(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    told = cubes_table.summary(results, "test")
    regions = {name: round(value, 2) for name, value in told["regions"].items()}
    return {
        "mean": round(told["mean"], 2),
        "sd": None if told["sd"] is None else round(told["sd"], 2),
        "seeds": told["seeds"],
        **regions,
        "inversions": None if told["inversions"] is None else round(told["inversions"], 2),
        "by_count": {count: round(value, 2) for count, value in told["by_count"].items()},
    }


if __name__ == "__main__":
    main()
