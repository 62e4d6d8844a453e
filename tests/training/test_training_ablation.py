"""The scripts of `benchmarks/ablation` that train: what a result says of its code, and trainings without validation."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mgml.training import TRAINERS, nnUNetTrainerMGML

FOLDER = Path(__file__).parents[2] / "benchmarks" / "ablation"
MODULES = ("settings", "data", "run")


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The scripts as modules, with an empty results folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(loaded["settings"], "RESULTS", tmp_path / "results")
    yield SimpleNamespace(**loaded)
    for name in MODULES:
        del sys.modules[name]


def test_a_result_names_the_code_it_started_with(
    ablation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run takes long enough for someone to commit meanwhile."""
    state = {"commit": "before", "code_changed": False}

    def call(work: Path, log: Path, command: Any, **_: str) -> None:
        if "nnUNetv2_train" in command:
            state.update({"commit": "after", "code_changed": True})

    monkeypatch.setattr(ablation.run, "call", call)
    for name in state:
        monkeypatch.setattr(ablation.run, name, lambda name=name: state[name])
    later = {"evaluate": None, "scores": {"mean": 0.5}, "validation_scores": None, "last_epoch": {}}
    for name, result in later.items():
        monkeypatch.setattr(ablation.run, name, lambda *_, result=result: result)
    run = ablation.settings.all_runs(ablation.settings.read_settings(), ["main"])[0]
    result = ablation.run.execute(run, tmp_path, keep_model=True)
    assert (result["commit"], result["code_changed"]) == ("before", False)
    assert json.loads(run.file.read_text())["commit"] == "before"


@pytest.mark.parametrize("skip", [True, False])
def test_every_trainer_skips_its_validation_when_asked(skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class ValidatedError(RuntimeError):
        pass

    def validate(*_: Any, **__: Any) -> None:
        raise ValidatedError

    validated = []

    def script() -> int:
        for name, trainer in {**TRAINERS, "nnUNetTrainer": nnUNetTrainer}.items():
            try:
                trainer.perform_actual_validation(SimpleNamespace())
            except ValidatedError:
                validated.append(name)
        return 0

    for module in (os, multiprocessing):
        monkeypatch.setattr(module, "cpu_count", module.cpu_count)  # the script sets it for good
    for trainer in (nnUNetTrainer, nnUNetTrainerMGML):
        monkeypatch.setattr(trainer, "perform_actual_validation", validate)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [SimpleNamespace(load=lambda: script)])
    monkeypatch.setattr(sys, "argv", ["one_thread.py", *["--skip_validation"] * skip, "nnUNetv2_train"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / "one_thread.py"), run_name="__main__")
    assert end.value.code == 0
    assert set(validated) == (set() if skip else {*TRAINERS, "nnUNetTrainer"})
