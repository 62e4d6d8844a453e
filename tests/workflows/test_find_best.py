"""Choosing a model and its post-processing over all subsets."""

from __future__ import annotations

import json
import multiprocessing.dummy
import pickle
import shlex
import sys
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from evaluation_cases import write_labels
from inference_cases import load
from nnunetv2.postprocessing import remove_connected_components

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.workflows.evaluate import PredictionsRequest, evaluate_predictions
from nnunetv2_mgml.workflows.find_best import BestRequest

DATASET_JSON: dict[str, Any] = {
    "channel_names": {"0": "t2", "1": "flair"},
    "file_ending": ".nii.gz",
    "labels": {"background": 0, "lesion": 1},
}
SUBSETS = ("t2", "flair", "t2+flair")


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's pools are threads here: new processes take longer than everything else."""
    monkeypatch.setattr(remove_connected_components.multiprocessing, "get_context", lambda _: multiprocessing.dummy)


def write_evaluation(
    root: Path,
    name: str,
    specks: dict[str, int],
    size: dict[str, int],
    dataset_json: dict[str, Any] = DATASET_JSON,
    false_alarm: int = 0,
) -> Path:
    """Two cases with one lesion each; predictions are boxes of an edge, with specks far away, per subset."""
    (root / "model").mkdir(exist_ok=True)
    (root / "model" / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (root / "model" / "plans.json").write_text(json.dumps(builders.plans(modalities=2)))
    for case in ("a", "b"):
        truth = np.zeros((12, 12, 12), np.uint8)
        truth[2:8, 2:8, 2:8] = 1
        write_labels(root / "labels" / f"{case}.nii.gz", truth)
        for subset in SUBSETS:
            predicted = np.zeros_like(truth)
            predicted[2 : 2 + size[subset], 2:8, 2:8] = 1
            predicted[10, 10, : specks[subset]] = 1
            predicted[11, 11, :false_alarm] = 2
            write_labels(root / name / "predictions" / subset / f"{case}.nii.gz", predicted)
    request = PredictionsRequest(
        predictions=root / name / "predictions",
        labels=root / "labels",
        output=root / name,
        dataset_json=dataset_json,
        name=name,
        num_processes=0,
        figures=False,
        show_progress=False,
    )
    evaluate_predictions(request)
    summary = json.loads((root / name / "summary.json").read_text())
    summary["model"] = {"folder": str(root / "model")}
    (root / name / "summary.json").write_text(json.dumps(summary))
    return root / name


def test_the_choice_is_over_all_subsets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A is best on complete cases, B on all subsets; B's specks go, in every subset by the same rule."""
    none, some = dict.fromkeys(SUBSETS, 0), dict.fromkeys(SUBSETS, 5)
    a = write_evaluation(tmp_path, "A", none, {"t2": 2, "flair": 2, "t2+flair": 6})
    b = write_evaluation(tmp_path, "B", some, {"t2": 5, "flair": 5, "t2+flair": 5})
    assert main(["find-best", str(a), str(b), "-o", str(tmp_path / "best"), "-np", "1"]) == 0
    said = capsys.readouterr().out
    assert f"best over all subsets: {b}" in said
    assert f"complete cases alone would choose {a}" in said
    assert "keep the largest component of foreground" in said
    choice = json.loads((tmp_path / "best" / "find_best.json").read_text())
    assert choice["best"] == str(b)
    assert choice["commands"][0].startswith(
        f"nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {tmp_path / 'model'} -f 0 "
    )
    assert choice["dice"][str(a)]["complete"] == 1
    assert choice["dice"][str(a)]["single"] == pytest.approx(0.5)
    assert choice["dice"][str(b)]["all"] == pytest.approx(2 * 180 / (185 + 216))
    pooled = choice["postprocessing"]
    assert pooled["dice_before"] == pytest.approx(2 * 180 / (185 + 216))
    assert pooled["dice_after"] == pytest.approx(2 * 180 / (180 + 216))
    assert set(pooled["by_subset"]) == set(SUBSETS)
    assert pooled["by_subset"]["t2"]["after"] == pytest.approx(2 * 180 / (180 + 216))
    assert "note: it lowers" not in said
    with open(tmp_path / "best" / "postprocessing.pkl", "rb") as file:
        functions, arguments = pickle.load(file)
    cleaned = functions[0](load(b / "predictions" / "t2" / "a.nii.gz"), **arguments[0])
    assert cleaned.sum() == 180
    assert not [path for path in tmp_path.rglob("*__*")], "nothing temporary is left"


def test_what_a_candidate_has_no_value_for_is_left_out_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a label that no case has; one candidate raises false alarms of it, which have a Dice of 0."""
    none = dict.fromkeys(SUBSETS, 0)
    rare = {**DATASET_JSON, "labels": {**DATASET_JSON["labels"], "rare": 2}}
    bad = write_evaluation(tmp_path, "bad", none, dict.fromkeys(SUBSETS, 1), rare)
    good = write_evaluation(tmp_path, "good", none, dict.fromkeys(SUBSETS, 6), rare)
    alarm = write_evaluation(tmp_path, "alarm", none, dict.fromkeys(SUBSETS, 5), rare, false_alarm=1)
    for folders in ((bad, good, alarm), (alarm, bad, good)):
        call = ["find-best", *map(str, folders), "-o", str(tmp_path / "best"), "--no_postprocessing"]
        assert main(call) == 0
        said = capsys.readouterr().out
        assert f"best over all subsets: {good}" in said
        assert "note: left out, as a candidate has no value there: rare from t2, flair, t2+flair" in said
        choice = json.loads((tmp_path / "best" / "find_best.json").read_text())
        assert choice["left_out"] == {"rare": ["t2", "flair", "t2+flair"]}
        assert choice["dice"][str(good)] == {"all": 1, "complete": 1, "single": 1}
    for folder in (bad, good):
        table = folder / "results.csv"
        rows = [line if "dice" not in line else f"{line.rpartition(',')[0]},nan" for line in table.read_text().split()]
        table.write_text("\n".join(rows) + "\n")
    assert main(["find-best", str(bad), str(good), "-o", str(tmp_path / "other"), "--no_postprocessing"]) == 2
    assert "no region and no subset of which every candidate" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def as_ensemble(evaluation: Path) -> dict[str, Any]:
    """Turn an evaluation into one of merged predictions: no model, no plans, ``dataset.json`` as nnU-Net leaves it."""
    summary: dict[str, Any] = json.loads((evaluation / "summary.json").read_text())
    del summary["model"]
    summary["source"]["folders"] = {name: str(evaluation / "predictions" / name) for name in SUBSETS}
    (evaluation / "summary.json").write_text(json.dumps(summary))
    for name in SUBSETS:
        (evaluation / "predictions" / name / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return summary


def test_an_ensemble_is_post_processed_with_the_plans_of_a_member(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed command is typed: it removes the specks of merged predictions, for which nnU-Net writes no plans."""
    member = write_evaluation(tmp_path, "member", dict.fromkeys(SUBSETS, 0), dict.fromkeys(SUBSETS, 2))
    ensemble = write_evaluation(tmp_path, "the ensemble", dict.fromkeys(SUBSETS, 5), dict.fromkeys(SUBSETS, 5))
    as_ensemble(ensemble)
    best = tmp_path / "the best"
    assert main(["find-best", str(member), str(ensemble), "-o", str(best), "-np", "1"]) == 0
    said = capsys.readouterr().out
    choice = json.loads((best / "find_best.json").read_text())
    assert choice["best"] == str(ensemble)
    assert choice["postprocessing"]["plans"] == str(tmp_path / "model" / "plans.json")
    assert choice["postprocessing"]["keep_largest_component_of"] == ["foreground"]
    (command,) = choice["commands"]
    assert command in said
    assert (best / "inference_instructions.txt").read_text() == f"{command}\n"
    (tmp_path / "model" / "plans.json").unlink()  # the copy in the folder is enough
    words = shlex.split(command)
    assert words[0] == "nnUNetv2_apply_postprocessing"
    words[words.index("OUT")] = str(ensemble / "predictions" / "t2")
    words[words.index("OUT_PP")] = str(tmp_path / "cleaned")
    monkeypatch.setattr(sys, "argv", words)
    remove_connected_components.entry_point_apply_postprocessing()
    assert load(tmp_path / "cleaned" / "a.nii.gz").sum() == 180


def test_plans_of_an_ensemble_whose_members_are_no_candidates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensemble = write_evaluation(tmp_path, "ensemble", dict.fromkeys(SUBSETS, 5), dict.fromkeys(SUBSETS, 5))
    as_ensemble(ensemble)
    call = ["find-best", str(ensemble), "-o", str(tmp_path / "best"), "-np", "1"]
    assert main(call) == 2
    assert "of any member: --plans MODEL_FOLDER" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "plans.json").write_text("{}")
    (tmp_path / "other" / "dataset.json").write_text(json.dumps({**DATASET_JSON, "labels": {"background": 0, "a": 2}}))
    assert main([*call, "--plans", str(tmp_path / "other")]) == 2
    assert "other labels" in capsys.readouterr().err
    assert main([*call, "--plans", str(tmp_path / "nowhere")]) == 2
    assert "neither plans.json nor a folder" in capsys.readouterr().err
    assert main([*call, "--plans", str(tmp_path / "model" / "plans.json")]) == 0
    assert (tmp_path / "best" / "postprocessing.pkl").is_file()


