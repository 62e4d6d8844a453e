"""Which cases the viewer shows, and their volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_mgml.presentation.figures.slices import read_axial
from nnunetv2_mgml.presentation.report.content import case_scores
from nnunetv2_mgml.scoring.metrics import Metric
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.scoring.sources import EvaluationFiles


@dataclass(frozen=True)
class CaseVolumes:
    """One case, all arrays ``(z, y, x)`` on one grid and in display orientation (see `figures.slices`)."""

    name: str
    images: dict[str, npt.NDArray[Any]]
    """Modality name -> image, for those whose file exists."""
    reference: npt.NDArray[Any]
    """Integer label map."""
    predictions: dict[str, npt.NDArray[Any]]
    """Subset name -> integer label map; a subset whose modalities this case lacks may have none."""
    spacing: tuple[float, ...]
    """mm, ``(z, y, x)``."""


def spread_cases(evaluation: Evaluation, metric: Metric, count: int) -> list[str]:
    """Return cases at evenly spaced ranks of their mean score over regions and subsets, worst and best among them.

    Args:
        evaluation: the evaluation.
        metric: what to rank by.
        count: how many cases, at least 1; a single one is the median.
    """
    means = case_scores(evaluation, metric).mean(axis=1)
    ranked = list(means.sort_values(kind="stable", na_position="first").index)
    if count >= len(ranked):
        return ranked
    if count == 1:
        return [ranked[len(ranked) // 2]]
    return [ranked[round(position)] for position in np.linspace(0, len(ranked) - 1, count)]


def load_case(
    case: str, channels: Sequence[str], files: EvaluationFiles, ignore_label: int | None = None
) -> CaseVolumes:
    """Read images, ground truth and predictions of a case.

    Args:
        case: case name.
        channels: modality names in channel order.
        files: where they lie. An image file that does not exist is a missing modality.
        ignore_label: becomes background in the reference.

    Raises:
        FileNotFoundError: no image at all, no label map, or no prediction.
        ValueError: a file cannot be read, or the files differ in shape.
    """
    ending = files.file_ending
    images = {}
    for channel, name in enumerate(channels):
        path = files.images / f"{case}_{channel:04d}{ending}"
        if path.is_file():
            images[name] = read_axial(path)[0]
    if not images:
        raise FileNotFoundError(f"Case {case}: no image {files.images / f'{case}_0000{ending}'} or other channel.")
    reference, spacing = read_axial(files.labels / f"{case}{ending}")
    paths = {subset: folder / f"{case}{ending}" for subset, folder in files.predictions.items()}
    predictions = {subset: read_axial(path)[0] for subset, path in paths.items() if path.is_file()}
    if not predictions:
        raise FileNotFoundError(f"Case {case}: no prediction of any subset, such as {next(iter(paths.values()))}.")
    for what, volume in (*images.items(), *predictions.items()):
        if volume.shape != reference.shape:
            raise ValueError(
                f"Case {case}: {what} has shape {volume.shape}, the label map {reference.shape} (z, y, "
                f"x); all must lie on one grid."
            )
    reference = _labels(reference)
    if ignore_label is not None:
        reference[reference == ignore_label] = 0
    return CaseVolumes(
        case, images, reference, {name: _labels(volume) for name, volume in predictions.items()}, spacing
    )


def _labels(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return whole numbers in as few bytes as they need: a case has one label map per subset."""
    whole: npt.NDArray[Any] = np.rint(volume)
    return whole.astype(np.uint8 if whole.min() >= 0 and whole.max() <= 255 else np.int16)
