"""The whole chain on synthetic patients, with the commands a user would type, on a CPU in minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

DATASET_ID = 901
DATASET = f"Dataset{DATASET_ID}_Phantom"
PLANS = "nnUNetMGMLPlans"
SPLIT = (24, 1, 4)
"""Phantoms for training, validation and testing."""

OPTIONS: dict[str, object] = {
    "num_epochs": 15,
    "num_iterations_per_epoch": 20,
    "num_val_iterations_per_epoch": 4,
    "patch_size": [40, 48, 40],
    "augmentation": "paper",
    "optimizer": "adam",
    "initial_lr": 0.005,
    "weight_decay": 1e-4,
    "seed": 0,
    "validate_subsets": False,
}
"""300 steps, of the default's network: Adam gets further in so few than nnU-Net's SGD."""

SUBSETS: dict[str, tuple[str, ...]] = {
    "t1+t1ce+t2+flair": (),
    "t1+t2+flair": ("t1ce",),
    "t1+t1ce+t2": ("flair",),
    "t1": ("t1ce", "t2", "flair"),
}
"""Subset -> the names given to ``--missing_modalities``."""

STEPS = 8
PATIENCE = 15
"""Minutes of training from which on the user is told how to do with less."""
MARKER = "mgml_demo.txt"
LEARNED = {"t1+t1ce+t2+flair": 0.75, "t1": 0.4}
"""Subset -> mean whole-tumour Dice that a working installation reaches at least."""


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """Where to work, and on what."""

    folder: Path
    overwrite: bool = False
    """Delete that folder first where an earlier demo made it."""
    device: str = "cpu"
    """``cpu``, ``cuda`` or ``mps``."""
    options: Sequence[str] = ()
    """``KEY=VALUE`` for ``mgml plan --set`` on top of `OPTIONS`."""
    stock_commands: bool = True
    """Whether nnU-Net's own commands know our trainers and flags: only where the start-up line runs."""


@dataclass(frozen=True)
class DemoResult:
    """What came of it."""

    table: str
    """Dice of every subset, as Markdown."""
    figure: Path
    report: Path
    """The page with all scores and a slice viewer."""
    model_folder: Path
    minutes: float
    too_low: dict[str, float]
    """Subset -> mean whole-tumour Dice, where it is below `LEARNED`; empty for a working installation."""


def run_demo(request: DemoRequest, say: Callable[[str], None]) -> DemoResult:
    """Run every step; commands and what they are for are said as they start.

    Raises:
        ValueError: the folder exists and is not to be, or cannot be, overwritten; or a command failed.
    """
    root = request.folder.resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        if not request.overwrite or not (root / MARKER).is_file():
            raise ValueError(
                f"{root} exists. Choose another folder with -o"
                f"{', or replace it with --overwrite' if (root / MARKER).is_file() else ''}."
            )
        shutil.rmtree(root)
    demo = _Demo(root, request, say)
    demo.write_phantoms()
    demo.convert_and_plan()
    demo.train()
    demo.predict()
    table = demo.evaluate()
    figure = demo.draw()
    report = demo.report()
    return DemoResult(table, figure, report, demo.model_folder, demo.minutes, demo.too_low())


