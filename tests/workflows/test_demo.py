"""``mgml demo``: which commands it calls; the whole run is too long for the tests."""

from __future__ import annotations

import json
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
