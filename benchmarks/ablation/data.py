"""Makes the data sets of the ablation: phantoms from a seed, or 2 mm copies of real cases; both through the plugin."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from nnunetv2_mgml.phantom import Difficulty, write_phantoms
from nnunetv2_mgml.upstream.registration import EXT_DIR

ONE_THREAD = Path(__file__).parent / "one_thread.py"
MARKER = "ablation.json"
"""Written into the preprocessed folder when it is complete: the settings it was made from."""


def environment(work: Path) -> dict[str, str]:
    """Return the environment of nnU-Net's commands: its folders below ``work``, one thread, no worker processes."""
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    return {
        **os.environ,
        **folders,
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "nnUNet_extTrainer": EXT_DIR,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def folder_name(data: dict[str, Any]) -> str:
    """Return nnU-Net's name of a data set."""
    return f"Dataset{data['id']:03d}_{data['name']}"


def call(work: Path, log: Path, command: Sequence[str], **more: str) -> None:
    """Run a command of this Python environment, output to a log.

    Raises:
        RuntimeError: it failed; the message ends with the log's last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        code = subprocess.run(
            [sys.executable, str(ONE_THREAD), *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment(work), **more},
            check=False,
        ).returncode
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"{command[0]} ended with exit code {code}; see {log}:\n{tail}")


def prepare(work: Path, data: dict[str, Any]) -> None:
    """Convert, preprocess and split a data set unless that is done; remade from scratch when its settings changed.

    Runners that share a work folder wait for each other here.

    Raises:
        FileNotFoundError: real cases are asked for and ``MGML_REAL_DATA`` names no folder.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _prepare(work, data)


def _prepare(work: Path, data: dict[str, Any]) -> None:
    preprocessed = work / "preprocessed" / folder_name(data)
    marker = preprocessed / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == data:
        return
    source = work / "source" / data["name"]
    for folder in (source, preprocessed, work / "raw" / folder_name(data), work / "results" / folder_name(data)):
        shutil.rmtree(folder, ignore_errors=True)
    log = work / "logs" / f"{data['name']}.txt"
    convert = ["mgml", "convert", "brats", str(source), "-d", str(data["id"]), "--name", data["name"]]
    if data["kind"] == "phantom":
        write_phantoms(
            source,
            data["cases"],
            data["seed"],
            tuple(data["shape"]),
            tuple(data["spacing_mm"]),
            difficulty=Difficulty(**data["difficulty"]),
        )
        convert += ["--split", data["split"], "--seed", str(data["seed"])]
    else:
        write_real(source, data["spacing_mm"], data.get("folders", ("brats2021", "brats2023")))
    call(work, log, convert)
    call(
        work,
        log,
        ["nnUNetv2_plan_and_preprocess", "-d", str(data["id"]), "-c", "3d_fullres", "-np", "2"],
        nnUNet_n_proc_DA="2",
    )
    if data["kind"] == "real":
        split_real(preprocessed, work / "raw" / folder_name(data), data)
    marker.write_text(json.dumps(data))


def write_real(target: Path, spacing: Sequence[float], folders: Sequence[str]) -> None:
    """Write resampled copies of the BraTS cases in folders of ``MGML_REAL_DATA``, in the layout of BraTS 2021."""
    root = os.environ.get("MGML_REAL_DATA")
    missing = [name for name in folders if not root or not (Path(root) / name).is_dir()]
    if not root or missing:
        raise FileNotFoundError(
            f"MGML_REAL_DATA must name the folder of real cases ({', '.join(folders)}); it is {root or 'not set'}"
            + (f", without {', '.join(missing)}." if root else ".")
        )
    renamed = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": "seg"}
    for case in sorted(case for name in folders for case in (Path(root) / name).glob("*/")):
        for file in sorted(case.glob("*.nii.gz")):
            part = file.name.removesuffix(".nii.gz").removeprefix(case.name)[1:]
            image = sitk.ReadImage(str(file))
            if part == "seg":
                image = sitk.Cast(image, sitk.sitkUInt8)
                if case.parent.name == "brats2023":
                    image = sitk.ChangeLabel(image, {3: 4})
            part = renamed.get(part, part)
            (target / case.name).mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(
                resampled(image, spacing, part == "seg"), str(target / case.name / f"{case.name}_{part}.nii.gz"), True
            )


def resampled(image: sitk.Image, spacing: Sequence[float], labels: bool) -> sitk.Image:
    """Resample to a spacing (mm along z, y, x) over the same extent; images are smoothed first, against aliasing."""
    spacing = [float(s) for s in reversed(spacing)]
    size = [
        max(1, round(n * old / new)) for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)
    ]
    if not labels:
        sigma = [0.4 * new if new > old else 1e-3 for old, new in zip(image.GetSpacing(), spacing, strict=True)]
        brain = sitk.Cast(image != 0, sitk.sitkFloat32)
        smooth = sitk.SmoothingRecursiveGaussian(sitk.Cast(image, sitk.sitkFloat32), sigma)
        image = smooth * brain
    return sitk.Resample(
        image,
        size,
        sitk.Transform(),
        sitk.sitkNearestNeighbor if labels else sitk.sitkLinear,
        image.GetOrigin(),
        spacing,
        image.GetDirection(),
        0.0,
        image.GetPixelID(),
    )


def split_real(preprocessed: Path, raw: Path, data: dict[str, Any]) -> None:
    """Write ``splits_final.json``: seeded cross-validation over all cases."""
    names = sorted({path.name.rsplit("_", 1)[0] for path in (raw / "imagesTr").glob("*.nii.gz")})
    random.Random(data["seed"]).shuffle(names)
    folds = [sorted(names[k :: data["folds"]]) for k in range(data["folds"])]
    splits = [{"train": sorted(set(names) - set(val)), "val": val} for val in folds]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits, indent=4))
