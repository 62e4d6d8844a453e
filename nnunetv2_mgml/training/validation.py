"""The last part of a training: the validation cases scored on every subset of the modalities."""

from __future__ import annotations

import argparse
import json
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_mgml.scoring.subset_report import REPORT_NAME, drop_outdated_report, write_subset_report

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


FOLDER = "subset_validation"
"""In the fold's folder; a validation of other weights replaces it, so no evaluation made by hand goes there."""


def validate_subsets(trainer: nnUNetTrainerMGML, weights_file: str | None) -> str:
    """Run ``mgml evaluate`` on the fold's validation cases, without mirroring, and store what to expect of each subset.

    Mirroring would make it eight times slower; ``mgml evaluate`` by hand does mirror. The raw images are needed, as
    crop and normalisation depend on the subset. A run that was killed is resumed while the checkpoint is the same file.

    Args:
        trainer: a trained one.
        weights_file: the checkpoint that holds its weights, or None where none was written.

    Returns:
        The table over all subsets, or why there is none, for the log.
    """
    from nnunetv2_mgml.commands import (
        evaluate as command,
    )  # evaluation is built on trained models, so it is imported last
    from nnunetv2_mgml.commands.evaluate_model import run_model

    if weights_file is None:
        return "No table over all modality subsets: there is no checkpoint of these weights."
    if trainer.fold == "all":
        return "No table over all modality subsets: fold 'all' has no validation cases of its own."
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    target = Path(trainer.output_folder) / FOLDER
    arguments = [
        "-m",
        str(trainer.output_folder_base),
        "-d",
        trainer.plans_manager.dataset_name,
        "-f",
        str(trainer.fold),
        "-chk",
        Path(weights_file).name,
        "-device",
        trainer.device.type,
        "--disable_tta",
        "-o",
        str(target),
        "--allow_missing",
        "--disable_progress_bar",
    ]
    if trainer.options.training.cpu_bfloat16:
        arguments.append("--cpu_bfloat16")
    try:
        evaluation, output, model_folder = run_model(
            parser.parse_args(arguments), restart_if_changed=True, log=trainer.print_to_log_file
        )
    except Exception as error:  # the training and nnU-Net's validation are complete; this must not undo their success
        trainer.print_to_log_file(traceback.format_exc(), also_print_to_console=False)
        return (
            f"No table over all modality subsets: {error} nnU-Net's own validation above is complete; 'mgml "
            f"evaluate' makes the table later."
        )
    text = (
        f"Validation cases on every subset of the modalities, without mirroring\n"
        f"{command.summary_text(evaluation)}\nTables: {output}"
    )
    if _is_others(model_folder / REPORT_NAME, trainer.fold):
        return f"{text}\nThe {REPORT_NAME} of other folds is kept; mgml evaluate --write_subset_report replaces it."
    report = write_subset_report(evaluation, model_folder)
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
