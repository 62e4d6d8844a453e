"""Writes results/summary.json, docs/results.md and its figure from the result files.

python benchmarks/ablation/report.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import figure
import pages
from collect import Result, finished, select, statistics
from settings import FOLDER, RESULTS, read_settings

from nnunetv2_mgml.io.files import write_json, write_text

DOCS = FOLDER.parents[1] / "docs"


def main() -> None:
    """Write everything."""
    settings = read_settings()
    results = finished(settings)
    write_json(RESULTS / "summary.json", summary(settings, results))
    write_text(DOCS / "results.md", pages.page(settings, results))
    figure.draw(results, DOCS / "images" / "results.png")
    print(f"{len(results)} results; wrote {RESULTS / 'summary.json'} and {DOCS / 'results.md'}")


def summary(settings: dict[str, Any], results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return, per fusion design and variant, percent Dice on the held-out phantoms: mean, sd over seeds, regions."""
    found = [r for r in results if r.run.group in ("main", "designs")]
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for design in dict.fromkeys(r.run.design for r in found):
        for variant in settings["variants"]:
            chosen = select(found, design=design, variant=variant)
            if chosen:
                entries.setdefault(design, {})[variant] = {
                    key: value if key == "seeds" else None if value != value else round(value, 2)
                    for key, value in statistics(chosen).items()
                }
    return entries


if __name__ == "__main__":
    main()