def test_the_command_predicts_as_was_evaluated(tmp_path: Path) -> None:
    """Folds, checkpoint, step and mirroring of the evaluation; of a cascade both stages."""
    a = write_evaluation(tmp_path, "A", dict.fromkeys(SUBSETS, 0), dict.fromkeys(SUBSETS, 5))
    model = tmp_path / "T__P__fine"
    model.mkdir()
    (model / "plans.json").write_text(json.dumps({"configurations": {"fine": {"previous_stage": "coarse"}}}))
    summary = json.loads((a / "summary.json").read_text())
    summary["model"] = {
        "folder": str(model),
        "folds": ["0", "1"],
        "checkpoint": "checkpoint_best.pth",
        "mirroring": False,
        "tile_step_size": 0.75,
    }
    (a / "summary.json").write_text(json.dumps(summary))
    assert main(["find-best", str(a), "-o", str(tmp_path / "best"), "--no_postprocessing"]) == 0
    options = "-f 0 1 -chk checkpoint_best.pth -step_size 0.75 --disable_tta"
    assert json.loads((tmp_path / "best" / "find_best.json").read_text())["commands"] == [
        f"nnUNetv2_predict_from_modelfolder -i IN -o OUT_coarse -m {tmp_path / 'T__P__coarse'} {options} "
        f"--missing_modalities auto",
        f"nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {model} {options} -prev_stage_predictions OUT_coarse "
        f"--missing_modalities auto",
    ]


