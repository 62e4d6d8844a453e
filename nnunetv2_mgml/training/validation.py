"""The last part of a training: the validation cases scored on every subset of the modalities."""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_mgml.inference.subset_quality import REPORT_NAME
from nnunetv2_mgml.presentation.tables import summary_text
from nnunetv2_mgml.scoring.subset_report import drop_outdated_report, write_subset_report
from nnunetv2_mgml.workflows.evaluate import ModelRequest, evaluate_model

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


FOLDER = "subset_validation"
"""In the fold's folder; a validation of other weights replaces it, so no evaluation made by hand goes there."""


def validate_subsets(trainer: nnUNetTrainerMGML, weights_file: str | None) -> str:
    """Evaluate the fold's validation cases on every subset, without mirroring, and store what to expect of each.

    Mirroring would make it eight times slower; ``mgml evaluate`` by hand does mirror. Crop and
    normalisation depend on the subset, so the raw images are read; where they are not on this machine, the
    preprocessed cases have to do, and the report says so. A run that was killed is resumed while the checkpoint is
    the same file.

    Args:
        trainer: a trained one.
        weights_file: the checkpoint that holds its weights, or None where none was written.

    Returns:
        The table over all subsets, or why there is none, for the log.
    """
    if weights_file is None:
        return "No table over all modality subsets: there is no checkpoint of these weights."
    if trainer.fold == "all":
        return "No table over all modality subsets: fold 'all' has no validation cases of its own."
    try:
        request = ModelRequest(
            model_folder=Path(trainer.output_folder_base),
            folds=(trainer.fold,),
            checkpoint=Path(weights_file).name,
            dataset=trainer.plans_manager.dataset_name,
            output=Path(trainer.output_folder) / FOLDER,
            allow_missing=True,
            device=trainer.device.type,
            mirroring=False,
            cpu_bfloat16=trainer.options.training.cpu_bfloat16 and trainer.device.type == "cpu",
            trust_checkpoint=True,  # this training wrote it
            restart_if_changed=True,
            num_processes=min(4, os.cpu_count() or 1),
            show_progress=False,
            log=trainer.print_to_log_file,
        )
        evaluation = evaluate_model(request)
    except Exception as error:  # the training and nnU-Net's validation are complete; this must not undo their success
        trainer.print_to_log_file(traceback.format_exc(), also_print_to_console=False)
        return (
            f"No table over all modality subsets: {error} nnU-Net's own validation above is complete; 'mgml "
            f"evaluate' makes the table later."
        )
    text = (
        f"Validation cases on every subset of the modalities, without mirroring\n"
        f"{summary_text(evaluation)}\nTables: {request.output_folder}"
    )
    if _is_others(request.subset_report, trainer.fold):
        return f"{text}\nThe {REPORT_NAME} of other folds is kept; mgml evaluate --write_subset_report replaces it."
    report = write_subset_report(evaluation, request.model_folder, request.output_folder / "predictions")
    return f"{text}; quality to expect per subset, quoted by predictions: {report}"


def drop_report_of_other_weights(trainer: nnUNetTrainerMGML) -> None:
    """Delete the model folder's `REPORT_NAME` if it speaks of other weights of the trainer's fold, and log it."""
    if drop_outdated_report(trainer.output_folder_base, trainer.fold):
        trainer.print_to_log_file(f"Deleted {REPORT_NAME}: it was of other weights of fold {trainer.fold}.")


def _is_others(report: Path, fold: int | str) -> bool:
    """Whether a report exists that is of more, or other, folds than this one."""
    if not report.is_file():
        return False
    try:
        folds = json.loads(report.read_text()).get("folds")
    except json.JSONDecodeError:
        return False
    return folds is not None and folds != [str(fold)]
