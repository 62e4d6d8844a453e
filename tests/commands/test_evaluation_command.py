"""``mgml evaluate`` on finished predictions, and the stored report of a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from evaluation_cases import (
    CHANNELS,
    DATASET_JSON,
    NAMES,
    random_labels,
    synthetic_evaluation,
    write_labels,
    write_study,
)

from nnunetv2_mgml.commands import evaluate as command
from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.commands.arguments import parse_predictions
from nnunetv2_mgml.inference.subset_quality import (
    REPORT_NAME,
    expected_quality,
    quality_line,
    quality_terms,
    unreliable_regions,
)
from nnunetv2_mgml.scoring.info import EvaluationInfo
from nnunetv2_mgml.scoring.results import load_evaluation
from nnunetv2_mgml.scoring.sources import choose_subsets, prediction_folders
from nnunetv2_mgml.scoring.subset_report import drop_outdated_report, write_subset_report


def evaluate(root: Path, *extra: str, predictions: tuple[str, ...] | None = None) -> int:
    return cli.main(
        [
            "evaluate",
            "--predictions",
            *(predictions or (str(root / "predictions"),)),
            "-l",
            str(root / "labels"),
            "-o",
            str(root / "out"),
            "-np",
            "0",
            "--disable_progress_bar",
            *extra,
        ]
    )


class TestPredictions:
    def test_a_root_of_subset_folders(self, tmp_path, capsys):
        write_study(tmp_path, subsets=("t1", "t2+flair", "all"))
        (tmp_path / "predictions" / "logs").mkdir()
        assert evaluate(tmp_path, "--name", "ours") == 0
        evaluation = load_evaluation(tmp_path / "out")
        assert evaluation.subset_names == ["t1", "t2+flair", "t1+t1ce+t2+flair"]
        assert evaluation.cases == ["case_0", "case_1", "case_2"]
        assert len(evaluation.table) == 3 * 3 * 3 * 6
        assert evaluation.policy == "brats"
        assert evaluation.info.source.folders["t2+flair"] == (tmp_path / "predictions" / "t2+flair").resolve()
        assert set(evaluation.info.versions) >= {"python", "nnunetv2_mgml", "nnunetv2", "numpy", "scipy"}
        assert "ours" in (tmp_path / "out" / "table.md").read_text()
        assert "t2+flair" in capsys.readouterr().out

    def test_figures_are_written_beside_the_tables(self, tmp_path):
        write_study(tmp_path, subsets=NAMES, cases=1)
        assert evaluate(tmp_path, "--no_figures") == 0
        assert not (tmp_path / "out" / "figures").exists()
        assert evaluate(tmp_path) == 0
        files = sorted((tmp_path / "out" / "figures").iterdir())
        assert [file.name for file in files] == ["heatmap.png", "number_of_modalities.png", "shapley.png"]
        assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)

    def test_named_folders_in_any_spelling(self, tmp_path):
        write_study(tmp_path, subsets=("a", "b"))
        named = (f"FULL={tmp_path / 'predictions' / 'a'}", f"FLAIR+T1Gd={tmp_path / 'predictions' / 'b'}")
        assert evaluate(tmp_path, predictions=named) == 0
        assert load_evaluation(tmp_path / "out").subset_names == ["t1ce+flair", "t1+t1ce+t2+flair"]

    def test_only_some_subsets_and_metrics(self, tmp_path):
        write_study(tmp_path, subsets=("t1", "flair"))
        assert evaluate(tmp_path, "--subsets", "flair", "--metrics", "hd95") == 0
        evaluation = load_evaluation(tmp_path / "out")
        assert (evaluation.subset_names, evaluation.metrics) == (["flair"], ["hd95"])

    def test_region_size_rule_reaches_the_scores_and_the_caption(self, tmp_path):
        write_study(tmp_path)
        assert evaluate(tmp_path, "--remove_small", "ET=100000") == 0
        evaluation = load_evaluation(tmp_path / "out")
        assert (evaluation.values("dice", "enhancing tumor") == 0).all(axis=None)
        assert (evaluation.values("dice", "tumor core") > 0).all(axis=None)
        assert "ET predicted with fewer than 100000 voxels counts as empty" in (tmp_path / "out/table.md").read_text()

    def test_other_regions_default_to_nnunets_policy(self, tmp_path):
        labels = {"background": 0, "lesion": 1, "oedema": 2, "necrosis": 3}
        write_study(tmp_path, dataset_json={**DATASET_JSON, "labels": labels})
        assert evaluate(tmp_path) == 0
        evaluation = load_evaluation(tmp_path / "out")
        assert (evaluation.policy, evaluation.region_names) == ("nan", ["lesion", "oedema", "necrosis"])

    def test_missing_predictions(self, tmp_path, capsys):
        write_study(tmp_path)
        (tmp_path / "predictions" / "flair" / "case_1.nii.gz").unlink()
        assert evaluate(tmp_path) == 2
        error = capsys.readouterr().err
        assert "1 predictions are missing for 1 of 3 labelled cases" in error
        assert "flair/case_1.nii.gz" in error
        assert evaluate(tmp_path, "--allow_missing") == 0
        evaluation = load_evaluation(tmp_path / "out")
        assert evaluation.cases == ["case_0", "case_2"]
        assert evaluation.info.missing_cases == ("case_1",)

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (("--subsets", "t9"), "Unknown modality 't9'"),
            (("--subsets", "t2"), "--subsets asks for t2"),
            (("--remove_small", "ET"), "not of the form REGION=N"),
            (("--remove_small", "brain=3"), "Unknown region 'brain'"),
            (("-m", "model"), "-m would predict"),
            (("--write_subset_report",), "needs a model"),
            (
                ("-chk", "best.pth", "-f", "1", "--shared_preprocessing", "-step_size", "0.7"),
                "-f, -chk, -step_size, --shared_preprocessing would predict, or needs a model",
            ),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, capsys, extra, message):
        write_study(tmp_path)
        assert evaluate(tmp_path, *extra) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_without_source_or_dataset_json(self, tmp_path, capsys):
        assert cli.main(["evaluate", "-o", str(tmp_path)]) == 2
        assert "missing: -d, -c" in capsys.readouterr().err
        write_study(tmp_path)
        (tmp_path / "dataset.json").unlink()
        assert evaluate(tmp_path) == 2
        assert "--dataset_json" in capsys.readouterr().err

    def test_what_does_not_exist_is_named(self, tmp_path, capsys):
        write_study(tmp_path)
        nowhere = tmp_path / "nope"
        for extra, message in (
            (("--dataset_json", str(nowhere)), f"error: --dataset_json {nowhere}: the file {nowhere} does not exist."),
            (("-l", str(nowhere)), f"error: Label folder {nowhere} does not exist."),
            (("--predictions", str(nowhere)), f"error: Prediction folder {nowhere} does not exist."),
            (("--predictions", f"t1={nowhere}"), f"error: Prediction folder {nowhere} does not exist."),
        ):
            (tmp_path / "dataset.json").unlink(missing_ok=True)
            assert evaluate(tmp_path, *extra) == 2
            assert capsys.readouterr().err.startswith(message)

    def test_results_are_not_replaced_by_fewer_or_by_others(self, tmp_path, capsys):
        write_study(tmp_path)
        assert evaluate(tmp_path) == 0
        before = (tmp_path / "out" / "results.csv").read_bytes()
        assert evaluate(tmp_path, "--subsets", "t1") == 2
        assert "holds the results of 2 subsets; this run would replace them by those of 1, without flair" in (
            capsys.readouterr().err
        )
        assert evaluate(tmp_path, "--remove_small", "ET=100000") == 2
        assert "holds an evaluation with other settings" in capsys.readouterr().err
        assert (tmp_path / "out" / "results.csv").read_bytes() == before

    def test_what_names_model_or_predictions_is_asked_for(self, tmp_path, capsys, monkeypatch):
        monkeypatch.delenv("nnUNet_results", raising=False)
        for arguments, message in (
            (["-d", "137", "-c", "3d_fullres"], "-d needs nnUNet's folders: set nnUNet_results"),
            (["--predictions", str(tmp_path), "-o", str(tmp_path)], "--predictions needs -l LABELS."),
            (["--predictions", str(tmp_path), "-l", str(tmp_path)], "--predictions needs -o OUT."),
        ):
            assert cli.main(["evaluate", *arguments]) == 2
            assert message in capsys.readouterr().err

    def test_no_case_with_all_predictions(self, tmp_path, capsys):
        write_study(tmp_path)
        for path in (tmp_path / "predictions" / "flair").glob("*.nii.gz"):
            path.unlink()
        assert evaluate(tmp_path, "--allow_missing") == 2
        assert "No labelled case has a prediction in every folder. Labelled: case_0" in capsys.readouterr().err

    def test_dataset_json_without_a_file_ending(self, tmp_path, capsys):
        write_study(tmp_path, dataset_json={k: v for k, v in DATASET_JSON.items() if k != "file_ending"})
        assert evaluate(tmp_path) == 2
        assert 'dataset.json has no "file_ending"; add it' in capsys.readouterr().err

    def test_every_option_of_a_model_is_refused_with_predictions(self):
        parser = argparse.ArgumentParser()
        command._add_model_arguments(parser)
        options = {action.option_strings[0] for action in parser._actions} - {"-h"}
        assert options < set(command._MODEL_OPTIONS)

    def test_dataset_json_is_refused_with_a_model(self, tmp_path, capsys):
        assert cli.main(["evaluate", "-m", str(tmp_path), "--dataset_json", "dataset.json"]) == 2
        assert "--dataset_json is for finished predictions" in capsys.readouterr().err

    def test_help_shows_every_option(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["evaluate", "-h"])
        text = capsys.readouterr().out
        assert all(option in text for option in ("--predictions", "--policy", "--lesionwise", "--shared_preprocessing"))

    def test_csv_is_readable_by_anyone(self, tmp_path):
        write_study(tmp_path)
        write_labels(tmp_path / "labels" / "case_0.nii.gz", random_labels(0, highest=0))
        assert evaluate(tmp_path) == 0
        table = pd.read_csv(tmp_path / "out" / "results.csv")
        assert list(table.columns) == ["case", "subset", "region", "metric", "value"]
        alarm = table[(table.case == "case_0") & (table.metric == "hd95")].value
        assert (alarm == 374).all()
        undefined = table[(table.case == "case_0") & (table.metric == "relative_volume_error")].value
        assert undefined.isna().all()


class TestFolders:
    def test_twice_the_same_subset(self, tmp_path):
        with pytest.raises(ValueError, match="given twice"):
            prediction_folders({"t1+t2": tmp_path, "T2w+T1": tmp_path}, CHANNELS)
        with pytest.raises(ValueError, match="t1 is given twice"):
            parse_predictions(["t1=a", "t1=b"])

    def test_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            prediction_folders(parse_predictions([f"t1={tmp_path / 'nowhere'}"]), CHANNELS)

    def test_root_without_subset_folders(self, tmp_path):
        (tmp_path / "case_1").mkdir()
        with pytest.raises(ValueError, match="It has: case_1"):
            prediction_folders(parse_predictions([str(tmp_path)]), CHANNELS)

    def test_all_subsets_by_default_in_table_order(self):
        assert len(choose_subsets(None, CHANNELS)) == 15
        assert choose_subsets(["full", "T1Gd"], CHANNELS) == ["t1ce", "t1+t1ce+t2+flair"]


class TestSubsetReport:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        (tmp_path / "dataset.json").write_text(json.dumps(DATASET_JSON))
        return tmp_path

    def test_round_trip(self, model):
        evaluation = synthetic_evaluation()
        assert write_subset_report(evaluation, model) == model / REPORT_NAME
        quality = expected_quality(model, (True, False, True, False))
        assert list(quality) == ["whole tumor", "tumor core", "enhancing tumor"]
        assert quality["tumor core"] == pytest.approx(evaluation.summary("dice", "tumor core")["t1+t2"])

    def test_weak_regions_are_flagged_not_dropped(self, model):
        evaluation = synthetic_evaluation()
        weak = (evaluation.table.region == "enhancing tumor") & (evaluation.table.subset == "flair")
        evaluation.table["value"] = evaluation.table["value"].where(~weak, 0.31).where(weak, 0.8)
        write_subset_report(evaluation, model)
        flair, full = (False, False, False, True), (True,) * 4
        assert unreliable_regions(model, flair) == ["enhancing tumor"]
        assert unreliable_regions(model, full) == []
        assert unreliable_regions(model, flair, bound=0.3) == []
        line = quality_line(model, flair)
        assert "enhancing tumor 0.31 ± 0.00 (unreliable, below 0.5)" in line
        assert "whole tumor" in line
        assert line.endswith("over 12 cases")

    def test_removal_rule_and_preprocessing_are_stored_and_said(self, model):
        info = {
            "min_region_voxels": {"enhancing tumor": 500},
            "model": {
                "folds": ["0"],
                "checkpoint": "checkpoint_final.pth",
                "mirroring": True,
                "shared_preprocessing": True,
            },
        }
        write_subset_report(dataclasses.replace(synthetic_evaluation(), info=EvaluationInfo.from_dict(info)), model)
        assert quality_line(model, (True,) * 4).endswith(
            "(fold 0, checkpoint_final.pth, shared preprocessing, enhancing tumor of fewer than 500 voxels counted as "
            "empty)"
        )
        assert quality_terms(model) == {
            "reliability_bound": 0.5,
            "policy": "brats",
            "min_region_voxels": {"enhancing tumor": 500},
            "shared_preprocessing": True,
            "folds": ["0"],
            "checkpoint": "checkpoint_final.pth",
            "mirroring": True,
        }

    def test_a_report_of_other_weights_is_dropped(self, model):
        checkpoint = model / "fold_0" / "checkpoint_final.pth"
        checkpoint.parent.mkdir()
        checkpoint.write_bytes(b"weights")
        status = checkpoint.stat()
        info = {
            "model": {
                "folds": ["0"],
                "checkpoint": checkpoint.name,
                "checkpoint_size_and_time_ns": [[status.st_size, status.st_mtime_ns]],
            }
        }
        write_subset_report(dataclasses.replace(synthetic_evaluation(), info=EvaluationInfo.from_dict(info)), model)
        assert not drop_outdated_report(model, 0)
        checkpoint.write_bytes(b"other weights")
        assert not drop_outdated_report(model, 1)
        assert (model / REPORT_NAME).is_file()
        assert drop_outdated_report(model, 0)
        assert not (model / REPORT_NAME).exists()
        assert not drop_outdated_report(model, 0)

    def test_nothing_stored(self, model):
        assert expected_quality(model, (True,) * 4) is None
        assert quality_line(model, (True,) * 4) is None
        assert unreliable_regions(model, (True,) * 4) == []
        write_subset_report(synthetic_evaluation().restricted(["t1"]), model)
        assert expected_quality(model, (True,) * 4) is None
        assert expected_quality(model, (True, False, False, False)) is not None

    def test_region_without_any_value_is_unreliable(self, model):
        evaluation = synthetic_evaluation(policy="nan")
        evaluation.table.loc[evaluation.table.region == "enhancing tumor", "value"] = float("nan")
        write_subset_report(evaluation, model)
        assert expected_quality(model, (True,) * 4)["enhancing tumor"] == {"mean": None, "sd": None, "n": 0}
        assert unreliable_regions(model, (True,) * 4) == ["enhancing tumor"]
        assert "enhancing tumor unknown" in quality_line(model, (True,) * 4)

    def test_another_models_evaluation_is_refused(self, model):
        with pytest.raises(ValueError, match="of modalities dwi, adc, the model of t1"):
            write_subset_report(synthetic_evaluation(channels=("dwi", "adc")), model)
        with pytest.raises(ValueError, match="has no dice"):
            write_subset_report(synthetic_evaluation(metrics=["hd95"]), model)
        with pytest.raises(FileNotFoundError, match="not a model folder"):
            write_subset_report(synthetic_evaluation(), model / "elsewhere")

    def test_damaged_report_is_named(self, model):
        (model / REPORT_NAME).write_text("{")
        with pytest.raises(ValueError, match=r"subset_report\.json is damaged"):
            expected_quality(model, (True,) * 4)

    def test_prediction_side_imports_nothing_heavy(self):
        code = (
            "import sys, nnunetv2_mgml.inference.subset_quality;"
            "sys.exit(bool({'torch', 'pandas', 'nnunetv2', 'scipy'} & set(sys.modules)))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_the_evaluation_does_not_import_torch():
    code = (
        "import sys, nnunetv2_mgml.commands.evaluate, nnunetv2_mgml.commands.compare;"
        "sys.exit(bool({'torch', 'nnunetv2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
