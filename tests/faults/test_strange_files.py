"""File names and voxels that no library is made for, and folders that vanish: one clear error, never a wrong result."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from cohort_cases import label, save, volume, write_raw
from conversion_cases import tree, write_cases
from inference_cases import predict_kept, predictor, report, write_case, write_model
from kept_model_cases import CHANNELS, FIXTURE, MODEL

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.inference.inputs import CaseError, find_cases, resolve
from nnunetv2_mgml.io.case_files import find_by_patterns
from nnunetv2_mgml.io.volumes import VolumeError, not_finished, write_image
from nnunetv2_mgml.plans.cohort import raw_cases

LATIN_1 = os.fsdecode(b"caf\xe9")
"""A name as an old Windows disk has it."""
needs_bytes = pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux only")


# --- names that are not UTF-8: ITK ends the process at once -----------------------------------------------------------
def with_strange_names(folder: Path, old: str) -> None:
    for path in folder.iterdir():
        path.rename(folder / path.name.replace(old, LATIN_1))


@needs_bytes
@pytest.mark.parametrize("kind", ["brats", "folders", "images"])
def test_conversion_of_strange_names(
    nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (case,) = write_cases(tmp_path / "source", 1)
    with_strange_names(tmp_path / "source" / case, case)
    patterns = ["--label", "*_seg.nii.gz", "--modalities", "t1=*_t1.nii.gz", "t2=*_t2.nii.gz"]
    call = {
        "brats": ["brats", str(tmp_path / "source"), "-d", "7", "-np", "0"],
        "folders": ["folders", str(tmp_path / "source"), "-d", "7", "--name", "A", *patterns, "-np", "0"],
        "images": ["images", str(tmp_path / "source"), str(tmp_path / "out"), "-np", "0"],
    }[kind]
    assert cli.main(["convert", *call]) == 2
    error = capsys.readouterr().err
    assert r"caf\xe9_t1.nii.gz has bytes in its name that are not UTF-8" in error
    assert "Rename it" in error
    assert tree(nnunet_folders / "raw") == []
    assert not (tmp_path / "out").exists()


@needs_bytes
def test_convert_back_to_and_from_strange_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(next((FIXTURE / "labels").iterdir()), tmp_path / "in" / "a.nii.gz")
    shutil.copytree(tmp_path / "in", tmp_path / LATIN_1)
    call = ["convert", "back", "--to", "brats2021", "-np", "0"]
    assert cli.main([*call, str(tmp_path / LATIN_1), str(tmp_path / "out")]) == 2
    assert "has bytes in its name that are not UTF-8" in capsys.readouterr().err
    assert cli.main([*call, str(tmp_path / "in"), str(tmp_path / f"{LATIN_1}_out")]) == 0
    assert r"caf\udce9_out" in capsys.readouterr().out
    image = sitk.Image(2, 2, 2, sitk.sitkUInt8)
    with pytest.raises(VolumeError, match="not UTF-8"):
        write_image(image, tmp_path / f"{LATIN_1}.nii.gz")
    write_image(image, tmp_path / "good.nii.gz")
    shutil.copy(tmp_path / "good.nii.gz", tmp_path / f"{LATIN_1}.nii.gz")
    assert not_finished(tmp_path / "good.nii.gz", tmp_path / f"{LATIN_1}.nii.gz") == ""


@needs_bytes
def test_prediction_of_strange_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The case is refused by name, the others are predicted; an output folder of such a name is refused, too."""
    (tmp_path / "in").mkdir()
    for path in (FIXTURE / "images").iterdir():
        shutil.copy(path, tmp_path / "in")
        shutil.copy(path, tmp_path / "in" / f"{LATIN_1}{path.name[-12:]}")
    assert predict_kept(tmp_path / "in", "--missing_modalities", "auto") == 1
    assert "1 cases were not predicted" in (error := capsys.readouterr().err)
    assert r"caf\xe9_0000.nii.gz has bytes in its name that are not UTF-8" in error
    assert [path.name for path in (tmp_path / "OUT").glob("*.nii.gz")] == ["Phantom_00001.nii.gz"]


