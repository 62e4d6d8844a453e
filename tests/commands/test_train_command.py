"""``mgml train``: mistakes are one line and leave nothing behind; faults keep their traceback."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import TINY, plans, write_dataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.training import nnUNetTrainerMGML
from nnunetv2_mgml.upstream.plain_errors import TRACEBACK_VARIABLE
from nnunetv2_mgml.upstream.registration import EXT_VARIABLE

DATASET = "Dataset900_Phantom"
Train = Callable[..., int]


@pytest.fixture
def train(nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the command on a small preprocessed data set, on the CPU unless told otherwise."""
    plans_dict = plans()
    plans_dict["mgml"] = {"config": {**TINY, "num_epochs": 1, "validate_subsets": False}}
    write_dataset(nnunet_folders, plans_dict=plans_dict)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv(EXT_VARIABLE, "")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda _: None)  # a process may call it once only
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    return lambda *arguments, device=("-device", "cpu"): cli.main(["train", *map(str, [*arguments, *device])])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["999", "3d_fullres", "0"], "There is no dataset 999 in nnUNet_preprocessed"),
        (["Phantom", "3d_fullres", "0"], "'Phantom' is neither a dataset id (137) nor a name"),
        ([DATASET, "3d_lowres", "0"], "nnUNetPlans has no configuration 3d_lowres. Allowed: 3d_fullres."),
        ([DATASET, "3d_fullres", "0", "-p", "Mine"], "Mine.json (plans there: nnUNetPlans). Run nnUNetv2_plan_and_pre"),
        ([DATASET, "3d_fullres", "0", "-tr", "Mine"], "There is no trainer Mine. Of this package: nnUNetTrainer"),
        ([DATASET, "3d_fullres", "x"], "The fold must be a number (0, 1, 2, ...) or 'all', got x."),
        ([DATASET, "3d_fullres", "0", "--c", "--val"], "--c goes on training and --val only validates. Leave one"),
        ([DATASET, "3d_fullres", "0", "--c", "-pretrained_weights", "w.pth"], "--c goes on from a checkpoint, -pre"),
        ([DATASET, "3d_fullres", "3", "--val"], "nnUNetTrainerMGML__nnUNetPlans__3d_fullres/fold_3 has no checkpoint_"),
        ([DATASET, "3d_fullres", "0", "--val_best", "--disable_checkpointing"], "--val_best needs the checkpoint"),
        (
            [DATASET, "3d_fullres", "0", "-pretrained_weights", "nope.pth"],
            "-pretrained_weights nope.pth does not exist.",
        ),
        ([DATASET, "3d_fullres", "0", "-num_gpus", "2"], "-num_gpus must be 1 to 1 with -device cpu on this machine"),
        ([DATASET, "3d_fullres", "0", "-device", "tpu"], "-device must be one of cpu, cuda, mps, got tpu."),
        (
            [DATASET, "3d_fullres", "0", "-device", "cuda"],
            "-device cuda, but PyTorch finds no CUDA device. Use -device",
        ),
    ],
)
def test_mistakes_are_one_line(
    train: Train, nnunet_folders: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert train(*arguments, device=() if "-device" in arguments else ("-device", "cpu")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not list((nnunet_folders / "results").iterdir())


def test_more_gpus_than_samples_are_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert train(DATASET, "3d_fullres", 0, "-num_gpus", 3, device=("-device", "cuda")) == 2
    said = capsys.readouterr().err
    assert (
        "-num_gpus 3 needs a batch of at least as many samples, and 3d_fullres of nnUNetPlans has batch_size 2" in said
    )


def test_the_default_device_is_a_gpu(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(DATASET, "3d_fullres", 0, device=()) == 2
    assert "error: -device cuda, but PyTorch finds no CUDA device." in capsys.readouterr().err


def test_what_is_not_preprocessed(train: Train, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nnunet_folders / "preprocessed" / DATASET
    (data,) = (path for path in folder.iterdir() if path.is_dir() and path.name != "gt_segmentations")
    shutil.rmtree(data)
    assert train(DATASET, "3d_fullres", 0) == 2
    assert f"error: {data} has no preprocessed data of 3d_fullres. Run nnUNetv2_plan" in capsys.readouterr().err


def test_test_cases_are_not_trained_on(train: Train, nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nnunet_folders / "preprocessed" / DATASET / "test_cases.json").write_text(json.dumps(["case_1"]))
    assert train(DATASET, "3d_fullres", 3) == 2
    assert "error: Fold 3 would be drawn from all 2 cases, of which 1 are test cases" in capsys.readouterr().err
    assert not list((nnunet_folders / "results").iterdir())


@pytest.mark.parametrize("kind", [ValueError, AssertionError, RuntimeError, FileNotFoundError])
def test_what_fails_before_the_first_epoch_is_one_line(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[Exception]
) -> None:
    def fails(self: Any) -> None:
        raise kind("what is wrong")

    monkeypatch.setattr(nnUNetTrainerMGML, "on_train_start", fails)
    assert train(DATASET, "3d_fullres", 0) == 2
    first, *more = capsys.readouterr().err.splitlines()[-1 if issubclass(kind, (ValueError, OSError)) else -2 :]
    assert first == "error: what is wrong"
    assert more in ([], [f"({TRACEBACK_VARIABLE}=1 shows where it was raised.)"])
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    assert train(DATASET, "3d_fullres", 0) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_fault_in_an_epoch_keeps_its_traceback(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, batch: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(nnUNetTrainerMGML, "train_step", fails)
    with pytest.raises(ValueError, match="a bug"):
        train(DATASET, "3d_fullres", 0)


@pytest.mark.parametrize("fold", [0, "all"])
def test_a_training_runs(train: Train, nnunet_folders: Path, fold: object) -> None:
    before = nnUNetTrainer.on_epoch_start
    assert train(DATASET, "3d_fullres", fold) == 0
    (model,) = (nnunet_folders / "results" / DATASET).iterdir()
    assert model.name == "nnUNetTrainerMGML__nnUNetPlans__3d_fullres"
    assert (model / f"fold_{fold}" / "checkpoint_final.pth").is_file()
    assert nnUNetTrainer.on_epoch_start is before
    assert train(DATASET, "3d_fullres", fold, "--val") == 0


def test_help_speaks_of_our_trainer(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train("-h")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: mgml train " in said
    assert "Default: nnUNetTrainerMGML" in said
    assert "Train one model for all subsets of the modalities" in said
