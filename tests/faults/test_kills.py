"""Prediction, evaluation and training as real processes: killed at random moments, without workers, and two at once."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from builders import write_dataset
from conversion_cases import needs_installation, tree, write_cases
from inference_cases import segmentations, write_case, write_image, write_model
from kill_cases import Ended, Forks

from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc and fork"),
]
KILLS = int(os.environ.get("MGML_KILLS", "4"))


class Work(NamedTuple):
    """A tiny model, three cases, and a process that runs commands on them."""

    forks: Forks
    folder: Path

    def predict(self, out: Path, *options: str, workers: int = 0) -> list[str]:
        words = ["predict", "-i", f"{self.folder}/images", "-o", str(out), "-m", f"{self.folder}/model", "-f", "0"]
        processes = ["-npp", str(workers), "-nps", str(workers)]
        return [*words, "-device", "cpu", "--disable_tta", *processes, "--missing_modalities", "auto", *options]

    def evaluate(self, out: Path, workers: int = 0) -> list[str]:
        words = ["evaluate", "-m", f"{self.folder}/model", "-i", f"{self.folder}/images"]
        processes = ["-npp", str(workers), "-nps", str(workers), "-np", str(workers)]
        options = ["--disable_tta", "--no_figures", "--subsets", "all", "t1", "t2", "--disable_progress_bar"]
        return [*words, "-l", f"{self.folder}/labels", "-o", str(out), "-device", "cpu", *processes, *options]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    needs_installation()
    folder = tmp_path_factory.mktemp("kills")
    write_model(folder / "model")
    (folder / "labels").mkdir()
    for seed, name in enumerate("abc"):
        write_case(folder / "images", name, seed=seed)
        labels = np.random.default_rng(seed).integers(0, 4, (20, 18, 22)).astype(np.uint8)
        write_image(folder / "labels" / f"{name}.nii.gz", labels)
    with Forks(folder / "log") as forks:
        yield Work(forks, folder)


def hidden(folder: Path) -> list[str]:
    """What is left of an unfinished write."""
    return [name for name in tree(folder) if ".mgml_" in name]


def moments(ended: Ended, seed: int) -> list[float]:
    """Seconds at which to kill runs of the length of one that was not, one in each part: the next may be faster."""
    generator = random.Random(seed)
    return [(part + generator.random()) / KILLS * 0.9 * ended.seconds for part in range(KILLS)]


def test_prediction_killed(work: Work, tmp_path: Path) -> None:
    """What is there is whole at any moment; the next run makes the rest, the same to the byte, and clears up."""
    undisturbed = work.forks.run(*work.predict(tmp_path / "whole"))
    assert undisturbed.code == 0, undisturbed.said
    whole, killed = segmentations(tmp_path / "whole"), 0
    for number, moment in enumerate(moments(undisturbed, 0)):
        out = tmp_path / str(number)
        killed += work.forks.run(*work.predict(out), kill_after=moment).code == -signal.SIGKILL
        assert segmentations(out).items() <= whole.items()
        if (out / "mgml_prediction.json").is_file():
            json.loads((out / "mgml_prediction.json").read_text())
        again = work.forks.run(*work.predict(out, "--continue_prediction"))
        assert again.code == 0, again.said
        assert segmentations(out) == whole
        states = {case["status"] for case in json.loads((out / "mgml_prediction.json").read_text())["cases"].values()}
        assert states <= {"predicted", "skipped"}
        assert hidden(out) == []
    assert killed > KILLS // 2


def test_evaluation_killed(work: Work, tmp_path: Path) -> None:
    undisturbed = work.forks.run(*work.evaluate(tmp_path / "whole"))
    assert undisturbed.code == 0, undisturbed.said
    table = (tmp_path / "whole" / "results.csv").read_bytes()
    maps = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in tmp_path.glob("whole/predictions/*/*")}
    killed = 0
    for number, moment in enumerate(moments(undisturbed, 1)):
        out = tmp_path / str(number)
        killed += work.forks.run(*work.evaluate(out), kill_after=moment).code == -signal.SIGKILL
        for path in out.glob("predictions/*/*.nii.gz"):
            assert path.read_bytes() == maps[path.relative_to(out)]
        for path in out.rglob("*.json"):
            assert any(".mgml_" in part for part in path.parts) or json.loads(path.read_text())
        if (out / "results.csv").is_file():
            assert (out / "results.csv").read_bytes() == table
        again = work.forks.run(*work.evaluate(out))
        assert again.code == 0, again.said
        assert (out / "results.csv").read_bytes() == table
        assert maps == {path.relative_to(out): path.read_bytes() for path in out.glob("predictions/*/*")}
        assert hidden(out) == []
    assert killed > KILLS // 2


@pytest.mark.parametrize("name", ["nnUNetTrainerMGML", "nnUNetTrainerModalityDropout"])
def test_training_killed(work: Work, tmp_path: Path, name: str) -> None:
    """Going on from whatever checkpoint is there equals the run that nobody killed, to the last bit."""
    (tmp_path / "preprocessed").mkdir()
    write_dataset(tmp_path)
    (plans,) = (tmp_path / "preprocessed").rglob("nnUNetPlans.json")
    undisturbed = work.forks.run("train", name, plans, tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed.said
    whole, killed = final_state(tmp_path / "whole"), 0
    for number, moment in enumerate(moments(undisturbed, 2)):
        results = tmp_path / str(number)
        killed += work.forks.run("train", name, plans, results, kill_after=moment).code == -signal.SIGKILL
        for path in results.rglob("checkpoint_*.pth"):
            assert ".mgml_" in str(path) or torch.load(path, weights_only=False)["current_epoch"] <= 4
        again = work.forks.run("train", name, plans, results)
        assert again.code == 0, again.said
        found = final_state(results)
        assert found.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(found[key], value), key
        (log,) = results.rglob(LOG_NAME)
        assert [row["epoch"] for row in read_log(log)] == [0, 1, 2, 3]
        assert hidden(results) == []
    assert killed > KILLS // 2


def final_state(results: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished training, and how far it says it is."""
    (file,) = results.rglob("checkpoint_final.pth")
    content = torch.load(file, weights_only=False)
    return {**content["network_weights"], "epoch": torch.tensor(content["current_epoch"])}


