"""Write ``subset_report.json`` into a model folder: how good the model was on each subset, for predictions to quote.

`inference.subset_quality` reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2_mgml.inference.case_quality import KEY
from nnunetv2_mgml.inference.subset_quality import CARRIED_KEY, CARRIER, REPORT_NAME
from nnunetv2_mgml.io.files import file_stamp, read_json, write_json
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.scoring.case_quality import fit_case_quality
from nnunetv2_mgml.scoring.info import EvaluatedModel, as_json
from nnunetv2_mgml.scoring.results import Evaluation

_METRIC = "dice"
_VOLUME = "absolute_volume_error"


def write_subset_report(evaluation: Evaluation, model_folder: Path | str, predictions: Path | None = None) -> Path:
    """Store mean Dice, spread and number of cases per subset and region in the model folder.

    Args:
        evaluation: with the metric ``dice``; of validation cases, or predictions are promised too much.
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        predictions: the label maps of the evaluation and what is kept beside them; with it, also store what a
            prediction's own probabilities tell of it (`case_quality`).

    Returns:
        The file written.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the evaluation has no Dice, or is of a model with other modalities.
    """
    folder = Path(model_folder)
    model_json = folder / "dataset.json"
    if not model_json.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no dataset.json.")
    channels = channel_names(read_json(model_json))
    if channels != tuple(evaluation.channels):
        raise ValueError(
            f"The evaluation is of modalities {', '.join(evaluation.channels)}, the model of {', '.join(channels)}."
        )
    if _METRIC not in evaluation.metrics:
        raise ValueError(f"The evaluation has no {_METRIC}; evaluate with --metrics {_METRIC} (or the default).")
    summaries = {region: evaluation.summary(_METRIC, region) for region in evaluation.region_names}
    info = evaluation.info
    model = info.model or EvaluatedModel()
    content: dict[str, Any] = {
        "folds": model.folds,
        "checkpoint": model.checkpoint,
        "mirroring": model.mirroring,
        "checkpoint_size_and_time_ns": model.checkpoint_size_and_time_ns,
        "shared_preprocessing": model.shared_preprocessing,
        "metric": _METRIC,
        "policy": evaluation.policy,
        "channels": channels,
        "min_region_voxels": info.min_region_voxels,
        "number_of_cases": len(evaluation.cases),
        "evaluated": as_json(info.source) or None,
        "created": info.created or None,
        "versions": info.versions or None,
        "subsets": {
            name: {region: summary[name] for region, summary in summaries.items()} for name in evaluation.subset_names
        },
    }
    if _VOLUME in evaluation.metrics:
        volumes = {region: evaluation.summary(_VOLUME, region) for region in evaluation.region_names}
        content["absolute_volume_error_ml"] = {
            name: {region: summary[name] for region, summary in volumes.items()} for name in evaluation.subset_names
        }
    if predictions is not None:
        content[KEY] = fit_case_quality(evaluation, predictions)
    path = folder / REPORT_NAME
    write_json(path, content)
    carry_report(folder)
    return path


def carry_report(model_folder: Path | str) -> None:
    """Put a copy of the stored report into the file that nnU-Net exports with a model, or take it out of there.

    Nothing happens where the folder has no such file. Call it whenever the report or that file has been written anew.
    """
    folder = Path(model_folder)
    carrier, report = folder / CARRIER, folder / REPORT_NAME
    if not carrier.is_file():
        return
    try:
        content = read_json(carrier)
        copy = without_paths(read_json(report)) if report.is_file() else None
    except ValueError:  # nothing that can be read, nothing that can be shared
        return
    if not isinstance(content, dict) or content.get(CARRIED_KEY) == copy:
        return
    content.pop(CARRIED_KEY, None)
    write_json(carrier, content if copy is None else {**content, CARRIED_KEY: copy}, indent=4)


def without_paths(report: dict[str, Any]) -> dict[str, Any]:
    """Return a report without the folders of the machine it was made on."""
    evaluated = report.get("evaluated")
    if not isinstance(evaluated, dict):
        return report
    kept = {name: value for name, value in evaluated.items() if name not in ("images", "labels", "folders")}
    return {**report, "evaluated": kept}


def drop_outdated_report(model_folder: Path | str, fold: int | str) -> bool:
    """Delete the stored report if it is of this fold with another checkpoint than the folder holds now.

    Returns:
        Whether it was deleted.
    """
    folder = Path(model_folder)
    path = folder / REPORT_NAME
    if not path.is_file():
        return False
    try:
        content = read_json(path)
        folds, checkpoint = content.get("folds") or [], content.get("checkpoint")
        if str(fold) not in folds:
            return False
        stamp = (content.get("checkpoint_size_and_time_ns") or [None] * len(folds))[folds.index(str(fold))]
        now = file_stamp(folder / f"fold_{fold}" / str(checkpoint))
        outdated = now is None or stamp != now
    except (ValueError, AttributeError, TypeError, IndexError, OSError):  # damaged
        outdated = True
    if outdated:
        path.unlink()
        carry_report(folder)
    return outdated
