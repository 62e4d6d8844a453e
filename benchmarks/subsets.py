"""Time of all modality subsets of one case against one full prediction and against separate ones, in one process.

    python benchmarks/subsets.py -m MODEL_FOLDER -i nnUNet_raw/Dataset901_Phantom/imagesTs -l .../labelsTs --case NAME

*files*: from image files to label maps on disk: loading the model, reading, preprocessing, prediction, export (and, for
all subsets, Dice). *network*: the sliding window on a preprocessed case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nnunetv2_mgml.commands.main import main as mgml
from nnunetv2_mgml.inference.subsets.predictor import SubsetPredictor
from nnunetv2_mgml.modalities import Subset, all_subsets
from nnunetv2_mgml.network.interface import seeing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", required=True, type=Path, help="model folder")
    parser.add_argument("-f", default="0", help="fold")
    parser.add_argument("-i", required=True, type=Path, help="images")
    parser.add_argument("-l", required=True, type=Path, help="label maps")
    parser.add_argument("--case", required=True, help="name of one case there")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions; the median counts")
    parser.add_argument("--cpu_bfloat16", action="store_true", help="predict in bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, source, pattern in (("images", args.i, f"{args.case}_????.*"), ("labels", args.l, f"{args.case}.*")):
            (work / name).mkdir()
            for file in source.glob(pattern):
                os.symlink(file.resolve(), work / name / file.name)
        report("files", in_turns(files(work, args), args.repeats))
        report("network", in_turns(network(work, args), args.repeats))


def files(work: Path, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return the commands of a user, each writing to a folder of its own."""
    precision = ["--cpu_bfloat16"] if args.cpu_bfloat16 else []
    common = ["-m", str(args.m), "-f", args.f, "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta", *precision]

    def predict(subset: str) -> None:
        channels = model_channels(args)
        missing = [name for name in channels if name not in subset.split("+")]
        run(
            [
                "predict",
                *common,
                "-i",
                str(work / "images"),
                "-o",
                tempfile.mkdtemp(dir=work),
                "--missing_modalities",
                *(missing or ["auto"]),
                *(["--backend", args.backend] if getattr(args, "backend", None) else []),
            ]
        )

    def everything() -> None:
        run(
            [
                "evaluate",
                *common,
                "-i",
                str(work / "images"),
                "-l",
                str(work / "labels"),
                "-o",
                tempfile.mkdtemp(dir=work),
                "--metrics",
                "dice",
                "-np",
                "0",
                "--disable_progress_bar",
            ]
        )

    names = [
        "+".join(name for name, present in zip(model_channels(args), subset, strict=True) if present)
        for subset in all_subsets(len(model_channels(args)))
    ]
    full = max(names, key=lambda name: name.count("+"))
    return {"one": lambda: predict(full), "all": everything, "separately": lambda: [predict(n) for n in names] and None}


def network(work: Path, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Return the predictions alone, of a case preprocessed once."""
    predictor = load(args)
    subsets = all_subsets(len(predictor.channels))
    files = sorted(str(file) for file in (work / "images").iterdir())
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case(
        files, None, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )

    def predict(subset: Subset) -> None:
        with seeing(predictor.network, subset):
            predictor.predict_logits_from_preprocessed_data(torch.from_numpy(np.asarray(data)))

    def separately() -> None:
        for subset in subsets:
            predict(subset)

    return {
        "one": lambda: predict((True,) * len(predictor.channels)),
        "separately": separately,
        "all": lambda: predictor.predict_subsets(np.asarray(data), subsets) is None,
    }


def load(args: argparse.Namespace) -> SubsetPredictor:
    """Return the model, without mirroring."""
    predictor = SubsetPredictor(
        use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False, cpu_bfloat16=args.cpu_bfloat16
    )
    predictor.initialize_from_trained_model_folder(str(args.m), (int(args.f),), "checkpoint_final.pth")
    return predictor


def model_channels(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the model's modalities in channel order."""
    import json

    from nnunetv2_mgml.modalities import channel_names

    return channel_names(json.loads((args.m / "dataset.json").read_text()))


def run(arguments: list[str]) -> None:
    """Run a command of ours in this process, silently."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code = mgml(arguments)
        except SystemExit as end:  # nnU-Net's entry points end so
            code = end.code
    if code:
        raise RuntimeError(f"mgml {' '.join(arguments)} ended with {code}:\n{output.getvalue()[-2000:]}")


def in_turns(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return median seconds, timed in turns after one call of the first that is not counted."""
    next(iter(functions.values()))()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(what: str, seconds: dict[str, float]) -> None:
    one = seconds["one"]
    print(
        f"{what:8} one full prediction {one:.2f} s; all subsets {seconds['all']:.2f} s (x {seconds['all'] / one:.2f})"
        f"; one by one {seconds['separately']:.2f} s (x {seconds['separately'] / one:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
