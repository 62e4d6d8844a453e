"""A model folder of version 0.1.0 predicts bit for bit what it did, and what lies beside it keeps its meaning.

`fixtures/make_model.py` says what is kept and why its label maps are the same on every CPU. A test that fails here says
that users' models, plans or evaluations have changed their meaning; the kept files are not to be made again.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_model_cases import (
    CHANNELS,
    CHECKPOINT,
    DATASET,
    FIXTURE,
    FLOAT_SUBSETS,
    MODEL,
    PLANS,
    SUBSETS,
    load_predictor,
    load_trainer,
    predict_folder,
    probabilities,
    read,
    read_expected,
    saved_again,
    training_step,
)

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.plans.options import Options
from nnunetv2_mgml.scoring.results import load_evaluation
from nnunetv2_mgml.training.epoch_log import read_log

IMAGES, LABELS = FIXTURE / "images", FIXTURE / "labels"
REGIONS = {"whole_tumor", "tumor_core", "enhancing_tumor"}


@functools.cache
def kept_predictor(mirroring: bool = False) -> MGMLPredictor:
    return load_predictor(FIXTURE / MODEL, mirroring=mirroring)


@functools.cache
def expected() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return read_expected()


def content(file: str) -> Any:
    return json.loads((FIXTURE / file).read_text())


def assert_same_bytes(labels: np.ndarray, kept: np.ndarray) -> None:
    assert labels.shape == kept.shape
    assert labels.dtype == kept.dtype == np.uint8
    assert labels.tobytes() == kept.tobytes(), f"{(labels != kept).sum()} voxels differ"


def test_what_is_kept_proves_something() -> None:
    """Three labels from most subsets, no two subsets alike, and no voxel that another CPU could decide otherwise."""
    arrays, facts = expected()
    assert facts["smallest_absolute_logit"] > 1e-3
    assert len({arrays[subset].tobytes() for subset in SUBSETS}) == 15
    assert sum(set(np.unique(arrays[subset])) == {0, 1, 2, 3} for subset in SUBSETS) >= 10


@pytest.mark.parametrize("subset", SUBSETS)
def test_label_maps_from_files(subset: str, tmp_path: Path) -> None:
    labels = predict_folder(kept_predictor(), IMAGES, subset, tmp_path)
    assert_same_bytes(labels, expected()[0][subset])
    told = json.loads((tmp_path / "labels" / "mgml_prediction.json").read_text())
    [case] = told["cases"].values()
    assert case["status"] == "predicted"
    assert case["present"] == subset.split("+")
    assert case["missing"] == [name for name in CHANNELS if name not in subset.split("+")]
    assert case["expected_dice"] == content(f"{MODEL}/subset_report.json")["subsets"][subset]
    assert case["expected_dice"].keys() == REGIONS
    assert set(case["unreliable_regions"]) == {r for r, dice in case["expected_dice"].items() if dice["mean"] < 0.5}


@pytest.mark.parametrize("subset", FLOAT_SUBSETS)
def test_probabilities_and_mirroring(subset: str) -> None:
    """Float values may be rounded otherwise on another CPU, by a step of nnU-Net's float16 sums; decisions may not."""
    arrays, _ = expected()
    labels, values = probabilities(kept_predictor(), IMAGES, subset)
    assert_same_bytes(labels, arrays[subset])
    np.testing.assert_allclose(values, arrays[f"probabilities/{subset}"], rtol=0, atol=2e-3)
    labels, _ = probabilities(kept_predictor(mirroring=True), IMAGES, subset)
    assert_same_bytes(labels, arrays[f"mirrored/{subset}"])


def test_evaluation_of_the_model_again(tmp_path: Path, nnunet_folders: Path) -> None:
    """All subsets from one pass of the encoders: the same label maps, scores and files."""
    assert main(["evaluate", "-m", str(FIXTURE / MODEL), "-i", str(IMAGES), "-l", str(LABELS), "-o",
                 str(tmp_path / "out"), "-device", "cpu", "--disable_tta", "--disable_progress_bar", "-np", "0",
                 "-npp", "0", "-nps", "0", "--name", "kept"]) == 0  # fmt: skip
    for subset in SUBSETS:
        [file] = (tmp_path / "out" / "predictions" / subset).glob("*.nii.gz")
        assert_same_bytes(read(file), expected()[0][subset])
    kept, now = load_evaluation(FIXTURE / "evaluation"), load_evaluation(tmp_path / "out")
    assert list(now.table.columns) == list(kept.table.columns)
    keys = ["case", "subset", "region", "metric"]
    assert now.table[keys].to_dict("list") == kept.table[keys].to_dict("list")
    np.testing.assert_allclose(now.table["value"], kept.table["value"], rtol=1e-9)
    for name in ("settings.json", "summary.json"):
        before, after = content(f"evaluation/{name}"), json.loads((tmp_path / "out" / name).read_text())
        assert set(flat(before)) - {"versions.panoptica"} <= set(flat(after)), name
    # a run of before is continued only where these are the same; places and times are those of this run
    for part in ("scoring", "channels"):
        assert json.loads((tmp_path / "out" / "settings.json").read_text())[part] == content(
            "evaluation/settings.json")[part]  # fmt: skip


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = {f"{prefix}.{key}".lstrip("."): part for key, part in value.items()}
    return {name: leaf for key, part in parts.items() for name, leaf in flat(part, key).items()}


