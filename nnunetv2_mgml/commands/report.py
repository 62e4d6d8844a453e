"""``mgml report``: one self-contained HTML page about an evaluation, to be opened in any browser, offline."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mgml.commands.arguments import add_trust, changed_options, parse_predictions
from nnunetv2_mgml.workflows.report import InternalsRequest, ReportRequest, make_report

_VIEWER_OPTIONS = ("-l", "--predictions", "--dataset_json", "--max_cases", "--cases", "--max_megabytes")
_INSIDE_OPTIONS = ("-m", "-f", "-chk", "-device", "--trust_checkpoint")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml report``."""
    parser.add_argument("evaluation", metavar="EVALDIR", type=Path, help="folder written by `mgml evaluate`")
    parser.add_argument(
        "-o", metavar="FILE", type=Path, help="the page (.html), or a folder; report.html in EVALDIR by default"
    )
    parser.add_argument("--title", help="heading of the page; the evaluation's name by default")
    parser.add_argument(
        "--training_log",
        metavar="FILE",
        type=Path,
        help="mgml_training_log.csv, for the training curves; by default those of the folds that were evaluated",
    )
    viewer = parser.add_argument_group("slice viewer", "needs images; without them the page has tables and charts")
    viewer.add_argument(
        "-i",
        metavar="IMAGES",
        type=Path,
        help="folder of images (CASE_0000, CASE_0001, ..., or the names of BraTS), or a sheet; by default what the "
        "evaluation used",
    )
    viewer.add_argument("--no_images", action="store_true", help="no viewer: the page then shows no patient")
    viewer.add_argument(
        "-l", metavar="LABELS", type=Path, help="folder of reference label maps; by default the one the evaluation used"
    )
    viewer.add_argument(
        "--predictions",
        nargs="+",
        metavar="SUBSET=FOLDER",
        help="label maps as for `mgml evaluate`: one root whose folders are named by subset, or one "
        "folder per subset; by default those the evaluation wrote or used",
    )
    viewer.add_argument(
        "--dataset_json",
        metavar="FILE",
        type=Path,
        help="dataset.json with the file ending; else searched beside images, labels and predictions",
    )
    viewer.add_argument(
        "--max_cases",
        metavar="N",
        type=int,
        default=4,
        help="cases in the viewer, at evenly spaced ranks from worst to best",
    )
    viewer.add_argument("--cases", nargs="+", metavar="CASE", help="these cases instead")
    viewer.add_argument(
        "--max_megabytes",
        metavar="MB",
        type=float,
        default=15.0,
        help="size of the viewer's data; cases that do not fit are left out, and the page says so",
    )
    inside = parser.add_argument_group(
        "inside the network",
        "predictions of each modality alone, soft label, confidence and features of one case (needs its images)",
    )
    inside.add_argument(
        "--internals",
        metavar="CASE",
        nargs="?",
        const="",
        help="compute them for this case; the first one of the viewer if none is named",
    )
    inside.add_argument(
        "-m",
        metavar="MODEL_FOLDER",
        type=Path,
        help="model folder TRAINER__PLANS__CONFIGURATION; by default the one that was evaluated",
    )
    inside.add_argument(
        "-f",
        metavar="FOLD",
        help="fold; by default the one that predicted the case, else the first one that was evaluated, else 0",
    )
    inside.add_argument("-chk", metavar="FILE", help="checkpoint; by default the one that was evaluated")
    inside.add_argument("-device", default="cpu", choices=("cuda", "cpu", "mps"), help="where the network runs")
    add_trust(inside)


def run(args: argparse.Namespace) -> int:
    """Run ``mgml report``; returns the exit code."""
    if args.no_images and args.i is not None:
        raise ValueError("-i gives images and --no_images wants none. Leave one of the two out.")
    if args.no_images and (given := changed_options(args, add_arguments, _VIEWER_OPTIONS)):
        raise ValueError(
            f"--no_images wants no slice viewer, which is what {', '.join(given)} would change. Leave one out."
        )
    if args.internals is None and (given := changed_options(args, add_arguments, _INSIDE_OPTIONS)):
        raise ValueError(
            f"{', '.join(given)} would change what --internals shows. Give --internals too, or leave it out."
        )
    inside = None
    if args.internals is not None:
        inside = InternalsRequest(args.internals or None, args.m, args.f, args.chk, args.device, args.trust_checkpoint)
    report = make_report(
        ReportRequest(
            evaluation=args.evaluation,
            output=args.o,
            title=args.title,
            training_log=args.training_log,
            show_cases=not args.no_images,
            images=args.i,
            labels=args.l,
            predictions=parse_predictions(args.predictions) if args.predictions else None,
            dataset_json=args.dataset_json,
            cases=args.cases,
            max_cases=args.max_cases,
            max_megabytes=args.max_megabytes,
            internals=inside,
        )
    )
    images = ", with images of patients" if report.shows_patients else ""
    print(f"report: {report.path} ({report.megabytes:.1f} MB{images})")
    return 0
