"""Score cases: every subset x region x metric of a case in one worker, cases in parallel, finished cases kept.

A worker holds one case: its reference and one prediction at a time. For a 240 x 240 x 155 case that is below 300 MB,
whatever the number of subsets (``tests/scoring/test_evaluation_scoring.py`` checks that it does not grow with them).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunetv2_mgml.io.files import file_stamp, read_json, write_json
from nnunetv2_mgml.io.volumes import check_same_geometry, read_label_image
from nnunetv2_mgml.io.workers import Task, WorkerDiedError, WorkerPool
from nnunetv2_mgml.scoring.metrics import MaskPair, RegionMask, default_metrics, get_metric
from nnunetv2_mgml.scoring.policy import get_policy
from nnunetv2_mgml.scoring.regions import LabelSet

_log = logging.getLogger(__name__)

Scores = dict[str, dict[str, dict[str, float]]]
"""subset name -> region -> metric -> value."""


@dataclass(frozen=True)
class ScoringSettings:
    """What is computed and how; the same for every case of an evaluation."""

    label_set: LabelSet
    policy: str = "auto"
    metrics: tuple[str, ...] = field(default_factory=default_metrics)
    min_region_voxels: dict[str, int] = field(default_factory=dict)
    """Region -> N: a predicted region of fewer than N voxels counts as empty (RFNet's rule for ET: 500)."""

    def __post_init__(self) -> None:
        for name in self.metrics:
            get_metric(name)
        object.__setattr__(self, "policy", get_policy(self.policy, self.label_set.regions).name)
        unknown = sorted(set(self.min_region_voxels) - set(self.label_set.regions))
        if unknown:
            raise ValueError(f"Unknown region {', '.join(unknown)}. Allowed: {', '.join(self.label_set.regions)}.")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values; part of an evaluation folder's fingerprint."""
        return {
            "regions": {k: list(v) for k, v in self.label_set.regions.items()},
            "ignore_label": self.label_set.ignore_label,
            "policy": self.policy,
            "metrics": list(self.metrics),
            "min_region_voxels": dict(sorted(self.min_region_voxels.items())),
        }


@dataclass(frozen=True)
class CaseTask:
    """One case: its reference and one prediction file per subset name."""

    case: str
    reference: Path
    predictions: dict[str, Path]


def score_arrays(
    reference: npt.NDArray[Any], prediction: npt.NDArray[Any], spacing: Sequence[float], settings: ScoringSettings
) -> dict[str, dict[str, float]]:
    """Score one label map against another.

    Args:
        reference: integer array of any dimension; may hold the ignore label.
        prediction: integer array of the same shape.
        spacing: voxel size in mm, array axis order.
        settings: regions, metrics and policy.

    Returns:
        region -> metric -> value (fractions, mm, ml; NaN where the policy gives no value).
    """
    references = _reference_masks(reference, spacing, settings)
    return _score_against(references, reference, prediction, spacing, settings)


def _reference_masks(
    reference: npt.NDArray[Any], spacing: Sequence[float], settings: ScoringSettings
) -> dict[str, RegionMask]:
    labels = settings.label_set
    return {region: RegionMask(labels.mask(reference, region), spacing) for region in labels.regions}


def _score_against(
    references: dict[str, RegionMask],
    reference: npt.NDArray[Any],
    prediction: npt.NDArray[Any],
    spacing: Sequence[float],
    settings: ScoringSettings,
) -> dict[str, dict[str, float]]:
    policy = get_policy(settings.policy)
    metrics = [get_metric(name) for name in settings.metrics]
    ignore = settings.label_set.ignore_label
    if ignore is not None:
        prediction = np.where(reference == ignore, 0, prediction)
    result = {}
    for region, reference_mask in references.items():
        mask = settings.label_set.mask(prediction, region)
        if np.count_nonzero(mask) < settings.min_region_voxels.get(region, 0):
            mask = np.zeros_like(mask)
        pair = MaskPair(reference_mask, RegionMask(mask, spacing))
        result[region] = {metric.name: policy.score(metric, pair) for metric in metrics}
    return result


def score_case(task: CaseTask, settings: ScoringSettings) -> Scores:
    """Score all subsets of one case from files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: unreadable file, different grids, or labels the data set does not have; the case is named.
    """
    reference = read_label_image(task.reference, task.case)
    allowed = set(settings.label_set.known_labels)
    ignore = settings.label_set.ignore_label
    _check_labels(reference.labels, allowed | ({ignore} if ignore is not None else set()), task.reference, task.case)
    references = _reference_masks(reference.labels, reference.spacing, settings)
    scores: Scores = {}
    for subset, path in task.predictions.items():
        prediction = read_label_image(path, task.case)
        check_same_geometry(reference, prediction, task.case)
        _check_labels(prediction.labels, allowed, path, task.case)
        scores[subset] = _score_against(references, reference.labels, prediction.labels, reference.spacing, settings)
    return scores


def _check_labels(labels: npt.NDArray[Any], allowed: set[int], path: Path, case: str) -> None:
    unknown = sorted({int(v) for v in np.unique(labels)} - allowed)
    if unknown:
        raise ValueError(
            f"Case {case}: {path} holds label {', '.join(map(str, unknown))}, but dataset.json knows only "
            f"{', '.join(map(str, sorted(allowed)))}. Is it in another label convention (BraTS before "
            f"2023 writes enhancing tumour as 4)? Convert it first."
        )


def _score_and_store(task: CaseTask, settings: ScoringSettings, file: Path) -> Scores:
    """Score the subsets of a case that are not stored yet (or whose files changed) and store the case again."""
    scores = stored_scores(task, file)
    places = {name: _place(path, file) for name, path in task.predictions.items()}
    todo = {name: path for name, path in task.predictions.items() if name not in scores}
    if todo:
        scores.update(score_case(CaseTask(task.case, task.reference, todo), settings))
        stamps = {name: file_stamp(task.predictions[name]) for name in scores}
        write_json(
            file,
            {
                "case": task.case,
                "reference": file_stamp(task.reference),
                "predictions": stamps,
                "files": {name: places[name] for name in scores},
                "scores": scores,
            },
        )
    return scores


def _place(path: Path, file: Path) -> str:
    """Return where a prediction lies, as it is stored in a case's file: below the evaluation's folder relative to that.

    An evaluation may thus be moved with what it has predicted.
    """
    folder, place = file.resolve().parents[1], path.resolve()
    return place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)


