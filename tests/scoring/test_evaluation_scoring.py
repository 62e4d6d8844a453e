"""Scoring cases from files: agreement with nnU-Net, errors that name the case, parallel work, memory."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from evaluation_cases import DATASET_JSON, random_labels, write_labels, write_study
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunetv2_mgml.presentation.figures.slices import read_axial
from nnunetv2_mgml.scoring.cases import CasePool, CaseTask, ScoringSettings, collect, score_arrays, score_case
from nnunetv2_mgml.scoring.regions import label_set
from nnunetv2_mgml.workflows.evaluate import PredictionsRequest, evaluate_predictions

LABELS = label_set(DATASET_JSON)


def task(tmp_path: Path, reference: np.ndarray, prediction: np.ndarray, **geometry) -> CaseTask:
    return CaseTask(
        "case",
        write_labels(tmp_path / "ref.nii.gz", reference),
        {"t1": write_labels(tmp_path / "pred.nii.gz", prediction, **geometry)},
    )


@pytest.mark.parametrize("ignore", [None, 4])
def test_counts_and_dice_are_those_of_nnunet(tmp_path, ignore):
    labels = {**DATASET_JSON["labels"], **({"ignore": 4} if ignore else {})}
    settings = ScoringSettings(label_set({"labels": labels}), "nan")
    for seed, highest in ((0, 3), (1, 2), (2, 0)):
        reference = random_labels(seed, highest=highest)
        if ignore:
            reference[2:5] = ignore
        case = task(tmp_path, reference, random_labels(seed + 50, highest=highest))
        ours = score_case(case, settings)["t1"]
        regions = {name: tuple(v) for name, v in DATASET_JSON["labels"].items() if name != "background"}
        theirs = compute_metrics(
            str(case.reference), str(case.predictions["t1"]), SimpleITKIO(), list(regions.values()), ignore
        )["metrics"]
        for name, region in regions.items():
            np.testing.assert_allclose(ours[name]["dice"], theirs[region]["Dice"], atol=1e-12)
            tp, fp, fn = (theirs[region][key] for key in ("TP", "FP", "FN"))
            np.testing.assert_allclose(ours[name]["sensitivity"], tp / (tp + fn) if tp + fn else math.nan)
            np.testing.assert_allclose(ours[name]["precision"], tp / (tp + fp) if tp + fp else math.nan)


def test_spacing_follows_the_axes_of_the_file(tmp_path):
    reference, prediction = np.zeros((2, 6, 6, 6), dtype=np.uint8)
    reference[1, 2, 2] = prediction[3, 2, 2] = 1
    case = CaseTask(
        "case",
        write_labels(tmp_path / "r.nii.gz", reference, spacing=(1.0, 2.0, 5.0)),
        {"t1": write_labels(tmp_path / "p.nii.gz", prediction, spacing=(1.0, 2.0, 5.0))},
    )
    assert score_case(case, ScoringSettings(LABELS))["t1"]["whole tumor"]["hd95"] == pytest.approx(10.0)


def test_small_regions_count_as_empty():
    reference, prediction = np.zeros((2, 10, 10, 10), dtype=np.uint8)
    prediction[0, 0, :7] = 3
    plain = score_arrays(reference, prediction, (1, 1, 1), ScoringSettings(LABELS))
    assert plain["enhancing tumor"]["dice"] == 0
    for size, dice in ((7, 0), (8, 1)):
        settings = ScoringSettings(LABELS, min_region_voxels={"enhancing tumor": size})
        found = score_arrays(reference, prediction, (1, 1, 1), settings)
        assert found["enhancing tumor"]["dice"] == dice
        assert found["tumor core"]["dice"] == 0


def test_ignored_voxels_count_on_neither_side():
    labels = label_set({"labels": {"background": 0, "lesion": 1, "ignore": 2}})
    reference, prediction = np.zeros((2, 4, 4), dtype=np.uint8)
    reference[0], prediction[0] = 2, 1
    reference[1, 1] = prediction[1, 1] = 1
    assert score_arrays(reference, prediction, (1, 1), ScoringSettings(labels))["lesion"]["dice"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": random_labels(1, (8, 9, 11))}, r"shape \(8, 9, 11\) instead of \(8, 9, 10\)"),
        ({"spacing": (1.0, 1.0, 1.1)}, "spacing"),
        ({"origin": (0.0, 1.0, 0.0)}, "origin"),
    ],
)
def test_other_geometry_names_the_case(tmp_path, change, message):
    case = task(tmp_path, random_labels(0), change.pop("labels", random_labels(1)), **change)
    with pytest.raises(ValueError, match=f"Case case: .*pred.nii.gz.*{message}"):
        score_case(case, ScoringSettings(LABELS))


def test_what_prediction_takes_for_one_grid_scoring_does_too(tmp_path):
    """A header shifted by 0.05 mm: the prediction from that modality alone has its geometry."""
    shifted = task(tmp_path, random_labels(0), random_labels(0), origin=(0.05, 0.0, 0.05))
    assert score_case(shifted, ScoringSettings(LABELS))["t1"]["whole tumor"]["dice"] == 1
    further = task(tmp_path, random_labels(0), random_labels(0), origin=(0.08, 0.0, 0.08))
    difference = r"origin \(0.08, 0, 0.08\) instead of \(0, 0, 0\) mm \(up to 0.113 mm apart\)"
    with pytest.raises(ValueError, match=difference):
        score_case(further, ScoringSettings(LABELS))


def test_unknown_labels_name_the_convention(tmp_path):
    case = task(tmp_path, random_labels(0), random_labels(1, highest=4))
    with pytest.raises(ValueError, match=r"Case case: .* holds label 4, .*knows only 0, 1, 2, 3"):
        score_case(case, ScoringSettings(LABELS))


def test_float_label_maps_are_read_and_probabilities_are_not(tmp_path):
    whole = random_labels(0).astype(np.float32)
    assert score_case(task(tmp_path, whole, whole), ScoringSettings(LABELS))["t1"]["whole tumor"]["dice"] == 1
    with pytest.raises(ValueError, match=r"no whole numbers, such as 0\.5"):
        score_case(task(tmp_path, random_labels(0), whole / 2), ScoringSettings(LABELS))


def test_unreadable_file_names_the_case(tmp_path):
    case = task(tmp_path, random_labels(0), random_labels(1))
    case.predictions["t1"].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Case case: .*pred.nii.gz cannot be read"):
        score_case(case, ScoringSettings(LABELS))


def test_failing_cases_are_listed_and_the_others_kept(tmp_path):
    write_study(tmp_path)
    write_labels(tmp_path / "predictions" / "t1" / "case_1.nii.gz", random_labels(0, highest=7))
    folders = {"t1": tmp_path / "predictions" / "t1"}
    with pytest.raises(ValueError, match=r"1 of 3 cases could not be evaluated[\s\S]*Case case_1") as error:
        evaluate_predictions(
            PredictionsRequest(
                predictions=folders,
                labels=tmp_path / "labels",
                output=tmp_path / "out",
                num_processes=0,
                show_progress=False,
            )
        )
    assert "case_0" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "out" / "cases").iterdir()) == ["case_0.json", "case_2.json"]


def test_worker_processes_give_the_same(tmp_path):
    write_study(tmp_path, cases=4)
    tasks = [
        CaseTask(
            f"case_{i}",
            tmp_path / "labels" / f"case_{i}.nii.gz",
            {"t1": tmp_path / "predictions" / "t1" / f"case_{i}.nii.gz"},
        )
        for i in range(4)
    ]
    results = []
    for folder, processes in (("here", 0), ("there", 2)):
        with CasePool(ScoringSettings(LABELS), tmp_path / folder, processes) as pool:
            for one in tasks:
                pool.submit(one)
            results.append(collect(pool.results()))
    assert results[0] == results[1]
    stored = json.loads((tmp_path / "there" / "case_3.json").read_text())
    assert stored["scores"]["t1"] == results[0]["case_3"]["t1"]


def test_nan_survives_the_case_file(tmp_path):
    empty = np.zeros((4, 4, 4), dtype=np.uint8)
    case = task(tmp_path, empty, empty)
    settings = ScoringSettings(LABELS, "nan")
    for _ in range(2):
        with CasePool(settings, tmp_path / "cases", 0) as pool:
            pool.submit(case)
            scores = collect(pool.results())
        assert math.isnan(scores["case"]["t1"]["whole tumor"]["dice"])
        assert scores["case"]["t1"]["whole tumor"]["absolute_volume_error"] == 0
    assert '"dice": null' in (tmp_path / "cases" / "case.json").read_text()


@pytest.mark.slow
def test_memory_of_a_brats_case_does_not_grow_with_the_subsets(tmp_path):
    grid = np.indices((155, 240, 240), sparse=True)
    distance = sum((axis - n / 2) ** 2 for axis, n in zip(grid, (155, 240, 240), strict=True))
    labels = ((distance < 40**2).astype(np.uint8) + (distance < 30**2) + (distance < 20**2)).astype(np.uint8)
    reference = write_labels(tmp_path / "r.nii.gz", labels)
    prediction = write_labels(tmp_path / "p.nii.gz", np.roll(labels, 3, 1))
    peaks = []
    for count in (2, 15):
        score_case(
            CaseTask("case", reference, dict.fromkeys(map(str, range(count)), prediction)), ScoringSettings(LABELS)
        )
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 50, f"peak resident memory in MB after 2 and 15 subsets: {peaks}"


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_that_ends_early_is_refused(tmp_path, ending):
    whole = write_labels(tmp_path / f"whole{ending}", random_labels(0, (20, 20, 20)))
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[:-500])
    for case in (CaseTask("c1", whole, {"t1": cut}), CaseTask("c1", cut, {"t1": whole})):
        with pytest.raises(ValueError, match=r"Case c1: .*cut\.nii.* (cannot be read|is cut off)"):
            score_case(case, ScoringSettings(LABELS))
    with pytest.raises(ValueError, match=r"cut\.nii.* (cannot be read|is cut off)"):
        read_axial(cut)


def test_tiff_volumes_have_the_spacing_of_the_file_beside_them(tmp_path):
    reference = np.zeros((8, 9, 10), np.uint8)
    reference[2:4, 3:6, 3:6] = 1
    for name, labels in (("r", reference), ("p", np.roll(reference, 2, 0))):
        Tiff3DIO().write_seg(labels, str(tmp_path / f"{name}.tif"), {"spacing": (5, 1, 1)})
    settings = ScoringSettings(label_set({"labels": {"background": 0, "lesion": 1}}))
    scores = score_case(CaseTask("c", tmp_path / "r.tif", {"t1": tmp_path / "p.tif"}), settings)["t1"]["lesion"]
    assert scores["hd95"] == 10
    assert read_axial(tmp_path / "r.tif")[1] == (5, 1, 1)
    (tmp_path / "p.json").write_text('{"spacing": [5, 1]}')
    with pytest.raises(ValueError, match=r"Case c: .*p\.json must hold"):
        score_case(CaseTask("c", tmp_path / "r.tif", {"t1": tmp_path / "p.tif"}), settings)


def test_image_formats_without_depth(tmp_path):
    labels = random_labels(0, (12, 13), highest=1)
    path = tmp_path / "case.png"
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(path))
    settings = ScoringSettings(label_set({"labels": {"background": 0, "lesion": 1}}))
    assert score_case(CaseTask("case", path, {"t1": path}), settings)["t1"]["lesion"]["dice"] == 1


def test_a_dead_worker_names_the_option_of_mgml_evaluate(tmp_path):
    assert CasePool(ScoringSettings(LABELS), tmp_path, 1)._workers.options == "-np"


@pytest.mark.slow
def test_real_patients_agree_with_nnunet(real_data, tmp_path):
    """All ten BraTS 2021 references, four of them without enhancing tumour, against each other's neighbour."""
    files = sorted(real_data.glob("brats2021/*/*_seg.nii.gz"))
    regions = {"whole tumor": (1, 2, 4), "tumor core": (1, 4), "enhancing tumor": (4,)}
    labels = label_set({"labels": {"background": 0, **{name: list(v) for name, v in regions.items()}}})
    missing = 0
    for reference, prediction in zip(files, files[1:] + files[:1], strict=True):
        ours = score_case(CaseTask(reference.name, reference, {"t1": prediction}), ScoringSettings(labels, "nan"))["t1"]
        theirs = compute_metrics(str(reference), str(prediction), SimpleITKIO(), list(regions.values()))["metrics"]
        for name, region in regions.items():
            np.testing.assert_allclose(ours[name]["dice"], theirs[region]["Dice"], atol=1e-12)
            missing += math.isnan(ours[name]["hd95"])
            volume = (theirs[region]["n_pred"] - theirs[region]["n_ref"]) / 1000
            assert ours[name]["absolute_volume_error"] == pytest.approx(abs(volume))
    assert missing > 0
