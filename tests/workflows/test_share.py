"""A model goes to another machine with all it says of itself."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_cases import synthetic_evaluation
from kept_model_cases import FIXTURE, MODEL
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.inference.preprocessing import Item
from nnunetv2_mgml.inference.report import PredictionReport
from nnunetv2_mgml.inference.subset_quality import (
    CARRIED_KEY,
    CARRIER,
    REPORT_NAME,
    expected_quality,
    expected_volume_error,
    quality_line,
)
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.scoring.subset_report import carry_report, write_subset_report
from nnunetv2_mgml.workflows.share import ExportRequest, export_model

DATASET = "Dataset910_Kept"
SUBSETS = all_subsets(4)


@pytest.fixture
def model(nnunet_folders: Path) -> Path:
    """The kept model in nnUNet_results, with a report that names this machine's folders."""
    folder = nnunet_folders / "results" / DATASET / MODEL
    shutil.copytree(FIXTURE / MODEL, folder)
    (folder / "fold_0" / "progress.png").touch()
    (folder / "fold_0" / "validation").mkdir()
    (folder / "fold_0" / "validation" / "summary.json").write_text('{"reference_file": "/patients/Miller.nii.gz"}')
    report = json.loads((folder / REPORT_NAME).read_text())
    report["evaluated"] = {"kind": "validation", "images": "/patients/images", "labels": "/patients/labels"}
    (folder / REPORT_NAME).write_text(json.dumps(report))
    carry_report(folder)
    return folder


