"""``mgml demo``: the whole chain on synthetic patients, with the commands a user would type, on a CPU in minutes."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunetv2_mgml.workflows.demo import LEARNED, DemoRequest, run_demo
from nnunetv2_mgml.workflows.installation import find_installation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml demo``."""
    parser.add_argument("-o", "--output", type=Path, default=Path("mgml_demo"), help="folder to work in")
    parser.add_argument("--overwrite", action="store_true", help="delete that folder first if it exists")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), default="cpu", help="where to train and predict")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="options for `mgml plan` on top of the demo's own, such as num_epochs=50",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``mgml demo``; the exit code is 1 where the model has not learned what it should."""
    result = run_demo(
        DemoRequest(
            folder=args.output,
            overwrite=args.overwrite,
            device=args.device,
            options=args.set,
            stock_commands=find_installation().active,
        ),
        _say,
    )
    _say(
        f"\n{result.table}\nFigure: {result.figure}\nCurves: {result.model_folder / 'fold_0' / 'mgml_progress.png'}\n"
        f"Model:  {result.model_folder}\nReport: {result.report} (open it in a browser)\n"
        f"Everything took {result.minutes:.1f} minutes."
    )
    for subset, dice in result.too_low.items():
        _say(f"The model has not learned: whole-tumour Dice {dice:.2f} from {subset}, expected {LEARNED[subset]}.")
    return 1 if result.too_low else 0


def _say(text: str) -> None:
    print(text, flush=True)
