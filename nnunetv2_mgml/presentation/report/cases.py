"""Which cases the viewer shows, and their volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_mgml.presentation.figures.slices import knows_sides, read_axial
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
    sides: tuple[str, str] | None = ("R", "L")
    """Letters for the viewer's left and right; None where the files do not say which is which."""


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


def image_files(cases: Sequence[str], channels: Sequence[str], files: EvaluationFiles) -> dict[str, dict[int, Path]]:
    """Return case -> channel index -> image, under nnU-Net's names or, as an evaluation finds them, any others.

    Args:
        cases: case names.
        channels: modality names in channel order.
        files: where they lie; an image that does not exist is a missing modality.
    """
    named = {
        case: {c: files.images / f"{case}_{c:04d}{files.file_ending}" for c in range(len(channels))} for case in cases
    }
    found = {case: {c: path for c, path in paths.items() if path.is_file()} for case, paths in named.items()}
    if all(found.values()):
        return found
    from nnunetv2_mgml.inference.inputs import find_cases  # nnU-Net is slow to import

    try:
        others = find_cases(files.images, files.file_ending, channels)
    except ValueError:  # no case in it
        return found
    images = {other.name: {c: Path(path) for c, path in other.files.items()} for other in others}
    return {case: paths or images.get(case, {}) for case, paths in found.items()}


def load_case(
    case: str,
    channels: Sequence[str],
    files: EvaluationFiles,
    ignore_label: int | None = None,
    paths: Mapping[int, Path] | None = None,
) -> CaseVolumes:
    """Read images, ground truth and predictions of a case.

    Args:
        case: case name.
        channels: modality names in channel order.
        files: where they lie.
        ignore_label: becomes background in the reference.
        paths: its images; None: those of `image_files`.

    Raises:
        FileNotFoundError: no image at all, no label map, or no prediction.
        ValueError: a file cannot be read, or the files differ in shape.
    """
    ending = files.file_ending
    paths = image_files([case], channels, files)[case] if paths is None else paths
    images = {channels[c]: read_axial(path)[0] for c, path in sorted(paths.items()) if c < len(channels)}
    if not images:
        raise FileNotFoundError(f"Case {case}: no image {files.images / f'{case}_0000{ending}'} or other channel.")
    reference, spacing = read_axial(files.labels / f"{case}{ending}")
    predicted = {subset: folder / f"{case}{ending}" for subset, folder in files.predictions.items()}
    predictions = {subset: read_axial(path)[0] for subset, path in predicted.items() if path.is_file()}
    if not predictions:
        raise FileNotFoundError(f"Case {case}: no prediction of any subset, such as {next(iter(predicted.values()))}.")
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
        case,
        images,
        reference,
        {name: _labels(volume) for name, volume in predictions.items()},
        spacing,
        ("R", "L") if knows_sides(f"{case}{ending}") else None,
    )


def _labels(volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return whole numbers in as few bytes as they need: a case has one label map per subset."""
    whole: npt.NDArray[Any] = np.rint(volume)
    return whole.astype(np.uint8 if whole.min() >= 0 and whole.max() <= 255 else np.int16)
