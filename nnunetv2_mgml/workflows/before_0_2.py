"""Calls of 0.1.0 that take other arguments now, in terms of what they have become; to go with 0.3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.progress import Log
from nnunetv2_mgml.plans import folders as nnunet_folders
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.workflows import evaluate
from nnunetv2_mgml.workflows.installation import find_installation


@dataclass(frozen=True)
class EvaluationOptions:
    """See `evaluate.ScoringRequest`."""

    policy: str = "auto"
    metrics: tuple[str, ...] | None = None
    min_region_voxels: dict[str, int] | None = None
    num_processes: int = 2
    name: str | None = None
    overwrite: bool = False
    restart_if_changed: bool = False
    show_progress: bool = True
    figures: bool = True
    log: Log | None = None


def evaluate_predictions(
    labels: Path,
    folders: dict[str, Path],
    dataset_json: dict[str, Any],
    output: Path,
    options: EvaluationOptions | None = None,
    allow_missing: bool = False,
) -> Evaluation:
    """Evaluate finished predictions; see `evaluate.evaluate_predictions`.

    Args:
        labels: folder of reference label maps ``<case><file_ending>``.
        folders: subset name -> folder of predictions with the same file names.
        dataset_json: content of dataset.json.
        output: the evaluation folder.
        options: how they are scored.
        allow_missing: score the cases that every folder has.
    """
    chosen = options or EvaluationOptions()
    return evaluate.evaluate_predictions(
        evaluate.PredictionsRequest(
            predictions=folders,
            labels=labels,
            output=output,
            dataset_json=dataset_json,
            allow_missing=allow_missing,
            policy=chosen.policy,
            metrics=chosen.metrics,
            min_region_voxels=chosen.min_region_voxels or {},
            name=chosen.name,
            num_processes=chosen.num_processes,
            overwrite=chosen.overwrite,
            restart_if_changed=chosen.restart_if_changed,
            figures=chosen.figures,
            show_progress=chosen.show_progress,
            log=chosen.log,
        )
    )


def collect() -> dict[str, Any]:
    """Return versions, folders and variables, JSON-ready; see `installation.find_installation`."""
    return find_installation().as_dict()


def dataset_folder(dataset: str) -> Path:
    """Return a data set's folder in nnUNet_preprocessed; see `plans.folders.dataset_folder`."""
    return nnunet_folders.dataset_folder(dataset, nnunet_folders.PREPROCESSED)