def _cpu_has_bfloat16() -> bool:
    """Whether Linux reports bfloat16 instructions; where it does not, autocast would be slower than float32."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16"))


class _Demo:
    """The steps, in one working folder."""

    def __init__(self, root: Path, request: DemoRequest, say: Callable[[str], None]) -> None:
        self.root = root
        self.request = request
        self.say = say
        self.logs = root / "logs"
        self.logs.mkdir(parents=True)
        (root / MARKER).write_text("Written by mgml demo; --overwrite deletes only folders that hold this file.\n")
        folders = {f"nnUNet_{name}": str(root / f"nnUNet_{name}") for name in ("raw", "preprocessed", "results")}
        # nnU-Net starts 8 export workers by default; each takes seconds to import torch
        self.environment = {**os.environ, "nnUNet_def_n_proc": "2", "PYTHONUNBUFFERED": "1", **folders}
        self.raw = root / "nnUNet_raw" / DATASET
        self.model_folder = root / "nnUNet_results" / DATASET / f"nnUNetTrainerMGML__{PLANS}__3d_fullres"
        self.evaluation = root / "evaluation"
        self.step = 0
        self.started = time.perf_counter()

    @property
    def minutes(self) -> float:
        """How long it has been running."""
        return (time.perf_counter() - self.started) / 60

    def write_phantoms(self) -> None:
        """Step 1."""
        from nnunetv2_mgml.phantom import write_phantoms

        self._announce(f"writing {sum(SPLIT)} synthetic patients in the BraTS file layout")
        write_phantoms(self.root / "BraTS_phantom", sum(SPLIT), seed=0)

    def convert_and_plan(self) -> None:
        """Steps 2 and 3."""
        self._announce("converting to nnU-Net's raw format, with held-out patients")
        self._call(
            "convert",
            "mgml",
            "convert",
            "brats",
            str(self.root / "BraTS_phantom"),
            "-d",
            str(DATASET_ID),
            "--name",
            "Phantom",
            "--split",
            ":".join(map(str, SPLIT)),
        )
        self._announce("planning and preprocessing with stock nnU-Net, then choosing our options")
        self._call("preprocess", "nnUNetv2_plan_and_preprocess", "-d", str(DATASET_ID), "-c", "3d_fullres", "-np", "2")
        asked = {assignment.partition("=")[0] for assignment in self.request.options}
        defaults = {**OPTIONS, "cpu_bfloat16": _cpu_has_bfloat16()}
        kept = [f"{key}={json.dumps(value)}" for key, value in defaults.items() if key not in asked]
        options = (*kept, *self.request.options)
        self._call("plan", "mgml", "plan", "-d", str(DATASET_ID), "-c", "3d_fullres", "--set", *options)

    def train(self) -> None:
        """Step 4."""
        self._announce("training one model for all 15 subsets of T1, T1ce, T2 and FLAIR")
        plans = json.loads((self.root / "nnUNet_preprocessed" / DATASET / f"{PLANS}.json").read_text())
        self._call_nnunet(
            "train",
            "train",
            str(DATASET_ID),
            "3d_fullres",
            "0",
            "-tr",
            "nnUNetTrainerMGML",
            "-p",
            PLANS,
            "-device",
            self.request.device,
            epochs=plans["mgml"]["config"]["num_epochs"],
        )

    def predict(self) -> None:
        """Step 5: the held-out patients with some sequences named as missing, and with files that are not there."""
        self._announce("predicting the held-out patients with all sequences and with some missing")
        for subset, missing in SUBSETS.items():
            self._predict(self.raw / "imagesTs", self.root / "predictions" / subset, *missing)
        holes = self.root / "images_without_t1ce"
        holes.mkdir()
        for image in (self.raw / "imagesTs").glob("*.nii.gz"):
            if not image.name.endswith("_0001.nii.gz"):
                shutil.copy(image, holes)
        self._predict(holes, self.root / "predictions_auto", "auto")

    def _predict(self, images: Path, output: Path, *missing: str) -> None:
        flag = ("--missing_modalities", *missing) if missing else ()
        self._call_nnunet(
            f"predict_{output.name}",
            "predict",
            "-i",
            str(images),
            "-o",
            str(output),
            "-d",
            str(DATASET_ID),
            "-c",
            "3d_fullres",
            "-f",
            "0",
            "-tr",
            "nnUNetTrainerMGML",
            "-p",
            PLANS,
            "-device",
            self.request.device,
            "-npp",
            "0",
            "-nps",
            "0",
            "--disable_tta",
            *flag,
        )

    def evaluate(self) -> str:
        """Step 6: scores of all subsets; returns the Dice table, the first of ``table.md``."""
        self._announce("predicting the held-out patients from all 15 subsets, and scoring")
        self._call(
            "evaluate",
            "mgml",
            "evaluate",
            "-m",
            str(self.model_folder),
            "-f",
            "0",
            "-i",
            str(self.raw / "imagesTs"),
            "-l",
            str(self.raw / "labelsTs"),
            "-o",
            str(self.evaluation),
            "-device",
            self.request.device,
            "--disable_tta",
            "-npp",
            "0",
            "-nps",
            "0",
            "--name",
            "MGML demo",
        )
        return (self.evaluation / "table.md").read_text(encoding="utf-8").partition("\n\n**HD95")[0]

    def draw(self) -> Path:
        """Step 7: one figure to look at."""
        from nnunetv2_mgml.presentation.demo_figure import draw_demo_figure

        self._announce("drawing")
        path = self.root / "demo.png"
        draw_demo_figure(self.raw, self.root / "predictions", self.evaluation, list(SUBSETS), path)
        return path

    def report(self) -> Path:
        """Step 8: one page with all scores and a slice viewer of the held-out patients."""
        self._announce("writing the report, with a slice viewer of the held-out patients")
        path = self.root / "report.html"
        cases = str(SPLIT[2])
        self._call("report", "mgml", "report", str(self.evaluation), "-o", str(path), "--max_cases", cases)
        return path

    def too_low(self) -> dict[str, float]:
        """Return subset -> mean whole-tumour Dice where it is not what it should be."""
        from nnunetv2_mgml.scoring.results import load_evaluation

        reached = load_evaluation(self.evaluation).summary("dice", "whole_tumor")
        return {subset: reached[subset]["mean"] for subset, bound in LEARNED.items() if reached[subset]["mean"] < bound}

    def _announce(self, what: str) -> None:
        self.step += 1
        since = f" (after {self.minutes:.0f} min)" if self.step > 1 else ""
        self.say(f"\n[{self.step}/{STEPS}] {what}{since}")

    def _call_nnunet(self, log: str, name: str, *arguments: str, epochs: int | None = None) -> None:
        """Run nnU-Net's ``train`` or ``predict``, by way of ``mgml`` where nnU-Net's own would not know our flags."""
        command = (f"nnUNetv2_{name}",) if self.request.stock_commands else ("mgml", name)
        self._call(log, *command, *arguments, epochs=epochs)

    def _call(self, log: str, command: str, *arguments: str, epochs: int | None = None) -> None:
        """Show and run a command; its output goes to a log file, epochs to a progress bar."""
        self.say(f"  $ {command} {' '.join(arguments)}")
        path = self.logs / f"{log}.txt"
        ends: list[float] = []
        with (
            open(path, "w", encoding="utf-8") as file,
            subprocess.Popen(
                [_script(command), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            ) as process,
            tqdm(total=epochs, unit="epoch", disable=epochs is None) as bar,
        ):
            for line in process.stdout or ():
                file.write(line)
                if epochs is not None and re.search(r"Epoch time:", line):
                    bar.update()
                    ends.append(time.perf_counter())
                    if len(ends) == 2 < epochs:  # the first epoch also starts the loaders
                        bar.clear()
                        self.say(_remaining(ends[1] - ends[0], epochs - 2))
                if epochs is not None and (match := re.search(r"Pseudo dice \[(.*)\]", line)):
                    bar.set_postfix_str("pseudo Dice " + " ".join(re.findall(r"0\.\d\d|nan", match.group(1))))
        if process.returncode != 0:
            tail = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[-25:])
            raise ValueError(
                f"'{command}' ended with exit code {process.returncode}. Its last lines, from {path}:\n{tail}"
            )


def _remaining(seconds: float, epochs: int) -> str:
    """Return what an epoch's seconds say of those that are left, for the user."""
    left = seconds * epochs / 60
    text = f"  the training ends in about {max(round(left), 1)} min; predictions and scores of 15 subsets follow"
    return text if left < PATIENCE else f"{text}. Ctrl-C ends the demo; --set num_epochs=5 makes a shorter one"


def _script(command: str) -> str:
    """Return the command of this very environment, so that the demo tests the installation it came with."""
    found = shutil.which(command, path=str(Path(sys.executable).parent)) or shutil.which(command)
    if found is None:
        raise FileNotFoundError(
            f"The command '{command}' is not installed beside {sys.executable}. Install the plugin with pip first."
        )
    return found
