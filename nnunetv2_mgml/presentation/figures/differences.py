"""Differences between methods with their intervals, one panel per region, one line per subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from nnunetv2_mgml.presentation.figures.style import BLACK, line_style, new_figure, styled


@styled
def difference_intervals(
    values: Mapping[str, npt.NDArray[Any]],
    rows: Sequence[str],
    regions: Sequence[str],
    baseline: str,
    metric: str = "Dice",
) -> Figure:
    """Draw the mean difference of methods from a baseline, with confidence intervals.

    Args:
        values: method -> ``(number of rows, number of regions, 3)``: difference, lower and upper bound, in the unit
            of ``metric``; NaN is left out.
        rows: what the rows are (subsets), from top to bottom.
        regions: titles of the panels.
        baseline: name of the method that is subtracted.
        metric: name and unit of the score.

    Raises:
        ValueError: an array of another shape.
    """
    shape = (len(rows), len(regions), 3)
    for method, array in values.items():
        if np.shape(array) != shape:
            raise ValueError(
                f"The differences of '{method}' have shape {np.shape(array)}, expected {shape}: rows, "
                f"regions, and difference with its bounds."
            )
    figure = new_figure(1.6 + 2.1 * len(regions), 0.24 * len(rows) * max(1.0, 0.7 * len(values)) + 1.3)
    panels = figure.subplots(1, len(regions), sharey=True, squeeze=False)[0]
    positions = np.arange(len(rows), dtype=float)
    for column, (axes, region) in enumerate(zip(panels, regions, strict=True)):
        for index, (method, array) in enumerate(values.items()):
            middle, low, high = np.asarray(array, dtype=float)[:, column].T
            shift = 0.6 * ((index + 0.5) / len(values) - 0.5)
            errors = np.nan_to_num(np.array([middle - low, high - middle]), nan=0.0).clip(min=0)
            axes.errorbar(
                middle,
                positions + shift,
                xerr=errors,
                linestyle="",
                markersize=4,
                elinewidth=1.2,
                label=method,
                **line_style(index),
            )
        axes.axvline(0, color=BLACK, linewidth=0.8)
        axes.set_title(region)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", color="#E3E3E3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(positions, list(rows))
    figure.suptitle(f"Difference in {metric}: method minus {baseline}", fontsize=10)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return figure