# --- workers ----------------------------------------------------------------------------------------------------------
def test_a_worker_killed_once_changes_nothing(work: Work, tmp_path: Path) -> None:
    assert work.forks.run(*work.predict(tmp_path / "whole")).code == 0
    ended = work.forks.run(*work.predict(tmp_path / "out", workers=1), kill_workers=1)
    assert ended.code == 0, ended.said
    assert segmentations(tmp_path / "out") == segmentations(tmp_path / "whole")


@pytest.mark.parametrize("command", ["predict", "evaluate", "convert"])
def test_workers_killed_again_and_again(
    work: Work, tmp_path: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """One error that names it, in time; what was there is there."""
    write_cases(tmp_path / "source", 2)
    with Forks(tmp_path / "log") as forks:  # it knows nnU-Net's folders of this test
        calls = {
            "predict": work.predict(tmp_path / "out", workers=1),
            "evaluate": work.evaluate(tmp_path / "out", workers=1),
            "convert": ["convert", "brats", str(tmp_path / "source"), "-d", "7", "--name", "A", "-np", "2"],
        }
        ended = forks.run(*calls[command], kill_workers=1000)
        assert ended.code in (1, 2), ended.said
        assert "a worker process died" in ended.said
        assert "error: " in ended.said
        assert "Traceback" not in ended.said.partition("error: ")[2]
        assert tree(nnunet_folders / "raw") == []
        assert hidden(tmp_path) == []
        calls = {
            "predict": work.predict(tmp_path / "out"),
            "evaluate": work.evaluate(tmp_path / "out"),
            "convert": [*calls["convert"][:-1], "0"],
        }
        again = forks.run(*calls[command])
        assert again.code == 0, again.said


# --- two at once ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_two_at_once_into_one_folder(work: Work, tmp_path: Path, command: str) -> None:
    """Both say what they did, and what is there in the end is whole."""
    call = getattr(work, command)
    assert work.forks.run(*call(tmp_path / "whole")).code == 0
    for attempt in range(2):
        out = tmp_path / f"out{attempt}"
        ended = work.forks.together([call(out), call(out)])
        assert 0 in [one.code for one in ended], [one.said for one in ended]
        for one in ended:
            assert one.code == 0 or "error: " in one.said
        name = "results.csv" if command == "evaluate" else "a.nii.gz"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert hidden(out) == []
        shutil.rmtree(out)
