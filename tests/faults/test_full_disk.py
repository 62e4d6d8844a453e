"""A disk that is really full: every command names the file, fails, and leaves whole what was whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conversion_cases import write_cases
from evaluation_cases import write_study
from inference_cases import load, predictor, write_case, write_image, write_model

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.io.files import read_json

if TYPE_CHECKING:
    from conftest import Disk

KILOBYTE = 1024


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("free", [0, 4 * KILOBYTE, 60 * KILOBYTE])
def test_convert(
    disk: Disk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    processes: int,
) -> None:
    if processes and free:
        pytest.skip("one size is enough for worker processes")
    write_cases(tmp_path / "source", 3)
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(disk.folder / name))
        (disk.folder / name).mkdir()
    call = ["convert", "brats", str(tmp_path / "source"), "-d", "7", "--name", "Full", "-np", str(processes)]
    assert cli.main(call) == 0
    before = disk.files()
    disk.leave(free)
    capsys.readouterr()
    assert cli.main([*call, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "Dataset007_Full" in error
    assert ".mgml_" not in error
    assert "disk full" in error or "make room" in error
    assert disk.files() == before
    disk.clear()
    assert cli.main([*call, "--overwrite"]) == 0
    assert disk.files() == before


@pytest.mark.parametrize("free", [0, 4 * KILOBYTE])
def test_convert_back(disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str], free: int) -> None:
    (tmp_path / "in").mkdir()
    for case in range(3):
        labels = np.random.default_rng(case).integers(0, 4, (20, 30, 30)).astype(np.uint8)
        write_image(tmp_path / "in" / f"case_{case}.nii.gz", labels)
    call = ["convert", "back", str(tmp_path / "in"), str(disk.folder / "out"), "--to", "brats2021", "-np", "0"]
    assert cli.main(call) == 0
    before = disk.files()
    disk.leave(free)
    capsys.readouterr()
    assert cli.main([*call, "--overwrite"]) == 2
    out, error = capsys.readouterr()
    assert "Wrote" not in out
    assert str(disk.folder / "out") in error
    assert ".mgml_" not in error
    assert disk.files() == before


def test_predict(disk: Disk, tmp_path: Path) -> None:
    """As a command in a process of its own."""
    model = write_model(tmp_path / "model")
    for seed, name in enumerate("ab"):
        write_case(tmp_path / "in", name, seed=seed)
    out = disk.folder / "out"
    predictor(model).predict_from_files_sequential(str(tmp_path / "in"), str(out))
    whole = disk.files()
    disk.leave(0)
    command = [sys.executable, "-m", "nnunetv2_mgml.commands.predict", "-i", str(tmp_path / "in"), "-o", str(out)]
    options = ["-m", str(model), "-f", "0", "-device", "cpu", "--disable_tta", "-npp", "0", "-nps", "0"]
    done = subprocess.run(
        [*command, *options, "--missing_modalities", "auto"], capture_output=True, text=True, check=False
    )
    assert done.returncode not in (0, None)
    error = done.stderr[done.stderr.index("error: ") :]
    for name in "ab":
        assert f"Case {name}: export failed" in error
        assert f"{out / name}.nii.gz" in error
    assert ".mgml_" not in error
    assert "make room" in error
    assert disk.files() == whole


def test_evaluate(disk: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path / "study", cases=3)
    out = disk.folder / "out"
    call = ["evaluate", "--predictions", str(study / "predictions"), "-l", str(study / "labels"), "-o", str(out)]
    options = ["-np", "0", "--disable_progress_bar", "--no_figures"]
    assert cli.main([*call, *options]) == 0
    kept = {name: content for name, content in disk.files().items() if "cases/" in name}
    disk.leave(0)
    capsys.readouterr()
    write_study(tmp_path / "study", cases=4)  # another case, so that there is something to write
    assert cli.main([*call, *options]) == 2
    error = capsys.readouterr().err
    assert str(out) in error
    assert ".mgml_" not in error
    for name, content in disk.files().items():
        if name.endswith(".json"):
            json.loads(content)
    assert kept.keys() <= disk.files().keys()
    disk.clear()
    assert cli.main([*call, *options]) == 0
    assert read_json(out / "summary.json")["number_of_cases"] == 4


def test_what_a_failing_disk_left_is_predicted_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_model(tmp_path / "model")
    for seed, name in enumerate("abcd"):
        write_case(tmp_path / "in", name, seed=seed)
    ours = predictor(model)
    ours.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"), save_probabilities=True)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix != ".json"}
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"")
    (tmp_path / "out" / "b.nii.gz").write_bytes(whole["b.nii.gz"][:-40])
    write_image(tmp_path / "out" / "c.nii.gz", load(tmp_path / "out" / "c.nii.gz")[1:])
    os.truncate(tmp_path / "out" / "d.npz", len(whole["d.npz"]) // 2)
    ours.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"), True, overwrite=False)
    assert {n: c for n, c in whole.items() if n.endswith(".nii.gz")} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.nii.gz")
    }
    assert (tmp_path / "out" / "d.npz").stat().st_size == len(whole["d.npz"])
    for words in ("a.nii.gz cannot be read", "b.nii.gz cannot be read", "c.nii.gz has (22, 18, 19) voxels", "d.npz"):
        assert words in caplog.text
    assert caplog.text.count("The case is predicted again") == 4
    caplog.clear()
    ours.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"), True, overwrite=False)
    assert "again" not in caplog.text


def test_an_evaluation_makes_again_what_is_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    write_case(tmp_path / "images", "a")
    truth = predictor(model)
    truth.predict_from_files_sequential(str(tmp_path / "images"), str(tmp_path / "labels"))
    call = [
        "evaluate",
        "-m",
        str(model),
        "-i",
        str(tmp_path / "images"),
        "-l",
        str(tmp_path / "labels"),
        "-device",
        "cpu",
    ]
    options = ["-o", str(tmp_path / "out"), "--disable_tta", "--no_figures", "-np", "0", "-npp", "0", "-nps", "0"]
    subsets = ["--subsets", "all", "t1", "t2"]
    assert cli.main([*call, *options, *subsets]) == 0
    predictions = tmp_path / "out" / "predictions"
    whole = {path: path.read_bytes() for path in predictions.glob("*/*.nii.gz")}
    table = (tmp_path / "out" / "results.csv").read_bytes()
    assert len(whole) == 3
    (predictions / "t1" / "a.nii.gz").write_bytes(b"")
    (predictions / "t2" / "a.nii.gz").write_bytes(whole[predictions / "t2" / "a.nii.gz"][:100])
    (tmp_path / "out" / "cases" / "a.json").write_bytes(b"")
    assert cli.main([*call, *options, *subsets]) == 0
    assert whole == {path: path.read_bytes() for path in predictions.glob("*/*.nii.gz")}
    assert (tmp_path / "out" / "results.csv").read_bytes() == table
