"""`mgml convert`: arguments, report and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conversion_cases import write_cases

from nnunetv2_mgml.commands.main import main


def test_brats_and_back(nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_cases(tmp_path / "src", 6)
    (tmp_path / "src" / names[0] / f"{names[0]}_t1.nii.gz").unlink()
    assert (
        main(
            [
                "convert",
                "brats",
                str(tmp_path / "src"),
                "-d",
                "7",
                "--name",
                "Tiny",
                "--missing-ok",
                "--split",
                "4:1:1",
                "--seed",
                "1",
                "-np",
                "1",
                "--link",
            ]
        )
        == 0
    )
    folder = nnunet_folders / "raw" / "Dataset007_Tiny"
    output = capsys.readouterr().out
    for text in (
        "Recognised: BraTS (6 cases)",
        "Channels: 0 t1, 1 t1ce, 2 t2, 3 flair",
        "4 enhancing tumour -> 3",
        "5 in imagesTr, 1 held out",
        "Absent sequences in 1 case(s), listed in missing_modalities.json",
        "Split: 4 training, 1 validation, 1 test cases",
        "splits_final.json",
        f"Wrote {folder} in",
    ):
        assert text in output
    assert (
        main(["convert", "back", str(folder / "labelsTr"), str(tmp_path / "out"), "--to", "brats2021", "-np", "1"]) == 0
    )
    assert "Wrote 5 segmentation(s) with the values of brats2021" in capsys.readouterr().out
    assert main(["convert", "split", "-d", "7", "--split", "3:1:1", "--overwrite"]) == 0
    assert "3 training, 1 validation, 1 test cases" in capsys.readouterr().out
    split = json.loads((nnunet_folders / "preprocessed" / folder.name / "splits_final.json").read_text())
    assert [len(split[0]["train"]), len(split[0]["val"])] == [3, 1]


def test_bad_cases(nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = write_cases(tmp_path / "src", 3)
    (tmp_path / "src" / names[0] / f"{names[0]}_t1.nii.gz").unlink()
    arguments = ["convert", "brats", str(tmp_path / "src"), "-d", "7", "-np", "1"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        f"error: 1 of 3 case(s) are bad; nothing has been written. --skip_bad converts the others.\n  {names[0]}: "
        f"no file for t1 (allow with --missing_ok)" in captured.err
    )
    assert captured.out == ""
    assert main([*arguments, "--skip_bad"]) == 1
    assert f"Skipped 1 bad case(s):\n  {names[0]}: no file for t1" in capsys.readouterr().out


def test_no_source(nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "brats", str(tmp_path / "none"), "-d", "7"]) == 2
    assert "none is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("what", [[], ["brats"], ["back"], ["split"]])
def test_help(what: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["convert", *what, "-h"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert ("brats" if not what else f"mgml convert {what[0]}") in text
    assert "default: None" not in text
