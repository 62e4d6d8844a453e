"""Scoring cases from files: agreement with nnU-Net, errors that name the case, resuming, parallel work, memory."""

from __future__ import annotations

import json
import logging
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

from nnunetv2_mgml.evaluation import scoring
from nnunetv2_mgml.evaluation.evaluate import EvaluationOptions, evaluate_predictions
from nnunetv2_mgml.evaluation.figures.slices import read_axial
from nnunetv2_mgml.evaluation.output import open_output
from nnunetv2_mgml.evaluation.progress import progress_bar
from nnunetv2_mgml.evaluation.regions import label_set
from nnunetv2_mgml.evaluation.scoring import CasePool, CaseTask, ScoringSettings, collect, score_arrays, score_case

LABELS = label_set(DATASET_JSON)
QUIET = EvaluationOptions(num_processes=0, show_progress=False)


def task(tmp_path: Path, reference: np.ndarray, prediction: np.ndarray, **geometry) -> CaseTask:
    return CaseTask("case", write_labels(tmp_path / "ref.nii.gz", reference),
                    {"t1": write_labels(tmp_path / "pred.nii.gz", prediction, **geometry)})


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
        theirs = compute_metrics(str(case.reference), str(case.predictions["t1"]), SimpleITKIO(),
                                 list(regions.values()), ignore)["metrics"]
        for name, region in regions.items():
            np.testing.assert_allclose(ours[name]["dice"], theirs[region]["Dice"], atol=1e-12)
            tp, fp, fn = (theirs[region][key] for key in ("TP", "FP", "FN"))
            np.testing.assert_allclose(ours[name]["sensitivity"], tp / (tp + fn) if tp + fn else math.nan)
            np.testing.assert_allclose(ours[name]["precision"], tp / (tp + fp) if tp + fp else math.nan)


def test_spacing_follows_the_axes_of_the_file(tmp_path):
    reference, prediction = np.zeros((2, 6, 6, 6), dtype=np.uint8)
    reference[1, 2, 2] = prediction[3, 2, 2] = 1
    case = CaseTask("case", write_labels(tmp_path / "r.nii.gz", reference, spacing=(1.0, 2.0, 5.0)),
                    {"t1": write_labels(tmp_path / "p.nii.gz", prediction, spacing=(1.0, 2.0, 5.0))})
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


@pytest.mark.parametrize(("change", "message"), [
    ({"labels": random_labels(1, (8, 9, 11))}, r"shape \(8, 9, 11\) instead of \(8, 9, 10\)"),
    ({"spacing": (1.0, 1.0, 1.1)}, "spacing"), ({"origin": (0.0, 1.0, 0.0)}, "origin")])
def test_other_geometry_names_the_case(tmp_path, change, message):
    case = task(tmp_path, random_labels(0), change.pop("labels", random_labels(1)), **change)
    with pytest.raises(ValueError, match=f"Case case: .*pred.nii.gz.*{message}"):
        score_case(case, ScoringSettings(LABELS))


def test_unknown_labels_name_the_convention(tmp_path):
    case = task(tmp_path, random_labels(0), random_labels(1, highest=4))
    with pytest.raises(ValueError, match=r"Case case: .* holds label 4, .*knows only 0, 1, 2, 3"):
        score_case(case, ScoringSettings(LABELS))


def test_float_label_maps_are_read_and_probabilities_are_not(tmp_path):
    whole = random_labels(0).astype(np.float32)
    assert score_case(task(tmp_path, whole, whole), ScoringSettings(LABELS))["t1"]["whole tumor"]["dice"] == 1
    with pytest.raises(ValueError, match="not whole numbers"):
        score_case(task(tmp_path, random_labels(0), whole / 2), ScoringSettings(LABELS))


def test_unreadable_file_names_the_case(tmp_path):
    case = task(tmp_path, random_labels(0), random_labels(1))
    case.predictions["t1"].write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"Case case: .*pred.nii.gz cannot be read"):
        score_case(case, ScoringSettings(LABELS))


