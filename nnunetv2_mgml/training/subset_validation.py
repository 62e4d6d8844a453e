"""The last part of a training: the validation cases scored on every subset of the modalities."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2_mgml.training.base import MissingModalityTrainer


def validate_subsets(trainer: MissingModalityTrainer, weights_file: str | None) -> str:
    """Run ``mgml evaluate`` on the fold's validation cases, without mirroring, and store what to expect of each subset.

    Mirroring would make it eight times slower; ``mgml evaluate`` by hand does mirror. The raw images are needed, as
    crop and normalisation depend on the subset.

    Args:
        trainer: a trained one.
        weights_file: the checkpoint that holds its weights, or None where none was written.

    Returns:
        The table over all subsets, or why there is none, for the log.
    """
    from nnunetv2_mgml.evaluation import command  # evaluation is built on trained models, so it is imported last
    from nnunetv2_mgml.evaluation.model_command import run_model
    from nnunetv2_mgml.subset_report import write_subset_report

    if weights_file is None:
        return "No table over all modality subsets: there is no checkpoint of these weights."
    if trainer.fold == "all":
        return "No table over all modality subsets: fold 'all' has no validation cases of its own."
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["-m", str(trainer.output_folder_base), "-d", trainer.plans_manager.dataset_name, "-f",
                 str(trainer.fold), "-chk", Path(weights_file).name, "-device", trainer.device.type, "--disable_tta",
                 "--overwrite", "--allow_missing", "--disable_progress_bar"]
    if trainer.config.cpu_bfloat16:
        arguments.append("--cpu_bfloat16")
    try:
        evaluation, output, model_folder = run_model(parser.parse_args(arguments))
        report = write_subset_report(evaluation, model_folder)
    except (ValueError, FileNotFoundError) as error:
        return (f"No table over all modality subsets: {error} nnU-Net's own validation above is complete; 'mgml "
                f"evaluate' makes the table later.")
    return (f"Validation cases on every subset of the modalities, without mirroring\n{command.summary_text(evaluation)}"
            f"\nTables: {output}; quality to expect per subset, quoted by predictions: {report}")
