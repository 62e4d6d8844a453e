"""`plain_errors`: one line in nnU-Net's own commands, and in ours that call them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kept_model_cases import FIXTURE, MODEL
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.commands import predict
from nnunetv2_mgml.upstream import plain_errors, registration

HOOKED = """
import sys
from nnunetv2_mgml.upstream.plain_errors import PlainError, install
install()
before = sys.excepthook
install()
assert sys.excepthook is before
def deep():
    raise {kind}("what to do about it")
deep()
"""


def said(kind: str, environment: dict[str, str] | None = None) -> str:
    """What a Python that raises an error prints; its exit code is not 0."""
    command = [sys.executable, "-c", HOOKED.format(kind=kind)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    return done.stderr


def test_one_line_for_ours_and_a_traceback_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("PlainError") == "error: what to do about it\n"
    assert said("ValueError").startswith("Traceback")
    monkeypatch.setenv(plain_errors.TRACEBACK_VARIABLE, "1")
    assert said("PlainError").startswith("Traceback")


def test_the_start_up_line_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    monkeypatch.setattr(sys, "excepthook", before := sys.__excepthook__)  # whatever a test before this one installed
    registration.activate()
    assert sys.excepthook is not before


def images_without(folder: Path, channel: int) -> Path:
    """A folder with the kept case, but one channel."""
    folder.mkdir()
    for path in (FIXTURE / "images").iterdir():
        if not path.name.endswith(f"_{channel:04d}.nii.gz"):
            shutil.copy(path, folder)
    return folder


def test_our_own_commands_say_it_likewise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object) -> None:
        raise plain_errors.PlainError("what to do about it")

    monkeypatch.setattr(predict, "stock_entry_point", lambda name: fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["predict", "-m", "somewhere"])
    assert stopped.value.code == 2
    monkeypatch.setattr(plan_and_preprocess_entrypoints, "plan_and_preprocess_entry", fails)
    assert cli.main(["preprocess", "-d", "1"]) == 2
    assert capsys.readouterr().err == 2 * "error: what to do about it\n"


@pytest.mark.slow
def test_a_file_is_missing_and_no_flag(tmp_path: Path) -> None:
    """The console command itself, with nnU-Net's worker processes."""
    command = Path(sys.executable).with_name("nnUNetv2_predict_from_modelfolder")
    if not command.is_file():
        pytest.skip("nnU-Net's commands are not installed beside this Python")
    call = [command, "-i", images_without(tmp_path / "in", 1), "-o", tmp_path / "out", "-m", FIXTURE / MODEL]
    options = ["-f", "0", "-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"]
    done = subprocess.run([*call, *options], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: The network was given 3 channels; it has 4 modalities (t1,")