def test_the_report_travels_with_nnunets_own_export_and_install(
    model: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [expected_quality(model, subset) for subset in SUBSETS]
    line = quality_line(model, SUBSETS[0])
    archive = nnunet_folders / "model.zip"
    export_pretrained_model(DATASET, str(archive), ("3d_fullres",), "nnUNetTrainerMGML", "nnUNetMGMLPlans", (0,))
    monkeypatch.setenv("nnUNet_results", str(nnunet_folders / "elsewhere"))
    install_model_from_zip_file(str(archive))
    installed = nnunet_folders / "elsewhere" / DATASET / MODEL
    assert not (installed / REPORT_NAME).exists(), "nnU-Net leaves it out"
    assert [expected_quality(installed, subset) for subset in SUBSETS] == expected
    assert quality_line(installed, SUBSETS[0]) == line
    assert "/patients" not in (installed / CARRIER).read_text()
    report = PredictionReport(str(nnunet_folders), {"folder": str(installed)}, ("t1", "t1ce", "t2", "flair"))
    report.add_item(Item("a", np.zeros(0), {}, SUBSETS[0]))
    assert report.cases["a"]["expected_dice"] == expected[0]


def test_the_copy_follows_the_report(model: Path) -> None:
    def carried() -> Any:
        return json.loads((model / CARRIER).read_text()).get(CARRIED_KEY)

    assert carried()["channels"] == ["t1", "t1ce", "t2", "flair"]
    (model / CARRIER).write_text("{}")  # a further fold is trained
    carry_report(model)
    assert carried() is not None
    (model / REPORT_NAME).unlink()
    carry_report(model)
    assert carried() is None
    assert expected_quality(model, SUBSETS[0]) is None
    (model / CARRIER).write_text("{")
    carry_report(model)
    with pytest.raises(ValueError, match=r"dataset_fingerprint\.json is damaged"):
        expected_quality(model, SUBSETS[0])
    (model / CARRIER).unlink()
    assert expected_quality(model, SUBSETS[0]) is None


def test_what_a_damaged_report_says_to_delete_is_all_there_is(model: Path) -> None:
    (model / REPORT_NAME).write_text("{")
    advice = rf"or delete it and the entry {CARRIED_KEY} of {CARRIER} beside it, where there is one\."
    with pytest.raises(ValueError, match=advice):
        expected_quality(model, SUBSETS[0])
    (model / REPORT_NAME).unlink()
    fingerprint = json.loads((model / CARRIER).read_text())
    fingerprint[CARRIED_KEY] = []
    (model / CARRIER).write_text(json.dumps(fingerprint))
    with pytest.raises(ValueError, match=rf"{CARRIER} is damaged .* or delete the entry {CARRIED_KEY} of {CARRIER}\."):
        expected_quality(model, SUBSETS[0])
    del fingerprint[CARRIED_KEY]
    (model / CARRIER).write_text(json.dumps(fingerprint))
    assert expected_quality(model, SUBSETS[0]) is None


def test_volume_errors_are_stored_and_quoted(model: Path) -> None:
    evaluation = synthetic_evaluation(metrics=["dice", "absolute_volume_error"])
    write_subset_report(evaluation, model)
    found = expected_volume_error(model, (True,) * 4)
    assert found is not None
    region = evaluation.region_names[0]
    name = "t1+t1ce+t2+flair"
    assert found[region] == pytest.approx(evaluation.summary("absolute_volume_error", region)[name])
    write_subset_report(synthetic_evaluation(metrics=["dice"]), model)
    assert expected_volume_error(model, (True,) * 4) is None, "as in reports of before"


def test_export_model_writes_what_a_hospital_needs(
    model: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    archive = nnunet_folders / "model.zip"
    command = ["export-model", "-d", "910", "-p", "nnUNetMGMLPlans", "-o", str(archive), "--license", "CC-BY-4.0"]
    assert main(command) == 0
    install, predict = capsys.readouterr().out.splitlines()[-2:]
    with zipfile.ZipFile(archive) as opened:
        names = {name.removeprefix(f"{DATASET}/{MODEL}/") for name in opened.namelist()}
        everything = b"".join(opened.read(name) for name in opened.namelist() if not name.endswith((".pth", ".png")))
    assert {"plans.json", "dataset.json", CARRIER, REPORT_NAME, "MODEL_CARD.md"} < names
    assert {"fold_0/checkpoint_final.pth", "fold_0/mgml_training_log.csv"} < names
    assert b"patients" not in everything.replace(b"Synthetic patients", b"").lower().replace(b"of patients", b"")
    assert install.split() == ["nnUNetv2_install_pretrained_model_from_zip", "model.zip"]
    assert "--missing_modalities auto" in predict

    elsewhere = nnunet_folders / "elsewhere"
    monkeypatch.setenv("nnUNet_results", str(elsewhere))
    install_model_from_zip_file(str(archive))
    images = nnunet_folders / "IN"
    images.mkdir()
    for file in sorted((FIXTURE / "images").glob("*.nii.gz"))[::3]:
        shutil.copy(file, images)
    arguments = shlex.split(predict.replace("$nnUNet_results", str(elsewhere)))[1:]
    arguments[arguments.index("IN")], arguments[arguments.index("OUT")] = str(images), str(nnunet_folders / "OUT")
    with pytest.raises(SystemExit) as stopped:
        main(["predict", *arguments, "-device", "cpu", "--disable_tta", "-npp", "0", "-nps", "0"])
    assert stopped.value.code == 0
    entry = json.loads((nnunet_folders / "OUT" / "mgml_prediction.json").read_text())["cases"]["Phantom_00001"]
    assert entry["missing"] == ["t1ce", "t2"]
    assert entry["expected_dice"] is not None


def test_lists_of_cases_stay_out(model: Path, nnunet_folders: Path) -> None:
    listed = {
        "dataset": {"Miller_1961": {"images": ["/patients/Miller_1961.nii.gz"] * 4, "label": "/patients/seg.nii.gz"}},
        "training": [{"image": "./imagesTr/Miller_1961.nii.gz"}],
        "validation": ["Miller_1961"],
        "test": ["./imagesTs/Miller_1961.nii.gz"],
    }
    before = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**before, **listed}))
    file = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["init_args"]["dataset_json"] = {**before, **listed}
    torch.save(content, file)
    written = export_model(ExportRequest(model, nnunet_folders / "m"))
    with zipfile.ZipFile(written.path) as opened:
        opened.extractall(nnunet_folders / "opened")
    assert sorted(written.files) == sorted(set(written.files))
    everything = [path for path in (nnunet_folders / "opened").rglob("*") if path.is_file()]
    assert not [path for path in everything if b"Miller" in path.read_bytes()]
    shared = nnunet_folders / "opened" / DATASET / MODEL
    assert json.loads((shared / "dataset.json").read_text()) == before
    got = torch.load(shared / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert got["init_args"]["dataset_json"] == before
    assert got.keys() == content.keys()
    for name, tensor in content["network_weights"].items():
        assert torch.equal(got["network_weights"][name], tensor), name


def test_a_checkpoint_without_lists_is_copied_as_it_is(model: Path, nnunet_folders: Path) -> None:
    written = export_model(ExportRequest(model, nnunet_folders / "m"))
    with zipfile.ZipFile(written.path) as opened:
        copied = opened.read(f"{DATASET}/{MODEL}/fold_0/checkpoint_final.pth")
    assert copied == (model / "fold_0" / "checkpoint_final.pth").read_bytes()


def test_a_second_stage_names_the_first(model: Path, nnunet_folders: Path, capsys: Any) -> None:
    name, _, configuration = MODEL.rpartition("__")
    plans = json.loads((model / "plans.json").read_text())
    whole = plans["configurations"].pop(configuration)  # nnU-Net's second stage has nothing of its own
    plans["configurations"]["whole"] = whole
    plans["configurations"][configuration] = {"inherits_from": "whole", "previous_stage": "3d_lowres"}
    (model / "plans.json").write_text(json.dumps(plans))
    archive = nnunet_folders / "model.zip"
    assert main(["export-model", "-m", str(model), "-o", str(archive)]) == 0
    said = capsys.readouterr().out
    first = f"{DATASET}/{name}__3d_lowres"
    assert f"needs the predictions of {first}" in said
    commands = [line.strip() for line in said.splitlines()[-3:]]
    assert f'-o OUT_3d_lowres -m "$nnUNet_results/{first}" -f 0 --missing' in commands[1]
    assert f'-o OUT -m "$nnUNet_results/{DATASET}/{MODEL}" -f 0 -prev_stage_predictions OUT_3d_lowres ' in commands[2]
    with zipfile.ZipFile(archive) as opened:
        card = opened.read(f"{DATASET}/{MODEL}/MODEL_CARD.md").decode()
    assert f"It needs the model of the first, `{first}`" in card
    assert " x ".join(f"{value:g}" for value in whole["spacing"]) in card, "what it inherits"
    assert all(command in card for command in commands)


def test_the_card_says_what_is_known(model: Path, nnunet_folders: Path) -> None:
    evaluation = synthetic_evaluation(metrics=["dice", "absolute_volume_error"])
    write_subset_report(evaluation, model)
    description = json.loads((model / "dataset.json").read_text())
    description["description"] = "two centres |\n3 T"
    (model / "dataset.json").write_text(json.dumps(description))
    written = export_model(ExportRequest(model, nnunet_folders / "m"))
    assert written.path.name == "m.zip"
    with zipfile.ZipFile(written.path) as opened:
        card = opened.read(f"{DATASET}/{MODEL}/MODEL_CARD.md").decode()
    assert "licence of the weights | not stated" in card
    assert "| description of the data | two centres \\| 3 T |" in card
    assert "a mean below 50 unreliable" in card
    assert card.count("\n| t1") + card.count("\n| flair") + card.count("\n| t2") >= 15
    region = evaluation.region_names[0]
    entry = evaluation.summary("dice", region)["flair"]
    volume = evaluation.summary("absolute_volume_error", region)["flair"]["mean"]
    assert f"{100 * entry['mean']:.1f} ({100 * entry['sd']:.1f}); {volume:.1f} ml" in card
    assert all(command in card for command in written.commands)


def test_a_folder_gets_an_archive_named_after_the_model(model: Path, nnunet_folders: Path, capsys: Any) -> None:
    folder = nnunet_folders / "exports"
    folder.mkdir()
    archive = folder / f"{DATASET}__{MODEL}.zip"
    assert main(["export-model", "-m", str(model), "-o", f"{folder}/"]) == 0
    shown = capsys.readouterr().out
    assert f"model: {archive} (" in shown
    assert f"nnUNetv2_install_pretrained_model_from_zip {archive.name}" in shown
    assert [path.name for path in folder.iterdir()] == [archive.name]
    assert not (nnunet_folders / "exports.zip").exists()
    assert main(["export-model", "-m", str(model), "-o", str(folder)]) == 2
    assert f"{archive} exists. Give another name, or --overwrite" in capsys.readouterr().err
    assert main(["export-model", "-m", str(model), "-o", str(nnunet_folders / "new" / "folder" / "m.zip")]) == 0


def test_a_model_without_report_says_so(model: Path, nnunet_folders: Path, capsys: Any) -> None:
    (model / REPORT_NAME).unlink()
    (model / CARRIER).unlink()
    archive = nnunet_folders / "model.zip"
    assert main(["export-model", "-m", str(model), "-o", str(archive)]) == 0
    shown = capsys.readouterr().out
    assert "has no subset_report.json" in shown
    assert "states no licence" in shown
    with zipfile.ZipFile(archive) as opened:
        assert f"{DATASET}/{MODEL}/{CARRIER}" not in opened.namelist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "{model}", "-o", "{archive}", "-f", "3"], "no checkpoint_final.pth for fold 3"),
        (["-m", "{model}/..", "-o", "{archive}"], "plans.json is missing|dataset.json is missing"),
        (["-m", "{copy}", "-o", "{archive}"], "is not .*DatasetXXX_NAME/TRAINER"),
        (["-m", "{model}", "-d", "910", "-o", "{archive}"], "one of the two"),
        (["-m", "{model}", "-o", "{taken}"], "exists. Give another name"),
    ],
)
def test_refusals(model: Path, nnunet_folders: Path, capsys: Any, arguments: list[str], message: str) -> None:

    copy = nnunet_folders / "somewhere" / MODEL
    shutil.copytree(model, copy)
    taken = nnunet_folders / "taken.zip"
    taken.touch()
    places = {"model": model, "copy": copy, "archive": nnunet_folders / "model.zip", "taken": taken}
    assert main(["export-model", *(argument.format(**places) for argument in arguments)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (nnunet_folders / "model.zip").exists()