def test_subsets_that_get_worse_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of T2 alone the larger component is the wrong one."""
    specks, sizes = {"t2": 5, "flair": 12, "t2+flair": 12}, {"t2": 0, "flair": 6, "t2+flair": 6}
    b = write_evaluation(tmp_path, "B", specks, sizes)
    for case in ("a", "b"):
        predicted = load(b / "predictions" / "t2" / f"{case}.nii.gz")
        predicted[2, 2, 2:6] = 1
        write_labels(b / "predictions" / "t2" / f"{case}.nii.gz", predicted)
    assert main(["find-best", str(b), "-o", str(tmp_path / "best"), "-np", "1"]) == 0
    assert "it lowers 1 subsets; leave it out for these: t2 (-3.56)" in capsys.readouterr().out


def test_no_postprocessing_where_none_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_evaluation(tmp_path, "A", dict.fromkeys(SUBSETS, 0), dict.fromkeys(SUBSETS, 5))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "postprocessing.pkl").write_bytes(b"of an earlier choice")
    assert main(["find-best", str(a), "-o", str(tmp_path / "best"), "-np", "1"]) == 0
    assert "none helps" in capsys.readouterr().out
    assert not (tmp_path / "best" / "postprocessing.pkl").exists()


def test_files_of_a_model_or_of_nnunets_choice_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_evaluation(tmp_path, "A", dict.fromkeys(SUBSETS, 0), dict.fromkeys(SUBSETS, 5))
    (tmp_path / "nnunet").mkdir()
    (tmp_path / "nnunet" / "inference_instructions.txt").write_text("nnU-Net's")
    for folder, named in ((tmp_path / "model", "plans.json, dataset.json"), (tmp_path / "nnunet", "inference_instr")):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert main(["find-best", str(a), "-o", str(folder), "--no_postprocessing"]) == 2
        assert f"{folder} holds {named}" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for _ in range(2):  # its own choice is replaced
        assert main(["find-best", str(a), "-o", str(tmp_path / "best"), "--no_postprocessing"]) == 0


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_evaluation(tmp_path, "A", dict.fromkeys(SUBSETS, 0), dict.fromkeys(SUBSETS, 5))
    table = (a / "results.csv").read_text()
    out = ["-o", str(tmp_path / "best")]
    (a / "results.csv").write_text("\n".join(line for line in table.splitlines() if "t2+flair" not in line))
    assert main(["find-best", str(a), *out]) == 2
    assert "2 of 3 subsets" in capsys.readouterr().err
    (a / "results.csv").write_text(table)
    summary = json.loads((a / "summary.json").read_text())
    del summary["model"]
    (a / "summary.json").write_text(json.dumps(summary))
    earlier = tmp_path / "best" / "postprocessing.pkl"
    earlier.parent.mkdir(exist_ok=True)
    earlier.write_bytes(b"of an earlier choice")
    assert main(["find-best", str(a), *out]) == 2
    assert "--no_postprocessing" in capsys.readouterr().err
    assert earlier.read_bytes() == b"of an earlier choice"  # a choice that fails takes nothing away
    assert main(["find-best", str(a), *out, "--no_postprocessing"]) == 0
    assert main(["find-best", str(tmp_path), *out]) == 2
    with pytest.raises(ValueError, match="at least one evaluation folder"):
        BestRequest(folders=[], output=tmp_path)
    with pytest.raises(ValueError, match=r"\(-np\) must be 1 or more, got 0"):
        BestRequest(folders=[a], output=tmp_path, num_processes=0)
    (a / "results.csv").write_text("\n".join(line for line in table.splitlines() if ",dice," not in line))
    (a / "summary.json").write_text(json.dumps({**summary, "metrics": ["hd95"]}))
    assert main(["find-best", str(a), *out]) == 2
    assert "has no Dice; evaluate with --metrics dice" in capsys.readouterr().err
