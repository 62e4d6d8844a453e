"""Evaluation resumed: finished cases are not scored again, whatever interrupted them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_cases import DATASET_JSON, random_labels, write_labels, write_study

from nnunetv2_mgml.inference.subsets.label_maps import drop_outdated
from nnunetv2_mgml.io.progress import progress_bar
from nnunetv2_mgml.scoring import cases as scoring
from nnunetv2_mgml.scoring.cases import score_case
from nnunetv2_mgml.scoring.output import open_output
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.workflows.evaluate import PredictionsRequest, evaluate_predictions
from nnunetv2_mgml.workflows.report import ReportRequest, make_report


def evaluate(root: Path, subsets: tuple[str, ...] = ("t1", "flair"), out: str = "out", **options: Any) -> Evaluation:
    """Score ``root/predictions/<subset>`` against ``root/labels``, without workers and bar."""
    return evaluate_predictions(
        PredictionsRequest(
            predictions={name: root / "predictions" / name for name in subsets},
            labels=root / "labels",
            output=root / out,
            num_processes=0,
            show_progress=False,
            **options,
        )
    )


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

    def test_only_what_is_missing_is_done(self, tmp_path, scored):
        write_study(tmp_path)
        first = evaluate(tmp_path)
        assert len(scored) == 3
        (tmp_path / "out" / "cases" / "case_1.json").unlink()
        for name in ("results.csv", "summary.json", "table.md"):
            (tmp_path / "out" / name).unlink()
        scored.clear()
        again = evaluate(tmp_path)
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
            evaluate(tmp_path)
        assert [p.name for p in (tmp_path / "out" / "cases").iterdir()] == ["case_0.json"]
        monkeypatch.setattr(scoring, "score_case", whole)
        scored.clear()
        evaluate(tmp_path)
        assert [case for case, _ in scored] == ["case_1", "case_2"]

    def test_a_new_subset_is_added_and_a_changed_file_done_again(self, tmp_path, scored):
        write_study(tmp_path, subsets=("t1", "flair", "t2"))
        evaluate(tmp_path, ("t1", "flair"))
        scored.clear()
        assert len(evaluate(tmp_path, ("t1", "flair", "t2")).subset_names) == 3
        assert scored == [(f"case_{i}", ["t2"]) for i in range(3)]
        scored.clear()
        write_labels(tmp_path / "predictions" / "t1" / "case_2.nii.gz", random_labels(2))
        changed = evaluate(tmp_path, ("t1", "flair", "t2"))
        assert scored == [("case_2", ["t1"])]
        assert changed.values("dice", "whole tumor").loc["case_2", "t1"] == 1

    def test_other_settings_are_refused(self, tmp_path):
        write_study(tmp_path)
        evaluate(tmp_path)
        with pytest.raises(ValueError, match=r"scoring.policy was 'brats', is now 'nan'.*--overwrite"):
            evaluate(tmp_path, ("t1",), policy="nan")

    def test_overwrite_deletes_only_our_files(self, tmp_path):
        (tmp_path / "cases").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        open_output(tmp_path, {"a": 1}, overwrite=False)
        open_output(tmp_path, {"a": 2}, overwrite=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "settings.json"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_no_evaluation_is_written_into_what_is_read(self, tmp_path, overwrite):
        study = write_study(tmp_path / "study")
        for place in ("labels", "predictions/t1"):
            with pytest.raises(ValueError, match=f"study/{place} is what is evaluated"):
                evaluate(study, out=place, overwrite=overwrite)
        with pytest.raises(ValueError, match="predictions is what is evaluated"):
            evaluate_predictions(
                PredictionsRequest(
                    predictions=study / "predictions", labels=study / "labels", output=study / "predictions"
                )
            )
        assert not list(study.rglob("settings.json"))

    @pytest.mark.parametrize("name", ["imagesTr", "summary.json", "plans.json"])
    def test_a_folder_of_nnunet_is_left_as_it_is(self, tmp_path, name):
        study = write_study(tmp_path / "study")
        (study / "raw").mkdir()
        (study / "raw" / name).write_text("of nnU-Net")
        with pytest.raises(ValueError, match=f"raw holds {name}, but no evaluation"):
            evaluate(study, out="raw", overwrite=True)
        assert [path.name for path in (study / "raw").iterdir()] == [name]

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
        for policy in ("brats", "nan"):
            evaluate(study, ("t1",), out=".", policy=policy, overwrite=True)
        assert len(list((study / "predictions").glob("*/*.nii.gz"))) == 6

    def test_other_scoring_keeps_the_predictions_of_the_model(self, tmp_path, caplog):
        def fingerprint(policy: str, step: float) -> dict:
            return {
                "scoring": {"policy": policy, "min_region_voxels": {}, "metrics": ["dice"]},
                "model": {"tile_step_size": step},
            }

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

    def test_predictions_are_kept_while_their_images_are_the_same(self, tmp_path):
        image, made = tmp_path / "a_0000.nii.gz", tmp_path / "predictions" / "t1" / "a.nii.gz"
        other = made.with_name("b_a.nii.gz")

        def kept(images: dict[int, Path]) -> bool:
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch()
            other.touch()
            drop_outdated(tmp_path / "predictions", "a", ".nii.gz", {c: str(path) for c, path in images.items()})
            assert other.exists()
            return made.exists()

        image.write_text("1")
        assert not kept({0: image})  # made from nobody knows what
        assert kept({0: image})
        moved = image.rename(tmp_path / "moved.nii.gz")
        assert kept({0: moved})
        os.utime(moved, ns=(1, 1))
        assert not kept({0: moved})
        assert not kept({0: moved, 1: tmp_path / "gone"})
        assert kept({0: moved, 1: tmp_path / "gone"})
        (tmp_path / "predictions" / "a.inputs.json").write_text("{")
        assert not kept({0: moved})

    def test_the_call_of_the_first_version_still_works(self, tmp_path, monkeypatch):
        write_study(tmp_path)
        monkeypatch.delitem(sys.modules, "nnunetv2_mgml.evaluation.evaluate", raising=False)  # it warns once a process
        with pytest.warns(DeprecationWarning, match="until 0.3"):
            from nnunetv2_mgml.evaluation.evaluate import EvaluationOptions, evaluate_predictions
        folders = {name: tmp_path / "predictions" / name for name in ("t1", "flair")}
        options = EvaluationOptions(num_processes=0, name="out", show_progress=False, figures=False)
        old = evaluate_predictions(tmp_path / "labels", folders, DATASET_JSON, tmp_path / "old", options)
        new = evaluate(tmp_path)
        assert old.table.equals(new.table)
        assert (tmp_path / "old" / "table.md").read_text() == (tmp_path / "out" / "table.md").read_text()

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
        evaluate(tmp_path)
        write_labels(tmp_path / "predictions" / "t1" / "case_1.nii.gz", random_labels(0, highest=7))
        with pytest.raises(ValueError, match="could not be evaluated"):
            evaluate(tmp_path)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cases", "settings.json"]

    def test_a_run_takes_the_page_of_the_one_before_with_it(self, tmp_path):
        write_study(tmp_path)
        evaluate(tmp_path)
        page = tmp_path / "out" / "report.html"
        make_report(ReportRequest(evaluation=tmp_path / "out", show_cases=False))
        assert page.is_file()
        write_labels(tmp_path / "predictions" / "t1" / "case_1.nii.gz", random_labels(0, highest=7))
        with pytest.raises(ValueError, match="could not be evaluated"):
            evaluate(tmp_path)
        assert not page.exists()
        page.write_text("<p>mine</p>")
        with pytest.raises(ValueError, match="could not be evaluated"):
            evaluate(tmp_path)
        assert page.read_text() == "<p>mine</p>"

    def test_files_of_one_size_and_time_in_another_folder_are_others(self, tmp_path, scored):
        for folder, value in (("A", 1), ("B", 0)):
            path = write_labels(tmp_path / folder / "a.nii", np.full((4, 4, 4), value, np.uint8))
            os.utime(path, (1e9, 1e9))
        write_labels(tmp_path / "labels" / "a.nii", np.ones((4, 4, 4), np.uint8))

        def dice(folder):
            request = PredictionsRequest(
                predictions={"t1": tmp_path / folder},
                labels=tmp_path / "labels",
                output=tmp_path / "out",
                dataset_json={**DATASET_JSON, "file_ending": ".nii"},
                num_processes=0,
                figures=False,
                show_progress=False,
            )
            return evaluate_predictions(request).values("dice", "whole tumor").loc["a", "t1"]

        assert (dice("A"), dice("B")) == (1, 0)
        scored.clear()
        (tmp_path / "link").symlink_to(tmp_path / "B")
        assert dice("link") == 0
        assert scored == []

    def test_an_evaluation_may_be_moved_with_its_predictions(self, tmp_path, scored):
        study = write_study(tmp_path / "study")
        evaluate(study, out=".")
        scored.clear()
        shutil.copytree(study / "predictions", tmp_path / "moved" / "predictions", copy_function=shutil.copy2)
        for name in ("cases", "dataset.json"):
            (study / name).rename(tmp_path / "moved" / name)
        (tmp_path / "moved" / "labels").symlink_to(study / "labels")
        evaluate(tmp_path / "moved", out=".")
        assert scored == []

    def test_fewer_subsets_do_not_replace_the_results(self, tmp_path):
        write_study(tmp_path)
        evaluate(tmp_path)
        with pytest.raises(ValueError, match=r"results of 2 subsets.*without flair"):
            evaluate(tmp_path, ("t1",))
        assert (tmp_path / "out" / "results.csv").is_file()

    def test_other_subsets_do_not_replace_the_results(self, tmp_path):
        """Neither those of which none was there, nor a new one in the place of an old one."""
        write_study(tmp_path, subsets=("t1", "flair", "t2"))
        evaluate(tmp_path, ("t1", "flair"))
        for others in (("t2",), ("t1", "t2")):
            with pytest.raises(ValueError, match=r"results of 2 subsets.*without .*flair"):
                evaluate(tmp_path, others)
        assert set(evaluate(tmp_path, ("t1", "flair", "t2")).subset_names) == {"t1", "flair", "t2"}

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
            evaluate(tmp_path)
        assert "case_0.json holds no scores of an evaluation" in str(error.value)
        assert "Case case_2: [Errno 13] Permission denied" in str(error.value)