class TestResuming:
    @pytest.fixture
    def scored(self, monkeypatch) -> list[tuple[str, list[str]]]:
        """Which subsets of which cases are really scored."""
        calls = []
        original = score_case

        def spy(case, settings):
            calls.append((case.case, sorted(case.predictions)))
            return original(case, settings)

        monkeypatch.setattr(scoring, "score_case", spy)
        return calls

    def run(self, root: Path, subsets: tuple[str, ...] = ("t1", "flair"), **kwargs):
        folders = {name: root / "predictions" / name for name in subsets}
        return evaluate_predictions(root / "labels", folders, DATASET_JSON, root / "out", QUIET, **kwargs)

    def test_only_what_is_missing_is_done(self, tmp_path, scored):
        write_study(tmp_path)
        first = self.run(tmp_path)
        assert len(scored) == 3
        (tmp_path / "out" / "cases" / "case_1.json").unlink()
        for name in ("results.csv", "summary.json", "table.md"):
            (tmp_path / "out" / name).unlink()
        scored.clear()
        again = self.run(tmp_path)
        assert scored == [("case_1", ["flair", "t1"])]
        assert again.table.equals(first.table)
        assert (tmp_path / "out" / "table.md").is_file()

    def test_killed_run_keeps_finished_cases(self, tmp_path, scored, monkeypatch):
        write_study(tmp_path)
        whole = scoring.score_case

        def killed(case, settings):
            if case.case == "case_1":
                raise KeyboardInterrupt
            return whole(case, settings)

        monkeypatch.setattr(scoring, "score_case", killed)
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path)
        assert [p.name for p in (tmp_path / "out" / "cases").iterdir()] == ["case_0.json"]
        monkeypatch.setattr(scoring, "score_case", whole)
        scored.clear()
        self.run(tmp_path)
        assert [case for case, _ in scored] == ["case_1", "case_2"]

    def test_a_new_subset_is_added_and_a_changed_file_done_again(self, tmp_path, scored):
        write_study(tmp_path, subsets=("t1", "flair", "t2"))
        self.run(tmp_path, ("t1", "flair"))
        scored.clear()
        assert len(self.run(tmp_path, ("t1", "t2")).subset_names) == 2
        assert scored == [(f"case_{i}", ["t2"]) for i in range(3)]
        scored.clear()
        write_labels(tmp_path / "predictions" / "t1" / "case_2.nii.gz", random_labels(2))
        changed = self.run(tmp_path, ("t1", "t2"))
        assert scored == [("case_2", ["t1"])]
        assert changed.values("dice", "whole tumor").loc["case_2", "t1"] == 1

    def test_other_settings_are_refused(self, tmp_path):
        write_study(tmp_path)
        self.run(tmp_path)
        with pytest.raises(ValueError, match=r"scoring.policy was 'brats', is now 'nan'.*--overwrite"):
            evaluate_predictions(tmp_path / "labels", {"t1": tmp_path / "predictions" / "t1"}, DATASET_JSON,
                                 tmp_path / "out", EvaluationOptions(policy="nan", num_processes=0))

    def test_overwrite_deletes_only_our_files(self, tmp_path):
        (tmp_path / "cases").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        open_output(tmp_path, {"a": 1}, overwrite=False)
        open_output(tmp_path, {"a": 2}, overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "settings.json"]

    def test_overwrite_never_deletes_what_is_read(self, tmp_path):
        study = write_study(tmp_path)
        model = {"model": {"folder": "m"}, "source": {"images": "i"}}
        (study / "settings.json").write_text(json.dumps(model))
        inputs = [study / "labels", study / "predictions" / "t1"]
        with pytest.raises(ValueError, match=r"would delete .*predictions, but this evaluation reads .*t1"):
            open_output(study, {"source": {"kind": "predictions"}}, True, inputs=inputs)
        assert len(list((study / "predictions").glob("*/*.nii.gz"))) == 6
        assert (study / "settings.json").is_file()

    def test_finished_predictions_in_the_output_folder_survive_overwrite(self, tmp_path):
        study = write_study(tmp_path)
        folders = {"t1": study / "predictions" / "t1"}
        for policy in ("brats", "nan"):
            evaluate_predictions(study / "labels", folders, DATASET_JSON, study,
                                 EvaluationOptions(policy, num_processes=0, show_progress=False, overwrite=True))
        assert len(list((study / "predictions").glob("*/*.nii.gz"))) == 6

    def test_other_scoring_keeps_the_predictions_of_the_model(self, tmp_path, caplog):
        def fingerprint(policy: str, step: float) -> dict:
            return {"scoring": {"policy": policy, "min_region_voxels": {}, "metrics": ["dice"]},
                    "model": {"tile_step_size": step}}

        caplog.set_level(logging.WARNING)
        open_output(tmp_path, fingerprint("brats", 0.5), overwrite=False)
        made = [tmp_path / "predictions" / "t1" / "a.nii.gz", tmp_path / "cases" / "a.json"]
        for file in made:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
        with pytest.raises(ValueError, match="--overwrite to score again what is predicted"):
            open_output(tmp_path, fingerprint("nan", 0.5), overwrite=False)
        open_output(tmp_path, fingerprint("nan", 0.5), overwrite=True)
        assert [file.exists() for file in made] == [True, False]
        assert "kept and scored again" in caplog.text
        open_output(tmp_path, fingerprint("nan", 1.0), overwrite=True)
        assert not made[0].exists()

    def test_predictions_of_unknown_origin_are_not_taken_for_the_models(self, tmp_path):
        write_study(tmp_path)
        with pytest.raises(ValueError, match="says what made them"):
            open_output(tmp_path, {"model": {}}, overwrite=False)

    def test_restart_if_changed_resumes_the_same_and_replaces_others(self, tmp_path):
        made = tmp_path / "predictions" / "t1" / "a.nii.gz"
        open_output(tmp_path, {"model": 1}, False)
        made.parent.mkdir(parents=True)
        made.touch()
        open_output(tmp_path, {"model": 1}, False, restart_if_changed=True)
        assert made.exists()
        open_output(tmp_path, {"model": 2}, False, restart_if_changed=True)
        assert not made.exists()

    def test_progress_is_a_line_per_tenth(self, capsys):
        lines: list[str] = []
        assert list(progress_bar(range(25), 25, True, log=lines.append)) == list(range(25))
        assert len(lines) == 10
        assert lines[-1] == "Scoring: 25 of 25 cases"
        with progress_bar(None, 2, True, "Predicting", lines.append) as bar:
            bar.update()
            bar.update()
        assert lines[-2:] == ["Predicting: 1 of 2 cases", "Predicting: 2 of 2 cases"]
        assert capsys.readouterr() == ("", "")

    def test_a_failed_run_leaves_no_results_of_the_one_before(self, tmp_path):
        write_study(tmp_path)
        self.run(tmp_path)
        write_labels(tmp_path / "predictions" / "t1" / "case_1.nii.gz", random_labels(0, highest=7))
        with pytest.raises(ValueError, match="could not be evaluated"):
            self.run(tmp_path)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cases", "settings.json"]

    def test_fewer_subsets_do_not_replace_the_results(self, tmp_path):
        write_study(tmp_path)
        self.run(tmp_path)
        with pytest.raises(ValueError, match=r"results of 2 subsets.*without flair"):
            self.run(tmp_path, ("t1",))
        assert (tmp_path / "out" / "results.csv").is_file()

    def test_a_foreign_or_unreadable_case_file_is_listed(self, tmp_path, monkeypatch):
        write_study(tmp_path)
        (tmp_path / "out" / "cases").mkdir(parents=True)
        (tmp_path / "out" / "cases" / "case_0.json").write_text("[1]")
        whole = scoring.score_case

        def locked(case, settings):
            if case.case == "case_2":
                raise PermissionError(13, "Permission denied", "case_2.nii.gz")
            return whole(case, settings)

        monkeypatch.setattr(scoring, "score_case", locked)
        with pytest.raises(ValueError, match="2 of 3 cases") as error:
            self.run(tmp_path)
        assert "case_0.json holds no scores of an evaluation" in str(error.value)
        assert "Case case_2: [Errno 13] Permission denied" in str(error.value)


