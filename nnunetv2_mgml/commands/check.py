"""``mgml check``: what a raw data set has and lacks, before anything is trained on it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_processes
from nnunetv2_mgml.workflows.check import check_dataset, describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml check``."""
    parser.add_argument("dataset", metavar="DATASET", help="dataset id or name; its raw data are read")
    parser.add_argument("-o", type=Path, metavar="OUT", help="folder for check.json and check.png, one page of figures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Run ``mgml check``; return 0, whatever was found."""
    check = check_dataset(args.dataset, args.o, num_processes=args.num_processes, progress=True)
    print(json.dumps(check.as_dict(), indent=2) if args.json else "\n".join(describe(check)))
    if args.o is not None and not args.json:
        print(f"\nwritten to {args.o}")
    return 0
