"""``mgml export-network``: a trained network as ONNX and OpenVINO files."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_checkpoints, add_model_choice, add_trust, chosen_model_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml export-network``."""
    add_model_choice(parser)
    add_checkpoints(parser)
    parser.add_argument("-o", metavar="FOLDER", type=Path, required=True, help="folder to write; it must not exist")
    add_trust(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``mgml export-network``; returns the exit code."""
    from nnunetv2_mgml.workflows.export_network import NetworkExportRequest, export_network  # torch is slow to import

    folds = None if args.f is None else tuple(args.f)
    written = export_network(
        NetworkExportRequest(chosen_model_folder(args), args.o, folds, args.chk, args.trust_checkpoint)
    )
    for file in written.files:
        print(f"{file} ({file.stat().st_size / 2**20:.1f} MB)")
    print(
        f"Checked against PyTorch on every subset: logits differ by at most {written.difference:.1e}; what an absent "
        f"modality holds changes nothing."
    )
    return 0
