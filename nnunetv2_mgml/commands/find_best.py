"""``mgml find-best A B ...``: which model, and which post-processing, over all subsets of the modalities."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_evaluations
from nnunetv2_mgml.workflows.find_best import CHOICE, INSTRUCTIONS, POSTPROCESSING, BestRequest, find_best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml find-best``."""
    add_evaluations(parser, " for the same cases: one per configuration, trainer or ensemble")
    parser.add_argument(
        "-o", type=Path, metavar="OUT", required=True, help=f"folder for {CHOICE}, {INSTRUCTIONS}, {POSTPROCESSING}"
    )
    parser.add_argument("--no_postprocessing", action="store_true", help="choose the model only")
    parser.add_argument(
        "--plans",
        type=Path,
        metavar="MODEL_FOLDER",
        help="plans.json, or a model folder with it, for post-processing: of a member, where the best is an ensemble "
        "that was merged from models that are no candidates",
    )
    parser.add_argument("-np", type=int, default=2, metavar="N", help="processes for post-processing")


def run(args: argparse.Namespace) -> int:
    """Run ``mgml find-best``; returns the exit code."""
    request = BestRequest(
        folders=args.evaluations,
        output=args.o,
        common_cases=args.common_cases,
        postprocessing=not args.no_postprocessing,
        plans=args.plans,
        num_processes=args.np,
    )
    best = find_best(request)
    print("mean Dice (%) over regions: all subsets, complete cases, single modalities")
    for name, means in sorted(best.means.items(), key=lambda entry: -entry[1]["all"]):
        print(f"  {100 * means['all']:5.1f}  {100 * means['complete']:5.1f}  {100 * means['single']:5.1f}  {name}")
    for region, subsets in best.left_out.items():
        print(f"note: left out, as a candidate has no value there: {region} from {', '.join(subsets)}")
    print(f"best over all subsets: {best.folder}")
    if best.best_when_complete != best.folder:
        print(f"note: complete cases alone would choose {best.best_when_complete}")
    if best.before is not None and best.after is not None:
        if best.steps:
            print(
                f"post-processing over all subsets: keep the largest component of {', then of '.join(best.steps)} "
                f"({100 * best.before:.2f} -> {100 * best.after:.2f}, empty regions left out)"
            )
            if best.worse:
                listed = ", ".join(f"{name} (-{100 * loss:.2f})" for name, loss in best.worse.items())
                print(f"note: it lowers {len(best.worse)} subsets; leave it out for these: {listed}")
        else:
            print("post-processing over all subsets: none helps")
    if best.commands:
        print(f"to predict with it ({args.o / INSTRUCTIONS}):")
        print("\n".join(f"  {line}" for line in best.commands))
    print(f"written to {args.o}")
    return 0
