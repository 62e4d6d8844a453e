"""Whole trainings by two processes of torchrun, over gloo on the CPU: validation, table over subsets, one that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from builders import BRATS_JSON, TINY, plans, write_dataset
from conversion_cases import needs_installation

from nnunetv2_mgml.scoring.results import load_evaluation
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log

pytestmark = pytest.mark.slow
WORLD = 2
SCRIPT = """
import os, sys
import torch
from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.training import nnUNetTrainerMGML

rank, folder = os.environ.get("RANK"), sys.argv[1]
start, end = nnUNetTrainerMGML.on_epoch_start, nnUNetTrainerMGML.on_train_end

def on_epoch_start(self):
    open(f"{folder}/pid_{rank}", "w").write(str(os.getpid()))
    start(self)

def on_train_end(self):
    objective = getattr(self.learner, "objective", None)
    state = {**self.bare_network.state_dict(), **({} if objective is None else objective.state_dict())}
    torch.save({name: value for name, value in state.items() if torch.is_tensor(value)}, f"{folder}/weights_{rank}.pt")
    end(self)

nnUNetTrainerMGML.on_epoch_start, nnUNetTrainerMGML.on_train_end = on_epoch_start, on_train_end
if __name__ == "__main__":
    torch.set_num_threads = lambda number: None  # nnU-Net would take every CPU for each of the two
    sys.exit(main(sys.argv[2:]))
"""


def write_all(root: Path, **options: Any) -> None:
    """Two cases, raw and preprocessed, and plans with few steps."""
    plans_dict = plans()
    plans_dict["mgml"] = {"config": {**TINY, "num_epochs": 2, **options}}
    write_dataset(root, plans_dict=plans_dict)
    raw = root / "raw" / plans_dict["dataset_name"]
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(BRATS_JSON))
    for file in (root / "preprocessed" / plans_dict["dataset_name"] / "gt_segmentations").iterdir():
        labels = sitk.ReadImage(str(file))
        sitk.WriteImage(labels, str(raw / "labelsTr" / file.name))
        rng = np.random.default_rng(0)
        for channel in range(4):
            values = rng.uniform(1, 50, size=sitk.GetArrayViewFromImage(labels).shape).astype(np.float32)
            image = sitk.GetImageFromArray(values + 100 * (sitk.GetArrayFromImage(labels) > channel % 3))
            name = file.name.replace(".nii.gz", f"_{channel:04d}.nii.gz")
            sitk.WriteImage(image, str(raw / "imagesTr" / name))


def start(root: Path, trainer: str) -> subprocess.Popen[str]:
    """Start torchrun in a session of its own."""
    (root / "train.py").write_text(SCRIPT)
    (root / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(WORLD)]
    call = [str(root / "train.py"), str(root / "out"), "train", "Dataset900_Phantom", "3d_fullres", "0", "-tr", trainer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(
        [*command, *call, "-device", "cpu"], text=True, env=environment, start_new_session=True, **pipes
    )


@pytest.mark.parametrize("trainer", ["nnUNetTrainerMGML", "nnUNetTrainerModalityDropout"])
def test_a_whole_training(nnunet_folders: Path, trainer: str) -> None:
    needs_installation()
    write_all(nnunet_folders)
    process = start(nnunet_folders, trainer)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said[-4000:]
    (model,) = (nnunet_folders / "results").rglob(f"{trainer}__*")
    weights = [torch.load(nnunet_folders / "out" / f"weights_{rank}.pt") for rank in range(WORLD)]
    stored = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert weights[0].keys() == weights[1].keys() >= stored.keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    for name, value in stored.items():
        assert torch.equal(value, weights[0][name]), name
    assert [row["epoch"] for row in read_log(model / "fold_0" / LOG_NAME)] == [0, 1]
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    evaluation = load_evaluation(model / "fold_0" / "subset_validation")
    assert len(evaluation.subsets) == 15
    assert set(evaluation.table["case"]) == {"case_0", "case_1"}
    assert (model / "subset_report.json").is_file()


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_one_that_is_killed_ends_the_other(nnunet_folders: Path) -> None:
    needs_installation()
    write_all(nnunet_folders, num_epochs=10000)
    process = start(nnunet_folders, "nnUNetTrainerMGML")
    files = [nnunet_folders / "out" / f"pid_{rank}" for rank in range(WORLD)]
    deadline = time.monotonic() + 300
    while not all(file.is_file() and file.read_text() for file in files):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    pids = [int(file.read_text()) for file in files]
    os.kill(pids[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in said
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in _state(pid)]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