def test_failing_cases_are_listed_and_the_others_kept(tmp_path):
    write_study(tmp_path)
    write_labels(tmp_path / "predictions" / "t1" / "case_1.nii.gz", random_labels(0, highest=7))
    folders = {"t1": tmp_path / "predictions" / "t1"}
    with pytest.raises(ValueError, match=r"1 of 3 cases could not be evaluated[\s\S]*Case case_1") as error:
        evaluate_predictions(tmp_path / "labels", folders, DATASET_JSON, tmp_path / "out", QUIET)
    assert "case_0" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "out" / "cases").iterdir()) == ["case_0.json", "case_2.json"]


def test_worker_processes_give_the_same(tmp_path):
    write_study(tmp_path, cases=4)
    tasks = [CaseTask(f"case_{i}", tmp_path / "labels" / f"case_{i}.nii.gz",
                      {"t1": tmp_path / "predictions" / "t1" / f"case_{i}.nii.gz"}) for i in range(4)]
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
    labels = ((distance < 40 ** 2).astype(np.uint8) + (distance < 30 ** 2) + (distance < 20 ** 2)).astype(np.uint8)
    reference = write_labels(tmp_path / "r.nii.gz", labels)
    prediction = write_labels(tmp_path / "p.nii.gz", np.roll(labels, 3, 1))
    peaks = []
    for count in (2, 15):
        score_case(CaseTask("case", reference, dict.fromkeys(map(str, range(count)), prediction)),
                   ScoringSettings(LABELS))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] - peaks[0] < 50, f"peak resident memory in MB after 2 and 15 subsets: {peaks}"


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_that_ends_early_is_refused(tmp_path, ending):
    whole = write_labels(tmp_path / f"whole{ending}", random_labels(0, (20, 20, 20)))
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[:-500])
    for case in (CaseTask("c1", whole, {"t1": cut}), CaseTask("c1", cut, {"t1": whole})):
        with pytest.raises(ValueError, match=r"Case c1: .*cut\.nii.* cannot be read"):
            score_case(case, ScoringSettings(LABELS))
    with pytest.raises(ValueError, match=r"Cannot read .*cut"):
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
