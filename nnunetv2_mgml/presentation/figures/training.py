"""Training curves: losses, the meta-parameters (the paper's figure 7), pseudo Dice and learning rate per epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from nnunetv2_mgml.presentation.figures.style import BLACK, line_style, new_figure, styled

_VALIDATION = {"val_loss": "segmentation (validation)"}
_WEIGHTS = {"w_f": "$w_f$", "t1": "$T_1$", "t2": "$T_2$"}
_SHARPNESS = {"beta": r"$\beta$ (smooth max)", "alpha": r"$\alpha$ (smooth min)"}
_SUMMARY = {"color": BLACK, "linestyle": "--", "marker": ".", "markersize": 3.0}


@styled
def training_curves(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Figure:
    """Draw the training log.

    Args:
        rows: one mapping per epoch, as ``csv.DictReader`` gives them: ``epoch``, ``train_<term>``, ``w_f``, ``t1``,
            ``t2``, ``beta``, ``alpha``, ``val_loss``, ``pseudo_dice_<region>``, ``lr``; values are numbers or their
            text. Columns that are missing, empty or not a number in all rows are left out, and so is a loss that is
            always 0.
        title: heading of the figure.

    Raises:
        ValueError: no row at all.
    """
    if not rows:
        raise ValueError("The training log has no epoch yet; there is nothing to draw.")
    columns = _columns(rows)
    epochs = columns.pop("epoch", np.arange(len(rows), dtype=float))
    figure = new_figure(9.0, 5.6)
    losses, weights, dice, sharpness = figure.subplots(2, 2).flat
    terms = {
        name: name.removeprefix("train_").replace("_", " ")
        for name, values in columns.items()
        if name.startswith("train_") and (values != 0).any()
    }
    _panel(losses, epochs, columns, {**terms, **_VALIDATION}, "Losses", logarithmic=True)
    scores = {name: name.removeprefix("pseudo_dice_") for name in columns if name.startswith("pseudo_dice_")}
    _panel(dice, epochs, columns, scores, "Pseudo Dice (validation patches)", limits=(0, 1))
    _panel(weights, epochs, columns, _WEIGHTS, "Meta-parameters: weights", limits=(0, 1))
    _panel(sharpness, epochs, columns, _SHARPNESS, "Meta-parameters: sharpness")
    if "lr" in columns:
        losses.set_title(f"learning rate {columns['lr'][-1]:.2g}", loc="right", fontsize=8)
    for axes in (dice, sharpness):
        axes.set_xlabel("Epoch")
    if title:
        figure.suptitle(title)
    return figure


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, npt.NDArray[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in names if isinstance(name, str)}
    return {name: column for name, column in columns.items() if np.isfinite(column).any()}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _panel(
    axes: Axes,
    epochs: npt.NDArray[Any],
    columns: Mapping[str, npt.NDArray[Any]],
    labels: Mapping[str, str],
    title: str,
    *,
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> None:
    axes.set_title(title, loc="left")
    drawn = [(label, columns[name]) for name, label in labels.items() if name in columns]
    step = max(1, len(epochs) // 12)
    for index, (label, values) in enumerate(drawn):
        style = _SUMMARY if label in ("total", "mean") else {**line_style(index), "markevery": step}
        axes.plot(epochs, values, label=label, **style)
    if not drawn:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", va="center", color="#6E6E6E")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    if limits:
        axes.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
    if logarithmic:
        _logarithmic(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    axes.grid(color="#E9E9E9", linewidth=0.7)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _logarithmic(axes: Axes) -> None:
    """Set an axis linear from -1 to 1 and logarithmic beyond: losses start high and end below 0, as Dice does."""
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_locator(FixedLocator([-10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
