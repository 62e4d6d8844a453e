"""The estimate of a prediction's own Dice: what is summed up, stored, and told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from inference_cases import image, predictor, report, write_case, write_image, write_model
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.inference import case_quality as module
from nnunetv2_mgml.inference.case_quality import estimate, stored_fit, sum_up
from nnunetv2_mgml.inference.subset_quality import REPORT_NAME

LABELS_JSON = {**builders.BRATS_JSON, "labels": {"background": 0, "core": 2, "edema": 1, "ignore": 3}}
LABELS_JSON.pop("regions_class_order")
FITTED: dict[str, Any] = {
    "used": True,
    "weights": [0.1, 0.2],
    "range": [[-2.0, 2.0], [-2.0, 2.0]],
    "dice_range": [0.1, 0.9],
    "subsets": {"t1+flair": {"dice": 0.6, "signs": [0.0, 1.0], "low": -0.2, "high": 0.15}},
    "doubtful_below": 0.55,
    "empty": None,
}


def managers(dataset_json: dict[str, Any]) -> Any:
    return PlansManager(builders.plans()).get_label_manager(dataset_json)


@pytest.mark.parametrize("slab", [1, 10**6])
def test_regions_are_summed_up_plane_by_plane(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VOXELS_AT_ONCE", slab)
    logits = np.random.default_rng(0).normal(size=(3, 5, 6, 7)).astype(np.float16)
    found = sum_up(logits, managers(builders.BRATS_JSON))
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    core = (p[1] > 0.5) | (p[2] > 0.5)  # a voxel of a later region belongs to the earlier ones too
    assert found["tumor_core"]["voxels"] == core.sum()
    assert found["tumor_core"]["expected_precision"] == pytest.approx(p[1][core].mean(), rel=1e-4)
    assert found["tumor_core"]["expected_sensitivity"] == pytest.approx(p[1][core].sum() / p[1].sum(), rel=1e-4)
    assert found["tumor_core"]["expected_dice"] == pytest.approx(
        2 * p[1][core].sum() / (core.sum() + p[1].sum()), rel=1e-4
    )
    assert list(found) == ["whole_tumor", "tumor_core", "enhancing_tumor"]


def test_labels_are_found_by_their_values_and_an_empty_mask_has_no_expectation() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4, 5, 6)).astype(np.float32)
    logits[1] = -9
    found = sum_up(logits, managers(LABELS_JSON))
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(0)
    mask = p.argmax(0) == 2
    assert list(found) == ["core", "edema"]
    assert found["core"]["voxels"] == mask.sum()
    assert found["core"]["expected_precision"] == pytest.approx(p[2][mask].mean(), rel=1e-4)
    assert found["edema"] == {
        "voxels": 0,
        "expected_precision": None,
        "expected_sensitivity": None,
        "expected_dice": None,
    }
    assert estimate(FITTED, "t1+flair", found["edema"]) is None


def test_the_usual_case_gets_the_mean_and_a_surer_one_more() -> None:
    def told(one: float, two: float) -> dict[str, Any]:
        odds = {"expected_precision": one, "expected_sensitivity": two}
        found = estimate(FITTED, "t1+flair", {name: 1 / (1 + np.exp(-value)) for name, value in odds.items()})
        assert found is not None
        return found

    usual = {"estimate": 0.6, "low": 0.4, "high": 0.75, "doubtful": False}
    assert told(0, 1) == pytest.approx(usual)
    assert told(0.5, 1)["estimate"] == pytest.approx(0.65)
    assert told(6, 6) == pytest.approx({"estimate": 0.9, "low": 0.7, "high": 1.0, "doubtful": False})
    assert told(0, 0)["doubtful"]
    assert estimate(FITTED, "t1", {"expected_precision": 0.5, "expected_sensitivity": 0.5}) is None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres")
    store(folder, {"whole_tumor": FITTED, "tumor_core": {**FITTED, "used": False}})
    return folder


def store(folder: Path, regions: Any) -> None:
    content = {"channels": ["t1", "t1ce", "t2", "flair"], "subsets": {}, "case_quality": {"regions": regions}}
    (folder / REPORT_NAME).write_text(json.dumps(content))


def test_a_prediction_tells_its_own_estimate(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_case(tmp_path / "in", "a", [0, 3])
    write_case(tmp_path / "in", "b", [0])
    auto = predictor(model)
    assert auto.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out")) == [None, None]
    entry = report(tmp_path / "out")["cases"]["a"]
    assert list(entry["estimated_dice"]) == ["whole_tumor"], "of the other the subset's mean is the better estimate"
    told = entry["estimated_dice"]["whole_tumor"]
    assert 0.1 <= told["low"] <= told["estimate"] <= told["high"] <= 1
    assert ("whole_tumor" in entry["doubtful_regions"]) == (told["estimate"] < 0.55)
    assert "a: estimated Dice of this case: whole_tumor" in caplog.text
    assert "estimated_dice" not in report(tmp_path / "out")["cases"]["b"], "nothing is known of this subset"
    before = (tmp_path / "out" / "a.nii.gz").read_bytes()
    (model / REPORT_NAME).unlink()
    auto.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "plain"))
    assert (tmp_path / "plain" / "a.nii.gz").read_bytes() == before
    assert "estimated_dice" not in report(tmp_path / "plain")["cases"]["a"]


@pytest.mark.parametrize(
    "change",
    [{"weights": [1]}, {"range": None}, {"subsets": {"t1": 3}}, {"doubtful_below": "a"}, {"dice_range": [0]}, None],
)
def test_a_damaged_fit_is_named(model: Path, change: dict[str, Any] | None) -> None:
    store(model, [] if change is None else {"whole_tumor": {**FITTED, **change}})
    with pytest.raises(ValueError, match=r"subset_report.json is damaged.*'case_quality'"):
        stored_fit(model)


def test_the_rule_of_the_fit_is_that_of_its_report_where_it_has_none_of_its_own(model: Path) -> None:
    content = json.loads((model / REPORT_NAME).read_text())
    assert stored_fit(model)["whole_tumor"]["min_region_voxels"] is None
    content["min_region_voxels"] = {"whole_tumor": 70, "tumor_core": 9}
    (model / REPORT_NAME).write_text(json.dumps(content))
    assert stored_fit(model)["whole_tumor"]["min_region_voxels"] == 70
    content["case_quality"]["regions"]["whole_tumor"]["min_region_voxels"] = 80
    (model / REPORT_NAME).write_text(json.dumps(content))
    assert stored_fit(model)["whole_tumor"]["min_region_voxels"] == 80
    content["case_quality"]["regions"]["whole_tumor"]["min_region_voxels"] = "many"
    (model / REPORT_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"subset_report.json is damaged.*'case_quality'"):
        stored_fit(model)


@pytest.mark.parametrize("labels_json", [builders.BRATS_JSON, LABELS_JSON])
def test_voxels_are_those_of_the_label_map(labels_json: dict[str, Any]) -> None:
    entry = {"voxels": 5, "expected_precision": 0.5, "expected_sensitivity": 0.25, "expected_dice": 1 / 3}
    manager = managers(labels_json)
    first, *others = found = sum_up(np.ones((3, 2, 3, 4), np.float32), manager)
    label_map = np.array([[[0, 2, 2, 0]]], np.uint8)
    told = module.on_image(dict.fromkeys(found, entry), label_map, manager)
    assert told[first] == {**entry, "voxels": 2}
    assert {told[region]["voxels"] for region in others} == ({0, 2} if labels_json is builders.BRATS_JSON else {0})
    assert told[others[-1]]["expected_precision"] is None


def test_a_prediction_from_images_of_another_spacing_counts_their_voxels(model: Path, tmp_path: Path) -> None:
    """The network's voxels are 1 mm wide, so it sees eight for each of the image's."""
    (tmp_path / "in").mkdir()
    for channel in (0, 3):
        write_image(tmp_path / "in" / f"a_{channel:04d}.nii.gz", image(channel), spacing=2.0)
    auto = predictor(model)
    voxels = int(
        np.isin(
            auto.predict_case({"t1": tmp_path / "in/a_0000.nii.gz", "flair": tmp_path / "in/a_0003.nii.gz"}), (1, 2, 3)
        ).sum()
    )
    for smallest, whole in ((voxels, True), (voxels + 1, False)):
        store(model, {"whole_tumor": {**FITTED, "empty": 0.125, "min_region_voxels": smallest}})
        auto.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"))
        told = report(tmp_path / "out")["cases"]["a"]["estimated_dice"]["whole_tumor"]
        assert (told["low"] is not None) == whole
        assert (told["estimate"] != 0.125) == whole


def test_reports_of_before_have_none(model: Path) -> None:
    content = json.loads((model / REPORT_NAME).read_text())
    for value in (None, ...):
        content["case_quality"] = value
        if value is ...:
            del content["case_quality"]
        (model / REPORT_NAME).write_text(json.dumps(content))
        assert stored_fit(model) == {}
