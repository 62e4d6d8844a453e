"""Scores per modality subset: the subset x region heatmap, and the score against the number of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.presentation.figures.style import BLACK, GREY, SEQUENTIAL, line_style, new_figure, styled


@styled
def subset_heatmap(
    scores: npt.NDArray[Any],
    subsets: Sequence[Subset],
    channels: Sequence[str],
    regions: Sequence[str],
    metric: str = "Dice",
    *,
    reverse: bool = False,
    value_format: str = "{:.3f}",
) -> Figure:
    """Draw scores as a heatmap, one row per subset, with dots that say which modalities are present.

    Args:
        scores: mean score ``(number of subsets, number of regions)``; NaN cells are blank and say n/a.
        subsets: the rows, tuples of ``M`` bools in the order of ``channels``.
        channels: the ``M`` modality names, the columns of the dot matrix from left to right.
        regions: the columns of the heatmap.
        metric: name and unit of the score, written beside the colour bar.
        reverse: less is better (distances): the colour scale is turned round, so that bright always means good.
        value_format: how a cell's value is written.

    Raises:
        ValueError: the shape of ``scores`` does not match ``subsets`` and ``regions``.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.shape != (len(subsets), len(regions)):
        raise ValueError(
            f"scores have shape {scores.shape}, expected ({len(subsets)}, {len(regions)}): one row per "
            f"subset, one column per region."
        )
    dots_width, map_width = 0.42 * len(channels), 0.85 * len(regions)
    figure = new_figure(dots_width + map_width + 1.3, 0.27 * len(subsets) + 1.1)
    dots, heat = figure.subplots(1, 2, width_ratios=(dots_width, map_width))
    _draw_dots(dots, subsets, channels)
    colours = colormaps[SEQUENTIAL + ("_r" if reverse else "")].with_extremes(bad="white")
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    mesh = heat.imshow(
        scores,
        cmap=colours,
        aspect="auto",
        vmin=low,
        vmax=high if high > low else low + 1e-6,
    )
    for (row, column), value in np.ndenumerate(scores):
        if np.isfinite(value):
            shade = np.dot(mesh.cmap(mesh.norm(value))[:3], (0.299, 0.587, 0.114))
            heat.text(
                column,
                row,
                value_format.format(value),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shade < 0.5 else "black",
            )
        else:
            heat.text(column, row, "n/a", ha="center", va="center", fontsize=8, color=GREY)
    counts = [sum(subset) for subset in subsets]
    for row in range(1, len(subsets)):
        if counts[row] != counts[row - 1]:
            heat.axhline(row - 0.5, color="white", linewidth=2.5)
    heat.set_xticks(range(len(regions)), regions)
    heat.xaxis.tick_top()
    heat.set_yticks([])
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=heat, label=metric, pad=0.03, fraction=0.08).outline.set_visible(False)
    return figure


def _draw_dots(axes: Axes, subsets: Sequence[Subset], channels: Sequence[str]) -> None:
    present = np.array(subsets, dtype=bool).reshape(len(subsets), len(channels))
    for column in range(len(channels)):
        rows = np.arange(len(subsets))
        axes.scatter(
            [column] * len(rows),
            rows,
            s=34,
            edgecolors=GREY,
            linewidths=0.8,
            facecolors=[BLACK if on else "white" for on in present[:, column]],
        )
    axes.set_xlim(-0.6, len(channels) - 0.4)
    axes.set_ylim(len(subsets) - 0.5, -0.5)
    axes.set_xticks(range(len(channels)), list(channels), rotation=50, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


@styled
def score_by_count(
    scores: npt.NDArray[Any], subsets: Sequence[Subset], regions: Sequence[str], metric: str = "Dice"
) -> Figure:
    """Draw the score against the number of available modalities: mean line, and one faint point per subset.

    Args:
        scores: mean score ``(number of subsets, number of regions)``; NaN is left out.
        subsets: the rows of ``scores``, tuples of bools.
        regions: the columns of ``scores``, one line each.
        metric: label of the vertical axis.
    """
    scores = np.asarray(scores, dtype=float).reshape(len(subsets), len(regions))
    counts = np.array([sum(subset) for subset in subsets])
    sizes = np.unique(counts)
    figure = new_figure(5.4, 3.4)
    axes = figure.subplots()
    for column, region in enumerate(regions):
        style = line_style(column)
        shift = 0.07 * (column - (len(regions) - 1) / 2)
        axes.plot(
            counts + shift,
            scores[:, column],
            linestyle="",
            marker=style["marker"],
            color=style["color"],
            markersize=4,
            alpha=0.35,
            markeredgewidth=0,
            label="_nolegend_",
        )
        means = [_mean(scores[counts == size, column]) for size in sizes]
        axes.plot(sizes + shift, means, label=region, markeredgecolor="white", markersize=7, **style)
    axes.set_xticks(sizes)
    axes.set_xlabel("Number of available modalities")
    axes.set_ylabel(metric)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _mean(values: npt.NDArray[Any]) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")
