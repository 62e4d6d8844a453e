"""The `mgml` command: its shell, and `mgml info`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nnunetv2_mgml import __version__
from nnunetv2_mgml.commands.main import COMMANDS, _HelpFormatter, main
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.upstream.registration import DISABLE_VARIABLE, EXT_DIR, EXT_VARIABLE, PTH_NAME
from nnunetv2_mgml.workflows import installation


def test_help_lists_every_command_on_one_line(capsys):
    width = max(map(len, COMMANDS))
    for arguments in (["--help"], ["-h"], []):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        for name, command in COMMANDS.items():
            assert [line for line in lines if line.split()[:1] == [name]] == [f"  {name:<{width}}  {command.summary}"]
        assert lines[-1].startswith("example: mgml ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mgml {__version__}\n"


def test_unknown_command_lists_the_commands(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no command 'trian'")
    assert all(name in error for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["info"],
        ["info", "--json"],
        ["info", "--ext-dir"],
        ["nonsense"],
    ],
)
def test_torch_is_not_imported(arguments):
    code = (
        f"import sys; from nnunetv2_mgml.commands.main import main; main({arguments!r});"
        "print([m for m in ('torch', 'nnunetv2', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("error", [ValueError("bad value"), FileNotFoundError("no such file")])
def test_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys, error):
    def run(_):
        raise error

    monkeypatch.setattr("nnunetv2_mgml.commands.info.run", run)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_exceptions_keep_their_traceback(monkeypatch):
    def run(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr("nnunetv2_mgml.commands.info.run", run)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


def test_exit_code_of_a_command_is_passed_on(monkeypatch):
    monkeypatch.setattr("nnunetv2_mgml.commands.info.run", lambda _: 7)
    assert main(["info"]) == 7


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "predict", "preprocess")])
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "-h"])
    assert stop.value.code == 0
    assert f"usage: mgml {name}" in capsys.readouterr().out
    module = importlib.import_module(COMMANDS[name].module)
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_help_shows_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "-h"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: nnUNetMGMLPlans)" in out
    assert "(default: [])" not in out
    assert "(default: False)" not in out
    assert "(default: None)" not in out
    assert "example: mgml plan" in out


def test_a_default_of_zero_is_shown():
    parser = argparse.ArgumentParser(formatter_class=_HelpFormatter)
    parser.add_argument("--seed", default=0, help="of the bootstrap")
    parser.add_argument("--quiet", action="store_true", help="no bar")
    assert "of the bootstrap (default: 0)" in parser.format_help()
    assert "default: False" not in parser.format_help()


@pytest.fixture
def nnunet_calls(monkeypatch) -> list:
    """What ``train`` and ``predict`` would have started: ``(function, argument, sys.argv)``."""
    calls: list = []
    importlib.import_module("nnunetv2_mgml.upstream.pretrained_weights")  # keeps a function of the real module
    training = types.ModuleType("nnunetv2.run.run_training")
    training.run_training_entry = lambda: calls.append(("train", None, list(sys.argv)))
    predict = types.ModuleType("nnunetv2_mgml.commands.predict")
    predict.main = lambda entry_point: calls.append(("predict", entry_point, list(sys.argv)))
    preprocess = types.ModuleType("nnunetv2.experiment_planning.plan_and_preprocess_entrypoints")
    preprocess.plan_and_preprocess_entry = lambda: calls.append(("preprocess", None, list(sys.argv)))
    api = types.ModuleType("nnunetv2.experiment_planning.plan_and_preprocess_api")
    for step in (
        "extract_fingerprint_dataset",
        "plan_experiment_dataset",
        "preprocess_dataset",
        "verify_dataset_integrity",
    ):
        setattr(api, step, lambda: None)
    for module in (training, predict, preprocess, api):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv(EXT_VARIABLE, "/mine")
    return calls


OURS = ["-tr", "nnUNetTrainerMGML"]


@pytest.mark.parametrize(
    ("arguments", "function", "entry_point", "passed"),
    [
        (["train", "137", "2d", "0"], "train", None, ["137", "2d", "0", *OURS]),
        (["train", "137", "2d", "0", "-tr", "X", "--c"], "train", None, ["137", "2d", "0", "-tr", "X", "--c"]),
        (["train", "137", "2d", "0", "-tr=X"], "train", None, ["137", "2d", "0", "-tr=X"]),
        (["train", "-h"], "train", None, ["-h", *OURS]),
        (["preprocess", "-d", "1", "-c", "2d"], "preprocess", None, ["-d", "1", "-c", "2d"]),
        (["predict", "-d", "1", "-f", "0", "1"], "predict", "predict_entry_point", ["-d", "1", "-f", "0", "1", *OURS]),
        (["predict", "-d", "1", "-tr", "X"], "predict", "predict_entry_point", ["-d", "1", "-tr", "X"]),
        (["predict", "-m", "folder"], "predict", "predict_entry_point_modelfolder", ["-m", "folder"]),
    ],
)
def test_train_and_predict_hand_over(nnunet_calls, arguments, function, entry_point, passed):
    assert main(arguments) == 0
    assert nnunet_calls == [(function, entry_point, [f"mgml {function}", *passed])]
    assert os.environ[EXT_VARIABLE] == f"/mine{os.pathsep}{EXT_DIR}"


def test_info_ext_dir_is_only_the_folder(capsys):
    assert main(["info", "--ext-dir"]) == 0
    folder = capsys.readouterr().out
    assert folder == f"{EXT_DIR}\n"
    assert Path(folder.strip(), "mgml_trainers.py").is_file()


def test_info_options_and_fusions(capsys):
    main(["info", "--options"])
    options = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in options if " = " in line and line[0] != " "] == list(Options.names())
    main(["info", "--fusions"])
    from nnunetv2_mgml.network.fusion import fusion_designs

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(fusion_designs())
    assert all(len(line.split()) > 3 for line in lines)


@pytest.fixture
def site_folder(tmp_path, monkeypatch) -> Path:
    """An empty folder that this Python believes to be its site-packages."""
    monkeypatch.setattr(installation.site, "getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.setattr(installation.site, "ENABLE_USER_SITE", False)
    monkeypatch.delenv(DISABLE_VARIABLE, raising=False)
    monkeypatch.delenv(EXT_VARIABLE, raising=False)
    return tmp_path


def test_info_says_whether_the_start_up_line_works(site_folder, monkeypatch, capsys):
    main(["info"])
    out = capsys.readouterr().out
    assert f"off (no {PTH_NAME}" in out
    assert f'export {EXT_VARIABLE}="{EXT_DIR}"' in out
    (site_folder / PTH_NAME).touch()
    main(["info"])
    out = capsys.readouterr().out
    assert "on: nnUNetv2_* commands" in out
    assert "export" not in out
    monkeypatch.setenv(DISABLE_VARIABLE, "1")
    main(["info"])
    assert f"off ({DISABLE_VARIABLE}=1)" in capsys.readouterr().out


def test_info_export_line_keeps_the_users_folders(site_folder, monkeypatch):
    monkeypatch.setenv(EXT_VARIABLE, os.pathsep.join(["/mine", EXT_DIR]))
    assert installation.export_line() == f'export {EXT_VARIABLE}="/mine{os.pathsep}{EXT_DIR}"'


def test_info_json(site_folder, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", "/data/raw")
    monkeypatch.delenv("nnUNet_results", raising=False)
    main(["info", "--json"])
    state = json.loads(capsys.readouterr().out)
    assert state["versions"]["nnunetv2_mgml"] == __version__
    assert state["versions"]["nnunetv2"].startswith("2.8.")
    assert state["start_up_line"] == {"file": None, "disabled": False, "active": False}
    assert (state["environment"]["nnUNet_raw"], state["environment"]["nnUNet_results"]) == ("/data/raw", None)


def test_info_without_torch(monkeypatch, capsys):
    def missing(name):
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "version", missing)
    assert main(["info"]) == 0
    assert "torch                not installed" in capsys.readouterr().out
