"""A process killed while it writes a checkpoint leaves the one before, and the next run clears up behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import make_trainer, write_dataset

from nnunetv2_mgml.training import TRAINERS
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log

TESTS = Path(__file__).parents[1]
KILLED = """
import json, os, signal, sys
import torch
from builders import make_trainer
from nnunetv2_mgml.training import TRAINERS

plans_dict = json.loads(open(sys.argv[2]).read())
trainer = make_trainer(TRAINERS[sys.argv[1]], plans_dict, {"save_every": 1})
write = torch.save


def write_half(content, file):
    if trainer.current_epoch < 1 or "latest" not in str(file):
        return write(content, file)
    write(content, file)
    os.truncate(file, os.path.getsize(file) // 2)
    os.kill(os.getpid(), signal.SIGKILL)


torch.save = write_half
trainer.run_training()
"""
"""Trains two epochs and is killed in the middle of the second checkpoint."""


def scratch(folder: Path) -> list[Path]:
    """What is hidden in a fold's folder: folders that a file is prepared in."""
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("name", ["nnUNetTrainerMGML", "nnUNetTrainerModalityDropout"])
def test_killed_while_saving(name: str, nnunet_folders: Path) -> None:
    plans_dict = write_dataset(nnunet_folders)
    plans_file = next((nnunet_folders / "preprocessed").rglob("nnUNetPlans.json"))
    process = subprocess.run(
        [sys.executable, "-c", KILLED, name, str(plans_file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    trainer = make_trainer(TRAINERS[name], plans_dict, {"save_every": 1}, resume=True)
    folder = Path(trainer.output_folder)
    (left,) = scratch(folder)
    assert [path for path in left.rglob("*.pth") if path.stat().st_size], "it was killed while it wrote"
    assert torch.load(folder / "checkpoint_latest.pth", weights_only=False)["current_epoch"] == 1
    trainer.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    trainer.run_training()
    assert scratch(folder) == []
    assert torch.load(folder / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 3
    assert [row["epoch"] for row in read_log(folder / LOG_NAME)] == [0, 1, 2]