@needs_bytes
def test_evaluation_of_strange_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = next((FIXTURE / "labels").iterdir())
    for folder in ("labels", "predictions/t1"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(truth, tmp_path / folder / f"{LATIN_1}.nii.gz")
    call = ["evaluate", "--predictions", str(tmp_path / "predictions"), "-l", str(tmp_path / "labels"), "-np", "0"]
    options = ["-o", str(tmp_path / "out"), "--no_figures", "--dataset_json", str(FIXTURE / MODEL / "dataset.json")]
    assert cli.main([*call, *options]) == 2
    assert "has bytes in its name that are not UTF-8" in capsys.readouterr().err


# --- numbers of patients that look like channels ----------------------------------------------------------------------
NUMBERED = ("patient_0001", "patient_0002", "patient_0003")


def test_patients_with_numbers_stay_apart(nnunet_folders: Path, tmp_path: Path) -> None:
    """In every conversion, and from there to prediction."""
    (tmp_path / "flat").mkdir()
    for number, name in enumerate(NUMBERED):
        for channel, modality in enumerate(("t1", "t2")):
            save(volume(2 * number + channel), tmp_path / "flat" / f"{name}_{modality}.nii.gz")
        save(label(), tmp_path / "flat" / f"{name}_seg.nii.gz")
    patterns = ["--modalities", "t1=*_t1.nii.gz", "t2=*_t2.nii.gz", "--label", "*_seg.nii.gz"]
    assert (
        cli.main(["convert", "folders", str(tmp_path / "flat"), "-d", "7", "--name", "A", *patterns, "-np", "0"]) == 0
    )
    folder = nnunet_folders / "raw" / "Dataset007_A"
    assert [case.name for case in raw_cases(folder)] == list(NUMBERED)
    assert [case.name for case in find_cases(folder / "imagesTr", ".nii.gz", ("t1", "t2"))] == list(NUMBERED)
    assert cli.main(["convert", "images", str(tmp_path / "flat"), str(tmp_path / "images"), "-np", "0"]) == 0
    assert {case.name for case in find_cases(tmp_path / "images", ".nii.gz", CHANNELS)} == set(NUMBERED)
    found = find_by_patterns(folder / "imagesTr", {"t1": "*_0000.nii.gz", "t2": "*_0001.nii.gz"})
    assert [case.name for case in found.cases] == list(NUMBERED)


def test_a_channel_forgotten_before_prediction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in NUMBERED:
        (tmp_path / f"{name}.nii.gz").touch()
    (case,) = find_cases(tmp_path, ".nii.gz", CHANNELS)
    assert "patient_0001.nii.gz, patient_0002.nii.gz, patient_0003.nii.gz are taken for channels" in caplog.text
    assert "one case, patient, with t1ce, t2, flair" in caplog.text
    assert "patient_0001.nii.gz is then to be named patient_0001_0000.nii.gz, if it is t1" in caplog.text
    assert resolve(case, "auto", CHANNELS) == (False, True, True, True)  # as ever: a case without t1 has such names
    (tmp_path / "patient_0004.nii.gz").touch()
    with pytest.raises(
        CaseError, match=r"channel number 0004.* name, the file of its t1 is to be named patient_0004_0"
    ):
        resolve(find_cases(tmp_path, ".nii.gz", CHANNELS)[0], "auto", CHANNELS)
    caplog.clear()
    (tmp_path / "other_0000.nii.gz").touch()
    find_cases(tmp_path, ".nii.gz", CHANNELS)
    assert "taken for channels" not in caplog.text


def test_a_channel_forgotten_where_label_maps_show_it(
    nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", {}, NUMBERED)
    for path in list((raw / "imagesTr").iterdir()):
        if path.name.endswith("_0000.nii.gz"):
            path.rename(path.with_name(path.name.replace("_0000", "")))
        else:
            path.unlink()
    wanted = "its number belongs to the case, not to the channel"
    for call in (["check", "45"], ["convert", "raw", "-d", "45"]):
        assert cli.main([*call, "-np", "0"]) == 2
        assert wanted in capsys.readouterr().err
    call = ["evaluate", "-m", str(FIXTURE / MODEL), "-i", str(raw / "imagesTr"), "-l", str(raw / "labelsTr")]
    assert cli.main([*call, "-o", str(tmp_path / "out"), "-device", "cpu"]) == 2
    assert wanted in (error := capsys.readouterr().err)
    assert "patient_0001_0000.nii.gz" in error


# --- voxels that are no single real numbers, labels that dataset.json does not know -----------------------------------
def spoil(path: Path, kind: str) -> None:
    image = nibabel.load(path)
    values: Any = np.asanyarray(image.dataobj)
    if kind == "complex":
        values = values.astype(np.complex64)
    elif kind == "colours":
        values = np.zeros(values.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    elif kind == "vectors":
        picture = sitk.ReadImage(str(path))
        sitk.WriteImage(sitk.Compose(picture, picture, picture), str(path))
        return
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)


@pytest.mark.parametrize("kind", ["complex", "colours", "vectors"])
@pytest.mark.parametrize("part", ["imagesTr/a_0001", "labelsTr/b"])
def test_colours_and_complex_numbers_at_planning(
    nnunet_folders: Path, capsys: pytest.CaptureFixture[str], kind: str, part: str
) -> None:
    raw = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", {}, "abc")
    file = raw / f"{part}.nii.gz"
    spoil(file, kind)
    words = "complex numbers" if kind == "complex" else "3 values per voxel"
    assert cli.main(["check", "45", "-np", "0"]) == 0
    assert f"{file} h" in (said := capsys.readouterr().out)
    assert words in said
    assert cli.main(["preprocess", "-d", "45", "-np", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 1 file(s) of ")
    assert f"{file} h" in error
    assert words in error


def test_a_mask_of_a_picture_program(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", {}, "abc")
    save(255 * (label() > 0).astype(np.uint8), raw / "labelsTr" / "b.nii.gz")
    assert cli.main(["check", "45", "-np", "0"]) == 0
    assert "b: the label map has the value 255, but dataset.json knows only 0, 1" in capsys.readouterr().out
    description = json.loads((raw / "dataset.json").read_text())
    description["labels"]["ignore"] = 255
    (raw / "dataset.json").write_text(json.dumps(description))
    assert cli.main(["check", "45", "-np", "0"]) == 0
    assert "255" not in capsys.readouterr().out


# --- an output folder that is deleted under way -----------------------------------------------------------------------
def test_predictions_deleted_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are gone are reported as failed, and made again by the next run."""
    model = write_model(tmp_path / "model")
    for seed, name in enumerate("abc"):
        write_case(tmp_path / "in", name, seed=seed)
    ours = predictor(model)
    logits, out = ours._logits, tmp_path / "out"

    def deletes(item: Any) -> Any:
        if item.case == "c":
            shutil.rmtree(out)
        return logits(item)

    monkeypatch.setattr(ours, "_logits", deletes)
    ours.predict_from_files_sequential(str(tmp_path / "in"), str(out))
    assert sorted(ours.failures) == ["a", "b"]
    assert f"{out / 'a.nii.gz'} was written, but is gone" in ours.failures["a"]
    assert {name: case["status"] for name, case in report(out)["cases"].items()} == {
        "a": "failed",
        "b": "failed",
        "c": "predicted",
    }
    monkeypatch.undo()
    ours.predict_from_files_sequential(str(tmp_path / "in"), str(out), overwrite=False)
    assert ours.failures == {}
    assert {path.name for path in out.glob("*.nii.gz")} == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}


def test_a_data_set_deleted_while_it_is_built(
    nnunet_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2_mgml.dataset_conversion import convert as conversion

    write_cases(tmp_path / "source", 2)
    raw, original = nnunet_folders / "raw", conversion.write_description

    def deletes(*args: Any, **kwargs: Any) -> None:
        for folder in raw.iterdir():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        original(*args, **kwargs)

    monkeypatch.setattr(conversion, "write_description", deletes)
    call = ["convert", "brats", str(tmp_path / "source"), "-d", "7", "--name", "A", "-np", "0"]
    assert cli.main(call) == 2
    error = capsys.readouterr().err
    assert str(raw / "Dataset007_A") in error
    assert ".mgml_" not in error
    assert not (raw / "Dataset007_A").exists()
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_raw", str(raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(nnunet_folders / "preprocessed"))
    assert cli.main(call) == 0


def test_an_evaluation_deleted_under_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from nnunetv2_mgml.scoring import cases as scoring

    caplog.set_level(logging.ERROR)
    study = tmp_path / "study"
    from evaluation_cases import write_study

    write_study(study, cases=3)
    original = scoring.score_case
    out = tmp_path / "out"

    def deletes(task: Any, settings: Any) -> Any:
        if task.case == "case_1":
            shutil.rmtree(out)
        return original(task, settings)

    call = ["evaluate", "--predictions", str(study / "predictions"), "-l", str(study / "labels"), "-o", str(out)]
    options = ["-np", "0", "--no_figures", "--disable_progress_bar"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score_case", deletes)
        assert cli.main([*call, *options]) == 0
    table = (out / "results.csv").read_bytes()
    assert {path.stem for path in (out / "cases").iterdir()} == {"case_1", "case_2"}
    assert cli.main([*call, *options]) == 0  # begun anew: its settings are gone with the folder
    assert (out / "results.csv").read_bytes() == table
