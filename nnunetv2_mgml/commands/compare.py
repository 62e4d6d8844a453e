"""``mgml compare A B ...``: paired comparison of evaluation folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_evaluations
from nnunetv2_mgml.presentation.tables import comparison_markdown
from nnunetv2_mgml.scoring.metrics import all_metrics
from nnunetv2_mgml.workflows.compare import ComparisonRequest, compare_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml compare``."""
    add_evaluations(parser, "; the first is the baseline")
    parser.add_argument(
        "-o",
        type=Path,
        metavar="OUT",
        help="folder for comparison.md, .csv, .json, the stacked table.md, table.tex and figures; "
        "without it the table is only printed",
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names in tables, in the order of the folders")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["dice"],
        choices=tuple(all_metrics()),
        metavar="METRIC",
        help=f"what to compare, of {', '.join(all_metrics())}",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def run(args: argparse.Namespace) -> int:
    """Run ``mgml compare``; returns the exit code."""
    comparison = compare_folders(
        ComparisonRequest(
            folders=args.evaluations,
            names=args.names,
            metrics=args.metrics,
            common_cases=args.common_cases,
            seed=args.seed,
            output=args.o,
        )
    )
    print(comparison_markdown(comparison.table, comparison.evaluations, args.seed))
    if args.o is not None:
        if comparison.no_sheet is not None:
            print(f"no figure of predictions side by side: {comparison.no_sheet}")
        print(f"written to {args.o}")
    return 0
