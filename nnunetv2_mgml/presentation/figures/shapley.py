"""What each modality is worth: a bar per modality and region."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_mgml.presentation.figures.style import BLACK, CYCLE, new_figure, styled
from nnunetv2_mgml.scoring.shapley import ModalityWorth

_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++", "oo")


@styled
def shapley_bars(
    worth: Mapping[str, Mapping[str, ModalityWorth]],
    channels: Sequence[str],
    metric: str = "Dice",
    value_format: str = "{:.2f}",
) -> Figure:
    """Draw the Shapley value of each modality, grouped by region.

    Args:
        worth: region -> modality -> what `modality_worth` returned.
        channels: modality names in the order of the bars.
        metric: name of the score.
        value_format: how the number above a bar is written.
    """
    regions = list(worth)
    figure = new_figure(max(4.6, 1.0 + 0.4 * len(regions) * (len(channels) + 1)), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(channels)
    for index, name in enumerate(channels):
        centres = np.arange(len(regions)) + (index - (len(channels) - 1) / 2) * width
        shares = np.array([worth[region][name].shapley for region in regions], dtype=float)
        axes.bar(
            centres,
            shares,
            width * 0.92,
            label=name,
            color=CYCLE[index % len(CYCLE)],
            edgecolor="white",
            hatch=_HATCHES[index % len(_HATCHES)],
            linewidth=0.5,
        )
        for x, share in zip(centres, shares, strict=True):
            if np.isfinite(share):
                axes.annotate(
                    value_format.format(share),
                    (x, max(share, 0.0)),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=7.5,
                )
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_xticks(range(len(regions)), regions)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"Shapley value ({metric})")
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=min(len(channels), 7))
    return figure
