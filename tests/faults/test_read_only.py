"""A disk that is read-only, also for root: every command names the folder, fails, and leaves whole what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from builders import plans
from conversion_cases import write_cases
from evaluation_cases import write_study
from inference_cases import write_image
from kept_model_cases import FIXTURE, MODEL

from nnunetv2_mgml.commands import main as cli

if TYPE_CHECKING:
    from conftest import Disk


def write_plans(disk: Disk) -> None:
    folder = disk.folder / "preprocessed" / "Dataset900_Phantom"
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans()))
    (folder / "dataset.json").write_text((FIXTURE / MODEL / "dataset.json").read_text())


@pytest.mark.parametrize("command", ["brats", "back", "images", "predict", "evaluate", "plan", "check"])
def test_a_read_only_folder(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(disk.folder / name))
        (disk.folder / name).mkdir()
    write_cases(tmp_path / "source", 1)
    study = write_study(tmp_path / "study", cases=1)
    (tmp_path / "labels").mkdir()
    write_image(tmp_path / "labels" / "a.nii.gz", np.ones((4, 5, 6), np.uint8))
    write_plans(disk)
    out, source = disk.folder / "out", str(tmp_path / "source")
    call = {
        "brats": ["convert", "brats", source, "-d", "7", "--name", "A", "-np", "0"],
        "back": ["convert", "back", str(tmp_path / "labels"), str(out), "--to", "brats2021", "-np", "0"],
        "images": ["convert", "images", source, str(out), "-np", "0"],
        "evaluate": ["evaluate", "--predictions", f"{study}/predictions", "-l", f"{study}/labels", "-o", str(out)],
        "plan": ["plan", "-d", "900", "--set", "num_epochs=3"],
        "check": ["check", "7", "-o", str(out), "-np", "0"],
        "predict": ["predict", "-i", str(FIXTURE / "images"), "-o", str(out), "-m", str(FIXTURE / MODEL), "-f", "0"],
    }[command]
    call += {
        "evaluate": ["-np", "0", "--no_figures"],
        "predict": ["-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta", "--missing_modalities", "auto"],
    }.get(command, [])
    if command == "check":
        assert cli.main(["convert", "brats", source, "-d", "7", "--name", "A", "-np", "0"]) == 0
    before = disk.files()
    disk.writable(False)
    try:
        capsys.readouterr()
        code = run(call)
        error = capsys.readouterr().err
    finally:
        disk.writable(True)
    assert code not in (0, None)
    told = error[error.index("error: ") :]
    assert str(disk.folder) in told
    assert "Read-only" in told
    assert ".mgml_" not in told
    assert "Traceback" not in told
    assert disk.files() == before
    assert run(call) == 0


def run(call: list[str]) -> int:
    try:
        return cli.main(call)
    except SystemExit as stopped:
        return int(stopped.code or 0)