def stored_scores(task: CaseTask, file: Path) -> Scores:
    """Return what is already stored for a case, without subsets whose files have changed since, or are others.

    Raises:
        ValueError: the file was not written by an evaluation.
    """
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except ValueError as error:  # cut off, by a disk that failed
        _log.warning("%s The case is scored again.", error)
        return {}
    try:
        return _unchanged_scores(task, content, file)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"Case {task.case}: {file} holds no scores of an evaluation ({type(error).__name__}: {error})."
            f" Delete it, and the case is scored again."
        ) from error


def _unchanged_scores(task: CaseTask, content: dict[str, Any], file: Path) -> Scores:
    if content["reference"] != file_stamp(task.reference):
        return {}
    places = content.get("files", {})  # before 0.2 only size and time were stored, which two files may share
    return {
        name: {
            region: {metric: float("nan") if value is None else value for metric, value in metrics.items()}
            for region, metrics in regions.items()
        }
        for name, regions in content["scores"].items()
        if name in task.predictions
        and task.predictions[name].is_file()
        and content["predictions"][name] == file_stamp(task.predictions[name])
        and places.get(name) == _place(task.predictions[name], file)
    }


class CasePool:
    """Scores cases in worker processes while the caller goes on producing predictions.

    Args:
        settings: see `ScoringSettings`.
        folder: where the per-case files go (``<folder>/<case>.json``).
        num_processes: workers; 0 scores in this process.
    """

    def __init__(self, settings: ScoringSettings, folder: Path, num_processes: int) -> None:
        self.settings = settings
        self.folder = folder
        self._workers = WorkerPool(num_processes, "-np")
        self._tasks: list[tuple[str, Task | CaseTask]] = []

    def submit(self, task: CaseTask) -> None:
        """Hand over a case whose prediction files are complete."""
        # Without workers a job runs when it is started: leave that to `results`, so that a progress bar sees it.
        self._tasks.append((task.case, self._start(task) if self._workers.num_workers else task))

    def _start(self, task: CaseTask) -> Task:
        return self._workers.submit(_score_and_store, task, self.settings, self.folder / f"{task.case}.json")

    def results(self) -> Iterator[tuple[str, Scores | Exception]]:
        """Yield ``(case, scores or what prevented them)`` in the order of submission; call after the last `submit`."""
        for case, task in self._tasks:
            try:
                yield case, self._workers.result(self._start(task) if isinstance(task, CaseTask) else task)
            except (ValueError, FileNotFoundError) as error:
                yield case, error
            except (WorkerDiedError, OSError) as error:
                yield case, ValueError(f"Case {case}: {error}")

    def __enter__(self) -> CasePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self._workers.__exit__(*exception)


def collect(
    outcomes: Iterable[tuple[str, Scores | Exception]], failures: dict[str, Exception] | None = None
) -> dict[str, Scores]:
    """Gather the results of a pool.

    Args:
        outcomes: ``CasePool.results()``, wrapped in a progress bar or not.
        failures: cases that failed before they could be scored.

    Returns:
        case -> scores, sorted by case.

    Raises:
        ValueError: cases that failed, all of them listed; those that did not fail are stored and not done again.
    """
    finished: dict[str, Scores] = {}
    failed: dict[str, Exception] = dict(failures or {})
    for case, outcome in outcomes:
        if isinstance(outcome, Exception):
            failed[case] = outcome
        else:
            finished[case] = outcome
    if failed:
        listing = "\n".join(f"  {error}" for _, error in sorted(failed.items()))
        raise ValueError(
            f"{len(failed)} of {len(failed) + len(finished)} cases could not be evaluated; the others are "
            f"kept and not done again.\n{listing}"
        )
    return dict(sorted(finished.items()))