def test_kept_evaluations_are_read(tmp_path: Path) -> None:
    for folder in (FIXTURE / "evaluation", FIXTURE / MODEL / "fold_0" / "subset_validation"):
        evaluation = load_evaluation(folder)
        header, *lines = (folder / "results.csv").read_text().splitlines()
        assert header == "case,subset,region,metric,value"
        assert list(evaluation.table.columns) == header.split(",")
        assert [float(line.rpartition(",")[2]) for line in lines] == pytest.approx(
            list(evaluation.table["value"]), abs=0, nan_ok=True)  # fmt: skip
        summary = json.loads((folder / "summary.json").read_text())
        assert evaluation.name == summary["name"]
        assert evaluation.channels == CHANNELS
        assert sorted(evaluation.subset_names) == sorted(SUBSETS)
        assert set(evaluation.region_names) == REGIONS
        assert evaluation.metrics == list(summary["metrics"])
        assert evaluation.policy == "brats"
        for metric, regions in summary["results"].items():
            for region, subsets in regions.items():
                now = evaluation.summary(metric, region)
                assert now.keys() == subsets.keys()
                for name, entry in subsets.items():
                    values = {key: np.nan if value is None else value for key, value in entry.items()}
                    assert now[name] == pytest.approx(values, rel=1e-12, nan_ok=True)


def test_the_checkpoint_goes_into_the_trainer(nnunet_folders: Path) -> None:
    stored = torch.load(FIXTURE / MODEL / CHECKPOINT, map_location="cpu", weights_only=False)
    trainer = load_trainer(FIXTURE / MODEL)
    assert trainer.current_epoch == trainer.num_epochs == stored["init_args"]["plans"]["mgml"]["config"]["num_epochs"]
    again = saved_again(trainer)
    for name in ("network_weights", "optimizer_state", "trainer_name", "inference_allowed_mirroring_axes"):
        assert_same(again[name], stored[name], name)
    for name in ("meta_network", "meta_optimizer"):
        assert_same(again["mgml"][name], stored["mgml"][name], name)


def assert_same(now: Any, kept: Any, where: str) -> None:
    """The same values at the same places, tensors bit for bit."""
    assert type(now) is type(kept), where
    if isinstance(kept, dict):
        assert list(now) == list(kept), where
        for key, value in kept.items():
            assert_same(now[key], value, f"{where}.{key}")
    elif isinstance(kept, torch.Tensor):
        assert now.dtype == kept.dtype, where
        assert torch.equal(now, kept), where
    else:
        assert now == kept, where


def test_a_training_step_from_the_checkpoint(nnunet_folders: Path) -> None:
    """Options, losses and both optimizers do the same, up to rounding, which other CPUs do otherwise."""
    assert training_step(FIXTURE / MODEL, IMAGES, LABELS) == pytest.approx(expected()[1]["training_step"], rel=1e-3)


def test_the_training_log(nnunet_folders: Path) -> None:
    rows = read_log(FIXTURE / MODEL / "fold_0" / "mgml_training_log.csv")
    assert [row["epoch"] for row in rows] == list(range(len(rows)))
    step = {name if name.startswith("train_") or name in rows[0] else f"train_{name}"
            for name in expected()[1]["training_step"] if not name.startswith(("change_", "loss"))}  # fmt: skip
    assert step <= set(rows[-1])
    assert {f"pseudo_dice_{region}" for region in REGIONS} <= set(rows[-1])


@pytest.mark.parametrize("file", [f"{MODEL}/plans.json", f"preprocessed/{PLANS}.json"])
def test_options_in_plans(file: str) -> None:
    """Every option is what it was; what later versions added comes on top."""
    plans = content(file)
    options = json.loads(json.dumps(Options.from_plans(plans).as_dict()))
    assert {name: options[name] for name in plans["mgml"]["config"]} == plans["mgml"]["config"]


def test_plans_are_taken_up_by_mgml_plan(nnunet_folders: Path) -> None:
    folder = nnunet_folders / "preprocessed" / DATASET
    shutil.copytree(FIXTURE / "preprocessed", folder)
    assert main(["plan", "-d", DATASET, "-p", PLANS, "--set", "seed=8", "fusion=concat"]) == 0
    before, after = content(f"preprocessed/{PLANS}.json"), json.loads((folder / f"{PLANS}.json").read_text())
    wanted = {**before["mgml"]["config"], "seed": 8, "fusion": "concat"}
    assert {name: after["mgml"]["config"][name] for name in wanted} == wanted
    assert {**after, "mgml": None} == {**before, "mgml": None}
