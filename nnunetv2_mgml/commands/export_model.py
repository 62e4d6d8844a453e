"""``mgml export-model``: one zip with a model and all that a receiver needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_checkpoints, add_model_choice, chosen_model_folder
from nnunetv2_mgml.workflows.share import ExportRequest, export_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml export-model``."""
    add_model_choice(parser)
    add_checkpoints(parser)
    parser.add_argument("-o", metavar="ZIP", type=Path, required=True, help="archive to write, or a folder that exists")
    parser.add_argument("--license", metavar="TEXT", help="licence of the weights, for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an archive of this name")


def run(args: argparse.Namespace) -> int:
    """Run ``mgml export-model``; returns the exit code."""
    folds = None if args.f is None else tuple(args.f)
    model = chosen_model_folder(args)
    written = export_model(ExportRequest(model, args.o, folds, args.chk, args.license or "", args.overwrite))
    print(f"model: {written.path} ({written.path.stat().st_size / 2**20:.1f} MB, {len(written.files)} files)")
    if not written.has_report:
        print(
            "note: the model folder has no subset_report.json, so predictions cannot say which quality to expect; "
            "'mgml evaluate --write_subset_report' makes it"
        )
    if not args.license:
        print("note: the model card states no licence; give one with --license")
    if written.first_stage is not None:
        print(
            f"note: this second stage of a cascade needs the predictions of {written.first_stage}, which is not in the "
            f"archive; export that model, too"
        )
    print("The receiver types, with nnUNet_results set and nnunetv2_mgml installed:")
    for command in written.commands:
        print(f"  {command}")
    return 0
