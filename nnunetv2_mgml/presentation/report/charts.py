"""The page's figures that need no images, and how a figure becomes part of the page."""

from __future__ import annotations

import base64
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_mgml.modalities import channel_index, table_rows
from nnunetv2_mgml.presentation.figures.shapley import shapley_bars
from nnunetv2_mgml.presentation.figures.style import figure_bytes
from nnunetv2_mgml.presentation.figures.subsets import score_by_count, subset_heatmap
from nnunetv2_mgml.presentation.figures.training import training_curves
from nnunetv2_mgml.presentation.report.content import (
    cases_text,
    mean_scores,
    paired_cases,
    paired_note,
    paired_values,
    worth_by_region,
)
from nnunetv2_mgml.presentation.tables import display_name
from nnunetv2_mgml.scoring.metrics import Metric
from nnunetv2_mgml.scoring.results import Evaluation

_MIME = {"png": "image/png", "svg": "image/svg+xml", "jpg": "image/jpeg"}


class Picture(NamedTuple):
    """A figure of the page."""

    title: str
    caption: str
    uri: str
    """``data:`` URI of the image."""


def data_uri(content: bytes, file_format: str) -> str:
    """Return an image file as a ``data:`` URI; the format is ``png``, ``svg`` or ``jpg``."""
    return f"data:{_MIME[file_format]};base64,{base64.b64encode(content).decode('ascii')}"


def picture(title: str, caption: str, figure: Figure, file_format: str = "svg", dpi: int = 130) -> Picture:
    """Turn a figure into a `Picture`: ``svg`` for charts, ``png`` for sheets of images."""
    return Picture(title, caption, data_uri(figure_bytes(figure, file_format, dpi), file_format))


class Chart(NamedTuple):
    """A figure of scores, before it becomes part of a page or a file."""

    name: str
    """File name without ending."""
    title: str
    caption: str
    figure: Figure


def score_figures(evaluation: Evaluation, metric: Metric) -> list[Chart]:
    """Draw heatmap, score by number of modalities and, where all subsets were evaluated, Shapley values.

    The heatmap has every mean there is. The other two compare subsets, so they are over the cases that have a score
    from every subset, and left out where there is none.
    """
    scores = mean_scores(evaluation, metric)
    titles = evaluation.region_titles
    order = table_rows(evaluation.channels)
    position = [channel_index(name, evaluation.channels) for name in order]
    rows = [tuple(subset[p] for p in position) for subset in evaluation.subsets]
    label = f"{metric.title} ({metric.unit})"
    charts = [
        Chart(
            "heatmap",
            "Every subset of modalities",
            f"Mean {label} over {cases_text(evaluation, metric)}, by region and available modalities (● present).",
            subset_heatmap(
                scores,
                rows,
                [display_name(name) for name in order],
                list(titles.values()),
                label,
                value_format="{:.1f}",
            ),
        ),
    ]
    paired = {r: paired_values(evaluation, metric, r).mean() for r, n in paired_cases(evaluation, metric).items() if n}
    note = paired_note(evaluation, metric)
    if paired:
        charts.append(
            Chart(
                "number_of_modalities",
                "How many modalities are enough",
                _sentences(
                    f"Mean {label} against the number of available modalities; each faint point is one subset.", note
                ),
                score_by_count(
                    np.array(list(paired.values())).T, evaluation.subsets, [titles[r] for r in paired], label
                ),
            )
        )
    worth = worth_by_region(evaluation, metric)
    if worth:
        charts.append(
            Chart(
                "shapley",
                "Which sequence is worth acquiring",
                _sentences(
                    f"Shapley value of each modality: its gain in mean {metric.title}, averaged over all orders in "
                    f"which the modalities could be acquired, computed exactly from all {len(rows)} subsets. No "
                    f"modality at all counts as 0, so the bars of a region add up to its score with all modalities. "
                    f"The tables also say how good each modality is alone and what is lost when only it is missing.",
                    note,
                ),
                shapley_bars(
                    {titles[region]: values for region, values in worth.items()},
                    [display_name(name) for name in evaluation.channels],
                    f"{metric.title}, {metric.unit}",
                    "{:.1f}",
                ),
            )
        )
    return charts


def _sentences(*parts: str) -> str:
    return " ".join(filter(None, parts))


def score_charts(evaluation: Evaluation, metric: Metric) -> list[Picture]:
    """Return `score_figures` as pictures of the page."""
    return [picture(chart.title, chart.caption, chart.figure) for chart in score_figures(evaluation, metric)]


def training_chart(log: Path, title: str = "Training") -> Picture:
    """Draw the training curves from ``mgml_training_log.csv``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it has no row.
    """
    if not log.is_file():
        raise FileNotFoundError(f"There is no training log {log}.")
    with open(log, newline="", encoding="utf-8") as stream:
        rows: Sequence[dict[str, str]] = list(csv.DictReader(stream))
    return picture(title, f"Losses, meta-parameters and pseudo Dice over {len(rows)} epochs.", training_curves(rows))
