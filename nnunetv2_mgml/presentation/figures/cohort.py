"""One page on a data set: which sequences and combinations there are, intensities, volumes, findings."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.presentation.figures.style import BLACK, CYCLE, GREY, new_figure, styled

_MOST_COMBINATIONS = 16
_MOST_FINDINGS = 12


@styled
def cohort_page(
    title: str,
    channels: Sequence[str],
    subsets: Sequence[Subset],
    parts: Mapping[str, tuple[int, Mapping[str, int]]],
    intensities: Mapping[str, Mapping[str, float]],
    volumes: Mapping[str, float],
    cases: Sequence[str],
    findings: Sequence[str],
) -> Figure:
    """Draw the page.

    Args:
        title: name of the data set.
        channels: ``M`` modality names in channel order.
        subsets: what each training case has.
        parts: part of the data -> number of cases, and modality -> cases that have it.
        intensities: modality -> case -> brightest intensity (99th percentile).
        volumes: case -> volume of all labels in ml.
        cases: names of the training cases, in the order of ``subsets``.
        findings: what is strange, one line each.
    """
    figure = new_figure(11.0, 8.2)
    figure.suptitle(f"{title}: {len(subsets)} training cases", fontsize=12, fontweight="bold")
    grid = figure.add_gridspec(3, 2, height_ratios=(1.25, 1.0, 0.7))
    _parts(figure.add_subplot(grid[0, 0]), channels, parts)
    _combinations(figure.add_subplot(grid[0, 1]), channels, subsets)
    _intensities(figure.add_subplot(grid[1, 0]), channels, intensities)
    _volumes(figure.add_subplot(grid[1, 1]), channels, subsets, volumes, cases)
    _findings(figure.add_subplot(grid[2, :]), findings)
    return figure


def _parts(axes: Axes, channels: Sequence[str], parts: Mapping[str, tuple[int, Mapping[str, int]]]) -> None:
    names = [name for name in parts if parts[name][0]]
    shares = np.array([[parts[name][1][channel] / parts[name][0] for channel in channels] for name in names])
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for row, name in enumerate(names):
        for column, channel in enumerate(channels):
            share = shares[row, column]
            text = f"{parts[name][1][channel]}\n{share:.0%}" if len(names) < 7 else f"{share:.0%}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if share > 0.75 else BLACK)
    axes.set_ylim(max(len(names), 4) - 0.5, -0.5)
    axes.set_xticks(range(len(channels)), channels)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), [f"{name} ({parts[name][0]})" for name in names])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Cases that have a sequence")


def _combinations(axes: Axes, channels: Sequence[str], subsets: Sequence[Subset]) -> None:
    counted = Counter(subsets).most_common()
    shown = counted[:_MOST_COMBINATIONS]
    counts = [count for _, count in shown]
    rows = np.arange(len(shown))
    left = -0.09 * max(counts, default=1)
    axes.barh(rows, counts, color=CYCLE[0], height=0.6)
    for row, (subset, count) in enumerate(shown):
        axes.text(count, row, f" {count}", va="center", fontsize=8)
        for column, there in enumerate(subset):
            x = left * (len(channels) - column)
            axes.scatter(x, row, s=30, edgecolors=GREY, linewidths=0.8, facecolors=BLACK if there else "white")
    for column, name in enumerate(channels):
        axes.text(left * (len(channels) - column), -0.75, name, rotation=45, ha="left", va="bottom", fontsize=8)
    axes.set_ylim(max(len(shown), 8) - 0.5, -0.6)
    axes.set_xlim(left * (len(channels) + 0.7), 1.12 * max(counts, default=1))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    rest = len(counted) - len(shown)
    axes.set_title("Combinations" + (f" (the {len(shown)} most frequent of {len(counted)})" if rest else ""), pad=26)


def _intensities(axes: Axes, channels: Sequence[str], intensities: Mapping[str, Mapping[str, float]]) -> None:
    everything = [value for values in intensities.values() for value in values.values()]
    for column, name in enumerate(channels):
        values = np.array(list(intensities.get(name, {}).values()))
        spread = np.random.default_rng(column).uniform(-0.18, 0.18, size=len(values))
        axes.scatter(column + spread, values, s=14, alpha=0.6, linewidths=0, color=CYCLE[0])
        if len(values):
            axes.hlines(np.median(values), column - 0.3, column + 0.3, color=BLACK, linewidth=1.4)
    if everything and min(everything) > 0 and max(everything) > 20 * min(everything):
        axes.set_yscale("log")
    axes.set_xticks(range(len(channels)), channels)
    axes.set_xlim(-0.6, len(channels) - 0.4)
    axes.set_ylabel("99th percentile")
    axes.set_title("Brightest intensities, one dot per case; line: median")


def _volumes(
    axes: Axes, channels: Sequence[str], subsets: Sequence[Subset], volumes: Mapping[str, float], cases: Sequence[str]
) -> None:
    drawn = False
    for column in range(len(channels)):
        for there, side, colour in ((True, -0.2, CYCLE[0]), (False, 0.2, CYCLE[1])):
            own = zip(cases, subsets, strict=True)
            values = np.array([volumes[case] for case, subset in own if case in volumes and subset[column] is there])
            spread = np.random.default_rng(column).uniform(-0.1, 0.1, size=len(values))
            label = ("with it" if there else "without it") if column == 0 else None
            axes.scatter(column + side + spread, values, s=14, alpha=0.6, linewidths=0, color=colour, label=label)
            if len(values):
                drawn = True
                axes.hlines(np.median(values), column + side - 0.14, column + side + 0.14, color=BLACK, linewidth=1.4)
    axes.set_xticks(range(len(channels)), channels)
    axes.set_xlim(-0.6, len(channels) - 0.4)
    axes.set_ylabel("ml")
    axes.set_title("Volume of the labels in cases with and without a sequence")
    if drawn:
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _findings(axes: Axes, findings: Sequence[str]) -> None:
    axes.axis("off")
    lines = [textwrap.shorten(line, 150, placeholder=" ...") for line in findings[:_MOST_FINDINGS]] or ["none"]
    if len(findings) > _MOST_FINDINGS:
        lines.append(f"and {len(findings) - _MOST_FINDINGS} more in check.json")
    axes.set_title(f"Findings ({len(findings)})", loc="left")
    axes.text(0, 1, "\n".join(lines), va="top", ha="left", fontsize=8, transform=axes.transAxes)
