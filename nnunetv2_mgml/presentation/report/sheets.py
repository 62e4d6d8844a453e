"""Qualitative figures of the cases the viewer shows, so that a page without JavaScript (or on paper) has them too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nnunetv2_mgml.modalities import Subset, subset_name
from nnunetv2_mgml.presentation.figures.qualitative import Case, case_rows, qualitative_sheet
from nnunetv2_mgml.presentation.figures.slices import telling_slice
from nnunetv2_mgml.presentation.report.cases import CaseVolumes
from nnunetv2_mgml.presentation.report.charts import Picture, picture
from nnunetv2_mgml.presentation.report.content import scores_for_viewer, subset_title
from nnunetv2_mgml.presentation.tables import display_name
from nnunetv2_mgml.scoring.metrics import Metric
from nnunetv2_mgml.scoring.regions import short_names
from nnunetv2_mgml.scoring.results import Evaluation

_MOST = 10
_DPI = 110


def label_names(evaluation: Evaluation) -> dict[int, str]:
    """Return a name for each label value, also where the data set names only overlapping regions.

    A value is named after the smallest region it belongs to, without the regions nested in that one which it does not
    belong to: for BraTS ``WT without TC``, ``TC without ET`` and ``ET``.
    """
    return names_of_values(evaluation.regions)


def names_of_values(regions_by_name: Mapping[str, Iterable[int]]) -> dict[int, str]:
    """Return a name for each label value of regions; see `label_names`."""
    names = {}
    titles = short_names(regions_by_name)
    regions = {titles[name]: set(labels) for name, labels in regions_by_name.items()}
    for value in sorted(set().union(*regions.values()) - {0}):
        name, labels = min(((n, v) for n, v in regions.items() if value in v), key=lambda item: len(item[1]))
        inner = [n for n, v in regions.items() if v < labels and value not in v]
        largest = [n for n in inner if not any(regions[n] < regions[other] for other in inner)]
        names[value] = f"{name} without {', '.join(largest)}" if largest else name
    return names


def telling_subsets(evaluation: Evaluation, most: int = _MOST) -> list[Subset]:
    """Return the subsets a sheet shows: each modality alone, each one missing, all; what was evaluated of them.

    Args:
        evaluation: the evaluation.
        most: with more than this, the subsets with one missing are left out, then single ones from the end.
    """
    count = len(evaluation.channels)
    single = [s for s in evaluation.subsets if sum(s) == 1]
    dropped = [s for s in evaluation.subsets if sum(s) == count - 1 and count > 2]
    full = [s for s in evaluation.subsets if all(s) and count > 1]
    if len(single) + len(dropped) + len(full) > most:
        dropped = []
    chosen = [*single[: most - len(full)], *dropped, *full]
    return chosen or evaluation.subsets[:most]


def case_sheet(evaluation: Evaluation, metric: Metric, volumes: CaseVolumes, colours: dict[int, str]) -> Picture:
    """Draw one case: modalities, ground truth, predictions from several subsets with their scores."""
    z = telling_slice(volumes.reference)
    scores = scores_for_viewer(evaluation, metric, volumes.name)
    predictions, present = {}, {}
    for subset in telling_subsets(evaluation):
        name = subset_name(subset, evaluation.channels)
        if name not in volumes.predictions:
            continue
        title = f"{short_title(subset, evaluation)}\n{_score_line(scores[name])}"
        predictions[title] = volumes.predictions[name][z]
        present[title] = [display_name(c) for c, on in zip(evaluation.channels, subset, strict=True) if on]
    figure = qualitative_sheet(
        {display_name(name): image[z] for name, image in volumes.images.items()},
        volumes.reference[z],
        predictions,
        label_names(evaluation),
        colours,
        present=present,
        sides=volumes.sides,
        pixel_aspect=volumes.spacing[1] / volumes.spacing[2],
    )
    seen = "Axial slice" if volumes.sides else "Slice"
    how = ", in radiological convention (the patient's left is on the right)" if volumes.sides else ""
    caption = (
        f"{seen} {z + 1} of {len(volumes.reference)}, the one that shows most of the tumour{how}. Numbers: "
        f"{metric.title} ({metric.unit}) "
        f"of the whole volume for {', '.join(evaluation.region_titles.values())}."
    )
    return picture(volumes.name, caption, figure, "png", _DPI)


def overview_row(evaluation: Evaluation, volumes: CaseVolumes) -> Case:
    """Return one row of `overview_sheet`: the case cut at its most telling slice, around the tumour."""
    z = telling_slice(volumes.reference)
    predictions = {
        short_title(s, evaluation): volumes.predictions[subset_name(s, evaluation.channels)][z]
        for s in telling_subsets(evaluation, most=max(6, len(evaluation.channels) + 1))
        if subset_name(s, evaluation.channels) in volumes.predictions
    }
    return Case(
        {display_name(name): image[z] for name, image in volumes.images.items()},
        volumes.reference[z],
        predictions,
        volumes.name,
        pixel_aspect=volumes.spacing[1] / volumes.spacing[2],
        zoom=True,
    )


def overview_sheet(evaluation: Evaluation, rows: Sequence[Case], colours: dict[int, str]) -> Picture | None:
    """Draw cases as rows (the paper's figure 8); None for fewer than two, or where their columns differ."""
    if len(rows) < 2 or any((*row.images, *row.predictions) != (*rows[0].images, *rows[0].predictions) for row in rows):
        return None
    return picture(
        "Cases side by side",
        "One case per row, cut at its most telling axial slice and around the tumour.",
        case_rows(rows, label_names(evaluation), colours),
        "png",
        _DPI,
    )


def short_title(subset: Subset, evaluation: Evaluation) -> str:
    """Return what a panel is headed: ``all modalities``, ``without T1ce``, or the modalities present."""
    count = len(evaluation.channels)
    if all(subset) and count > 1:
        return "all modalities"
    if sum(subset) == count - 1 and count > 2:
        return f"without {display_name(evaluation.channels[subset.index(False)])}"
    return subset_title(subset, evaluation.channels)


def _score_line(scores: dict[str, str]) -> str:
    return " / ".join(value if value == "n/a" else f"{float(value):.0f}" for value in scores.values())
