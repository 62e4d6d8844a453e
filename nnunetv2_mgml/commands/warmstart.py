"""``mgml warmstart``: what a training would take from a checkpoint, and a file of it for ``-pretrained_weights``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml warmstart``."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="of a stock nnU-Net with the same plans, of a model of this plugin (also with other modalities or "
        "labels), or of nnU-Net's self-supervised pretraining with one channel",
    )
    parser.add_argument("-d", metavar="DATASET", required=True, help="id or name of the dataset to be trained on")
    parser.add_argument("-c", metavar="CONFIGURATION", default="3d_fullres", help="configuration to be trained")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerMGML", help="trainer to be used")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans to be used")
    parser.add_argument(
        "--use",
        nargs="+",
        metavar="MODALITY=SOURCE",
        default=[],
        help="start a modality from another one of the checkpoint, for example t1ce=t1; by name otherwise",
    )
    parser.add_argument(
        "--channels",
        nargs="+",
        metavar="NAME",
        help="modalities of the checkpoint in channel order, where it does not say so itself",
    )
    parser.add_argument("-o", metavar="FILE", type=Path, help="checkpoint to write; without it only the table is shown")
    parser.add_argument("--overwrite", action="store_true", help="replace a file of this name")


def run(args: argparse.Namespace) -> int:
    """Run ``mgml warmstart``; returns the exit code."""
    from nnunetv2_mgml.training.warm_start import WarmStartRequest, warm_start  # torch is slow to import

    request = WarmStartRequest(
        checkpoint=args.checkpoint,
        dataset=args.d,
        configuration=args.c,
        trainer=args.tr,
        plans=args.p,
        stands_for=parse_use(args.use),
        channels=args.channels,
        output=args.o,
        overwrite=args.overwrite,
    )
    folder, taken = warm_start(request)
    print(f"{args.tr} on {folder.name} takes from {args.checkpoint}:")
    print("\n".join(taken.lines()))
    if args.o is not None:
        print(f"Written: {args.o}")
    file = args.o if args.o is not None else args.checkpoint
    print(f"Train with: nnUNetv2_train {args.d} {args.c} 0 -tr {args.tr} -p {args.p} -pretrained_weights {file}")
    if args.o is None and (args.use or args.channels):
        print("note: -pretrained_weights knows no --use and no --channels; write a file with -o and start from that.")
    return 0


def parse_use(entries: Sequence[str]) -> dict[str, str]:
    """Parse ``--use``.

    Raises:
        ValueError: an entry that is not ``MODALITY=SOURCE``.
    """
    pairs = {}
    for entry in entries:
        name, separator, source = entry.partition("=")
        if not (name and separator and source):
            raise ValueError(f"'{entry}' is not of the form MODALITY=SOURCE, for example t1ce=t1.")
        pairs[name] = source
    return pairs
