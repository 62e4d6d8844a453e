"""Figures written beside the tables of an evaluation and of a comparison."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nnunetv2_mgml.modalities import parse_subset, subset_name
from nnunetv2_mgml.presentation.figures.differences import difference_intervals
from nnunetv2_mgml.presentation.figures.qualitative import comparison_grid
from nnunetv2_mgml.presentation.figures.slices import telling_slice
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.presentation.report.cases import load_case, spread_cases
from nnunetv2_mgml.presentation.report.charts import score_figures
from nnunetv2_mgml.presentation.report.content import headline_metric, subset_title
from nnunetv2_mgml.presentation.report.sheets import label_names, short_title, telling_subsets
from nnunetv2_mgml.presentation.tables import display_name
from nnunetv2_mgml.scoring.metrics import get_metric
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation, common_subsets
from nnunetv2_mgml.scoring.sources import EvaluationFiles

_log = logging.getLogger(__name__)


def write_score_figures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write heatmap, score by number of modalities and, of all subsets, Shapley values as PNG.

    Args:
        evaluation: the evaluation; one of distances only has no such figures.
        folder: where the files go.

    Returns:
        The files written.
    """
    try:
        metric = headline_metric(evaluation)
    except ValueError:
        return []
    return [save(drawn.figure, folder / f"{drawn.name}.png") for drawn in score_figures(evaluation, metric)]


def write_difference_figures(table: pd.DataFrame, evaluations: Sequence[Evaluation], folder: Path) -> list[Path]:
    """Write one figure of differences per metric of a comparison.

    Args:
        table: what `statistics.compare_evaluations` returned.
        evaluations: the evaluations it compared.
        folder: where the files go.

    Returns:
        The files written.
    """
    first = common_subsets(evaluations)[0]
    columns = [*first.subset_names, AVERAGE]
    titles = [
        *(subset_title(parse_subset(name, first.channels), first.channels) for name in first.subset_names),
        "mean of all",
    ]
    files = []
    for name, rows in table.groupby("metric", sort=False):
        metric = get_metric(str(name))
        values = {}
        for method, method_rows in rows.groupby("method", sort=False):
            indexed = method_rows.set_index(["subset", "region"])[["difference", "ci_low", "ci_high"]]
            values[str(method)] = metric.display_factor * np.array(
                [[indexed.loc[(subset, region)] for region in first.region_names] for subset in columns], dtype=float
            )
        figure = difference_intervals(
            values,
            titles,
            list(first.region_titles.values()),
            first.name,
            f"{metric.title} ({metric.unit})",
        )
        files.append(save(figure, folder / f"differences_{name}.png"))
    return files


def write_comparison_sheet(evaluations: Sequence[Evaluation], files: Sequence[EvaluationFiles], path: Path) -> Path:
    """Write one slice predicted by every method from telling subsets (the paper's figure 10).

    The case is the one of median score of the baseline.

    Args:
        evaluations: at least two, of the same cases.
        files: where those of each lie; images and labels are those of the first.
        path: the file.
    """
    shared = common_subsets(evaluations)
    first = shared[0]
    [case] = spread_cases(first, headline_metric(first), 1)
    volumes = [load_case(case, e.channels, f, e.info.ignore_label) for e, f in zip(shared, files, strict=True)]
    reference = volumes[0].reference
    for evaluation, case_volumes in zip(shared, volumes, strict=True):
        other = case_volumes.reference
        if other.shape != reference.shape or (other != reference).any():
            raise ValueError(
                f"Case {case}: '{evaluation.name}' was evaluated against another label map than '{first.name}'."
            )
    z = telling_slice(reference)
    rows = {}
    for subset in telling_subsets(first):
        name = subset_name(subset, first.channels)
        found = {e.name: v.predictions[name][z] for e, v in zip(shared, volumes, strict=True) if name in v.predictions}
        if found:
            rows[short_title(subset, first)] = found
    shown = list(volumes[0].images)[-1]
    figure = comparison_grid(
        volumes[0].images[shown][z],
        reference[z],
        rows,
        label_names(first),
        pixel_aspect=volumes[0].spacing[1] / volumes[0].spacing[2],
    )
    figure.suptitle(f"{case}, {display_name(shown)}, axial slice {z + 1} of {len(reference)}", fontsize=9)
    return save(figure, path)
