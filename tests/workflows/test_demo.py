"""``mgml demo``: which commands it calls; the whole run is too long for the tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nnunetv2_mgml.commands.main import COMMANDS
from nnunetv2_mgml.workflows import demo


@pytest.mark.parametrize("active", [True, False])
def test_without_the_start_up_line_our_own_commands_train_and_predict(
    tmp_path: Path, active: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where NNUNETV2_MGML_DISABLE=1 or the .pth file is gone nnU-Net's commands know neither trainer nor flag."""
    request = demo.DemoRequest(folder=tmp_path / "demo", stock_commands=active)
    run = demo._Demo(request.folder, request, print)
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(run, "_call", lambda log, *command, epochs=None: calls.append(command))
    plans = run.root / "nnUNet_preprocessed" / demo.DATASET / f"{demo.PLANS}.json"
    plans.parent.mkdir(parents=True)
    plans.write_text(json.dumps({"mgml": {"config": {"num_epochs": 1}}}))
    run.train()
    run.predict()
    train, *predictions = calls
    if active:
        assert train[:2] == ("nnUNetv2_train", str(demo.DATASET_ID))
        assert {command[:2] for command in predictions} == {("nnUNetv2_predict", "-i")}
    else:
        assert train[:3] == ("mgml", "train", str(demo.DATASET_ID))
        assert {command[:3] for command in predictions} == {("mgml", "predict", "-i")}
        assert {"train", "predict"} <= set(COMMANDS)
    assert len(predictions) == len(demo.SUBSETS) + 1
    assert predictions[-1][-2:] == ("--missing_modalities", "auto")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> demo._Demo:
    """A demo whose commands are Python programs."""
    monkeypatch.setattr(demo, "_script", lambda command: sys.executable)
    said: list[str] = []
    run = demo._Demo(tmp_path / "demo", demo.DemoRequest(folder=tmp_path / "demo"), said.append)
    run.said = said  # type: ignore[attr-defined]
    return run


def test_the_training_says_how_long_it_will_take(run: demo._Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100 * 240, 240))  # an epoch takes four minutes
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    program = "for _ in range(15): print('Pseudo dice [0.5, nan]'); print('Epoch time: 1 s')"
    run._call("train", "python", "-c", program, epochs=15)
    [text] = [line for line in run.said if "min" in line]
    assert text.startswith("  the training ends in about 52 min; predictions and scores of 15 subsets follow")
    assert "--set num_epochs=5" in text
    assert "--set" not in demo._remaining(60, 13)
    assert (run.logs / "train.txt").read_text().count("Epoch time") == 15


def test_a_command_that_fails_is_shown_with_its_last_lines(run: demo._Demo) -> None:
    with pytest.raises(ValueError, match=r"'mgml' ended with exit code 3\. .*plan\.txt:\s+no room left") as error:
        run._call("plan", "mgml", "-c", "print('first'); print('\\n' * 30 + 'no room left'); raise SystemExit(3)")
    assert "first" not in str(error.value)


def test_a_command_that_is_not_installed_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="'no_such_command' is not installed beside"):
        demo._script("no_such_command")


def test_only_a_demo_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo._Demo, "write_phantoms", stop)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"Choose another folder with -o\.$"):
            demo.run_demo(demo.DemoRequest(folder=tmp_path / "mine", overwrite=overwrite), print)
    request = demo.DemoRequest(folder=tmp_path / "demo")
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(request, print)
    (request.folder / "old").mkdir()
    with pytest.raises(ValueError, match="or replace it with --overwrite"):
        demo.run_demo(request, print)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(demo.DemoRequest(folder=request.folder, overwrite=True), print)
    assert sorted(path.name for path in request.folder.iterdir()) == ["logs", demo.MARKER]
    assert (tmp_path / "mine" / "thesis.txt").is_file()
