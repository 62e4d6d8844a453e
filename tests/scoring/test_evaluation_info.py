"""What ``summary.json`` says of an evaluation: read back as it was written, and refused where it makes no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_cases import synthetic_evaluation

from nnunetv2_mgml.scoring.info import EvaluatedModel, EvaluationInfo, Source
from nnunetv2_mgml.scoring.results import load_evaluation, save_evaluation

MODEL = EvaluatedModel(Path("m"), ("0", "1"), "best.pth", ((5, 6), (7, 8)), "T", True, 0.5, False, False)
INFOS = {
    "predictions": EvaluationInfo(
        {"ET": 500},
        None,
        ("mgml", "evaluate"),
        "2026-01-01T00:00:00+00:00",
        {"numpy": "2"},
        Source("predictions", labels=Path("l"), folders={"t1": Path("a")}),
        missing_cases=("c",),
    ),
    "model": EvaluationInfo(
        ignore_label=4,
        source=Source("validation", "Dataset001_A", ("0", "1"), Path("i"), Path("l")),
        model=MODEL,
        not_evaluated={"a": ("t1", "t1+t2")},
        folds_of_cases={"a": ("0",)},
    ),
    "nothing known": EvaluationInfo(),
}
KEYS = {
    "predictions": ["source", "missing_cases"],
    "model": ["source", "model", "not_evaluated", "folds_of_cases"],
    "nothing known": [],
}


@pytest.mark.parametrize("kind", INFOS)
def test_round_trip_through_json(kind: str) -> None:
    content = json.loads(json.dumps(INFOS[kind].as_dict()))
    assert list(content) == ["min_region_voxels", "ignore_label", "command", "created", "versions", *KEYS[kind]]
    assert EvaluationInfo.from_dict(content) == INFOS[kind]


def test_the_file_of_an_older_or_newer_version_is_read(tmp_path: Path) -> None:
    """Entries that were not written yet keep their default; those of a later version are left alone."""
    save_evaluation(synthetic_evaluation(), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["model"] = {"folder": "/m", "folds": ["0"], "of_the_future": {"a": 1}}
    summary["of_the_future"] = [1]
    del summary["ignore_label"]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert load_evaluation(tmp_path).info.model == EvaluatedModel(Path("/m"), ("0",))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("source", "labelsTr", "'source' must be an object, found 'labelsTr'"),
        ("source", {"labels": 3}, "'source.labels' must be a text, found 3"),
        ("source", {"folders": {"t1": None}}, "'source.folders.t1' must be a text, found None"),
        ("model", {"folds": "0"}, "'model.folds' must be a list"),
        ("model", {"mirroring": 1}, "'model.mirroring' must be true or false"),
        ("model", {"checkpoint_size_and_time_ns": [[True, 2]]}, "must be a whole number, found True"),
        ("ignore_label", "4", "'ignore_label' must be a whole number"),
        ("not_evaluated", ["a"], "'not_evaluated' must be an object"),
        ("versions", {"numpy": 2}, "'versions.numpy' must be a text"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_names_it(tmp_path: Path, key: str, value: Any, message: str) -> None:
    save_evaluation(synthetic_evaluation(cases=1), tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, key: value}))
    with pytest.raises(ValueError, match=r"summary\.json is damaged") as error:
        load_evaluation(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_evaluation_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"summary\.json does not exist\. Give the folder of an evaluation"):
        load_evaluation(tmp_path / "nowhere")
