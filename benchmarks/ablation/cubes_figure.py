"""Figure of the trainings on the cubes: Dice against training time, and one model beside one for each subset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cubes_specialists import ONE_MODEL, specialists
from cubes_table import seconds_per_step
from cubes_variants import CHANNELS
from matplotlib.axes import Axes

from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.presentation.figures.style import BLACK, CYCLE, MARKERS, new_figure, save, styled

Result = dict[str, Any]


@styled
def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the runs of one budget of equal time to a file: of the variants with the most seeds, as they are."""
    variants = list(dict.fromkeys(r["variant"] for r in results if ":" not in r["variant"]))
    runs = {variant: [r for r in results if r["variant"] == variant] for variant in variants}
    most = max((len(chosen) for chosen in runs.values()), default=0)
    runs = {variant: chosen for variant, chosen in runs.items() if len(chosen) == most}
    styles = dict(zip(runs, zip(CYCLE, MARKERS, strict=True), strict=False))
    drawing = new_figure(9.5, 4.4)
    left, right = drawing.subplots(1, 2, width_ratios=(1, 1))
    _over_time(left, runs, styles)
    _per_subset(right, runs, results, styles)
    handles, labels = right.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
    save(drawing, path)


def _over_time(axes: Axes, runs: dict[str, list[Result]], styles: dict[str, tuple[str, str]]) -> None:
    """Mean over the seeds, and each seed thinly; time as the table of seconds per step has it."""
    for variant, chosen in runs.items():
        colour, marker = styles[variant]
        minutes = [[point["step"] * seconds_per_step(r) / 60 for point in r["curve"]] for r in chosen]
        dice = [[point["mean"] for point in r["curve"]] for r in chosen]
        for one, values in zip(minutes, dice, strict=True) if len(chosen) > 1 else ():
            axes.plot(one, values, color=colour, linewidth=0.5)
        if len({len(values) for values in dice}) == 1:
            axes.plot(np.mean(minutes, 0), np.mean(dice, 0), marker=marker, color=colour)
    axes.set_xlabel("training time on one idle core, minutes")
    axes.set_ylabel("Dice of 15 subsets and three regions, %")
    axes.set_title("validation patients, while training")
    axes.grid(axis="y", alpha=0.3)


def _per_subset(
    axes: Axes, runs: dict[str, list[Result]], results: Sequence[Result], styles: dict[str, tuple[str, str]]
) -> None:
    names = [subset_name(subset, CHANNELS) for subset in all_subsets(len(CHANNELS))]
    for variant, chosen in runs.items():
        colour, marker = styles[variant]
        values = [np.mean([r["test"]["subsets"][name] for r in chosen]) for name in names]
        axes.plot(values, range(len(names)), marker, color=colour, label=variant)
    for network in ONE_MODEL:
        alone = specialists(results, network)
        values = [np.mean([r["test"]["mean"] for r in own]) for own in alone.values()]
        label = f"{network}, one model for each subset"
        if alone:
            axes.plot(values, [names.index(name) for name in alone], "|", color=BLACK, markersize=12, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("Dice of three regions, %")
    axes.set_title("test patients, at the end, by what is visible")
    axes.grid(axis="x", alpha=0.3)
