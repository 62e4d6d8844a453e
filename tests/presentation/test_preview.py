"""One picture per predicted case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from inference_cases import predict_kept
from kept_model_cases import FIXTURE, MODEL

from nnunetv2_mgml.presentation.figures.preview import preview_sheet
from nnunetv2_mgml.presentation.preview import quality_lines, wrapped, write_previews

PRESENT = {"t1": 0, "flair": 3}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "IN"
    folder.mkdir()
    for channel in PRESENT.values():
        shutil.copy(FIXTURE / "images" / f"Phantom_00001_{channel:04d}.nii.gz", folder)
    return folder


def test_the_command_draws_what_it_predicts(images: Path, capsys: Any) -> None:
    assert predict_kept(images, "--missing_modalities", "auto", "--preview") == 0
    out = images.parent / "OUT"
    picture = out / "preview" / "Phantom_00001.png"
    assert f"1 previews: {picture.parent}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert predict_kept(images, "--missing_modalities", "auto", "--preview", "--continue_prediction") == 0
    assert picture.is_file(), "also of a case that was there"


def test_it_goes_with_our_way_of_predicting(images: Path, capsys: Any) -> None:
    assert predict_kept(images, "--preview") == 2
    assert "--preview needs --missing_modalities" in capsys.readouterr().err


def test_a_case_whose_images_are_gone_costs_its_picture_only(tmp_path: Path) -> None:
    labels = FIXTURE / "labels" / "Phantom_00001.nii.gz"
    shutil.copy(labels, tmp_path / "a.nii.gz")
    shutil.copy(labels, tmp_path / "b.nii.gz")
    shutil.copy(labels, tmp_path / "d.nii.gz")
    there = str(FIXTURE / "images" / "Phantom_00001_0000.nii.gz")
    entry = {"status": "predicted", "present": ["t1"], "missing": ["flair"]}
    cases = {
        "a": {**entry, "files": {"t1": there}},
        "b": {**entry, "files": {"t1": str(tmp_path / "gone.nii.gz")}},
        "c": {"status": "failed"},
        "d": {**entry, "files": {"flair": there}},
    }
    report = tmp_path / "mgml_prediction.json"
    report.write_text(json.dumps({"cases": cases}))
    dataset_json = json.loads((FIXTURE / MODEL / "dataset.json").read_text())
    written, failures = write_previews(report, dataset_json)
    assert [path.name for path in written] == ["a.png"]
    assert list(failures) == ["b", "d"]
    assert failures["d"] == "its report names no image files."
    assert "gone.nii.gz" in failures["b"]
    assert write_previews(report, dataset_json, ["b"])[0] == []


def test_what_is_said_of_the_quality() -> None:
    entry: dict[str, Any] = {
        "expected_dice": {"whole_tumor": {"mean": 0.9, "sd": 0.05}, "enhancing_tumor": {"mean": None, "sd": None}},
        "expected_volume_error_ml": {"whole_tumor": {"mean": 3.26}},
        "unreliable_regions": ["enhancing_tumor"],
    }
    assert quality_lines(entry) == [
        "Dice of validation cases with these sequences: WT 0.90 ± 0.05 (± 3.3 ml), ET unknown.",
        "Unreliable from these sequences: ET.",
    ]
    entry["estimated_dice"] = {
        "whole_tumor": {"estimate": 0.81, "low": 0.6, "high": 0.92},
        "enhancing_tumor": {"estimate": 0.3, "low": None, "high": None},
    }
    entry["doubtful_regions"] = ["enhancing_tumor"]
    assert quality_lines(entry)[1] == "Estimated for this case: WT 0.81 (0.60 to 0.92), ET 0.30 doubtful."
    assert "not known" in quality_lines({})[0]


def test_lines_break_between_regions() -> None:
    line = "Dice of validation cases with these sequences: WT 0.90 ± 0.05 (± 3.3 ml), TC 0.81 ± 0.10 (± 2.1 ml), ET 0."
    assert wrapped(line, 55).splitlines() == [
        "Dice of validation cases with these sequences:",
        "WT 0.90 ± 0.05 (± 3.3 ml), TC 0.81 ± 0.10 (± 2.1 ml),",
        "ET 0.",
    ]
    assert wrapped("a" * 30 + " " + "b" * 30, 40).count("\n") == 1


@pytest.mark.parametrize("count", [1, 2, 6])
def test_the_sheet_has_every_sequence_twice(count: int) -> None:
    rng = np.random.default_rng(0)
    images = {f"s{i}": rng.normal(size=(20, 16)) for i in range(count)}
    labels = np.zeros((20, 16), int)
    labels[5:9, 5:9] = 1
    figure = preview_sheet(images, labels, {1: "lesion"}, title="case", notes="one\ntwo", pixel_aspect=2.0)
    shown = [axes.get_images()[0].get_array().shape for axes in figure.axes]
    assert len(shown) == 2 * count
    assert [axes.get_title() for axes in figure.axes[:count]] == list(images)
    assert all(shape[-1] == 3 for shape in shown[count:])
    empty = preview_sheet(images, np.zeros((20, 16), int), {1: "lesion"}, title="nothing found")
    assert len(empty.axes) == 2 * count


def test_flat_images_are_drawn_too(tmp_path: Path) -> None:
    for name in ("a", "a_image"):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((9, 9), np.uint8)), str(tmp_path / f"{name}.nii.gz"))
    entry = {"status": "predicted", "present": ["t1"], "missing": [], "files": {"t1": str(tmp_path / "a_image.nii.gz")}}
    report = tmp_path / "mgml_prediction.json"
    report.write_text(json.dumps({"cases": {"a": entry}}))
    labels = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    assert [path.name for path in write_previews(report, labels)[0]] == ["a.png"]


def test_pictures_have_no_sides_and_no_millilitres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_mgml.presentation import preview

    said: list[dict[str, Any]] = []

    def noted(*arguments: Any, **more: Any) -> Any:
        said.append(more)
        return preview_sheet(*arguments, **more)

    monkeypatch.setattr(preview, "preview_sheet", noted)
    labels = np.zeros((9, 9), np.uint8)
    labels[2:4, 2:5] = 1
    for ending in (".nii.gz", ".png"):
        for name in ("a", "a_image"):
            sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / f"{name}{ending}"))
        files = {"t1": str(tmp_path / f"a_image{ending}")}
        entry = {"status": "predicted", "present": ["t1"], "missing": [], "files": files}
        report = tmp_path / "mgml_prediction.json"
        report.write_text(json.dumps({"cases": {"a": entry}}))
        assert write_previews(report, {"labels": {"background": 0, "lesion": 1}, "file_ending": ending})[0]
    volume, picture = said
    assert (volume["oriented"], picture["oriented"]) == (True, False)
    assert "ml" in volume["notes"]
    assert "lesion 6 voxels" in picture["notes"]
