"""Regions by which even a perfect prediction would score badly are refused wherever they would be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import BRATS_JSON, make_trainer, write_dataset
from evaluation_cases import DATASET_JSON, write_study
from inference_cases import write_case, write_model
from planning_cases import DATASET, nnunet_plans
from report_cases import write_evaluation, write_volumes

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.training import TRAINERS

PAEDIATRIC: dict[str, Any] = {
    "labels": {"background": 0, "WT": [1, 2, 3, 4], "TC": [1, 2, 3], "ET": [1]},
    "regions_class_order": [1, 2, 3],
}


def assert_refused(message: str) -> None:
    assert "label 1 (in WT, TC, ET) would be written as 3, which is in WT, TC" in message
    assert "label 4 (in WT) would be written as 1" in message
    assert '"regions_class_order": [4, 2, 1]' in message
    assert len(message.strip().splitlines()) == 1


def change(file: Path, **content: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))


def test_by_plan(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nnunet_plans(nnunet_folders)
    folder = nnunet_folders / "preprocessed" / DATASET
    change(folder / "dataset.json", **PAEDIATRIC)
    assert cli.main(["plan", "-d", "137"]) == 2
    assert_refused(capsys.readouterr().err)
    assert not (folder / "nnUNetMGMLPlans.json").exists()
    change(folder / "dataset.json", regions_class_order=[4, 2, 1])
    assert cli.main(["plan", "-d", "137"]) == 0


@pytest.mark.parametrize("name", ["nnUNetTrainerMGML", "nnUNetTrainerModalityDropout"])
def test_by_training(nnunet_folders: Path, name: str) -> None:
    plans = write_dataset(nnunet_folders)
    trainer = make_trainer(TRAINERS[name], plans, dataset_json=BRATS_JSON | PAEDIATRIC)
    with pytest.raises(ValueError, match="regions_class_order") as error:
        trainer.initialize()
    assert_refused(str(error.value))
    right = BRATS_JSON | PAEDIATRIC | {"regions_class_order": [4, 2, 1]}
    make_trainer(type(trainer), plans, dataset_json=right).initialize()


def test_by_evaluating_finished_predictions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_study(tmp_path, cases=1, dataset_json=DATASET_JSON | PAEDIATRIC)
    call = ["evaluate", "--predictions", str(tmp_path / "predictions"), "-l", str(tmp_path / "labels"), "-np", "0"]
    assert cli.main([*call, "-o", str(tmp_path / "out")]) == 2
    assert_refused(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    # without an order the regions are only what is to be scored
    change(tmp_path / "dataset.json", regions_class_order=None)
    assert cli.main([*call, "-o", str(tmp_path / "out")]) == 0


def test_by_evaluating_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    change(model / "dataset.json", **PAEDIATRIC)
    write_case(tmp_path / "images", "a")
    (tmp_path / "labels").mkdir()
    call = ["evaluate", "-m", str(model), "-i", str(tmp_path / "images"), "-l", str(tmp_path / "labels")]
    assert cli.main([*call, "-o", str(tmp_path / "out"), "-device", "cpu"]) == 2
    assert_refused(capsys.readouterr().err)


def test_by_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluation(tmp_path / "evaluation", ["case_a"])
    write_volumes(tmp_path, tmp_path / "evaluation", ["case_a"])
    change(tmp_path / "dataset.json", **PAEDIATRIC)
    call = ["report", str(tmp_path / "evaluation"), "-i", str(tmp_path / "imagesTs"), "-l", str(tmp_path / "labelsTs")]
    assert cli.main(call) == 2
    assert_refused(capsys.readouterr().err)
