"""`registration`: the search path for trainers, and handing the predict commands over."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.upstream import registration

VARIABLE = registration.EXT_VARIABLE
REPOSITORY = Path(__file__).parents[2]


def run_python(code: str, *arguments: str, script: Path | None = None, **environment: str) -> str:
    """Run code in another Python, as a script file where ``script`` names one; return what it printed."""
    if script is not None:
        script.write_text(code)
    command = [sys.executable, *(["-c", code] if script is None else [str(script)]), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=variables).stdout


def test_ext_holds_modules_that_only_re_export():
    names = {path.name for path in Path(registration.EXT_DIR).glob("*.py")}
    assert names == {"__init__.py", "mgml_trainers.py"}
    source = Path(registration.EXT_DIR, "mgml_trainers.py").read_text()
    assert "class " not in source
    assert "from ." not in source


def test_ext_re_exports_every_trainer():
    import nnunetv2_mgml.ext.mgml_trainers as ext
    import nnunetv2_mgml.training as training

    assert sorted(ext.__all__) == sorted(training.TRAINERS)
    assert {"nnUNetTrainerMGML", "nnUNetTrainerModalityDropout"} <= set(ext.__all__)
    assert all(getattr(ext, name) is trainer for name, trainer in training.TRAINERS.items())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "{ext}"),
        ("", "{ext}"),
        ("/mine", "/mine{sep}{ext}"),
        ("/a{sep}/b", "/a{sep}/b{sep}{ext}"),
        ("{ext}", "{ext}"),
        ("{ext}{sep}/b", "{ext}{sep}/b"),
        ("{ext}/../ext", "{ext}/../ext"),
    ],
)
def test_search_path_is_appended_to_once(monkeypatch, before, after):
    filled = {"sep": os.pathsep, "ext": registration.EXT_DIR}
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before.format(**filled))
    for _ in range(2):
        registration.add_ext_dir()
        assert os.environ[VARIABLE] == after.format(**filled)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abc/.", min_size=1, max_size=6), max_size=4))
def test_search_path_keeps_what_is_there(folders):
    before = os.pathsep.join(folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, before)
        registration.add_ext_dir()
        after = os.environ[VARIABLE].split(os.pathsep)
    assert after[-1] == registration.EXT_DIR
    assert after[:-1] == folders


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("/env/bin/nnUNetv2_predict", "nnUNetv2_predict"),
        ("nnUNetv2_predict", "nnUNetv2_predict"),
        ("/env/nnUNetv2_predict-script.py", "nnUNetv2_predict"),
        ("/env/nnUNetv2_predict-script.pyw", "nnUNetv2_predict"),
        ("/env/nnUNetv2_predict.exe", "nnUNetv2_predict"),
        ("/env/nnUNetv2_predict.EXE", "nnUNetv2_predict"),
        ("", ""),
        ("-c", "-c"),
        ("/nnUNetv2_predict/train.py", "train.py"),
    ],
)
def test_command_name(script, name):
    assert registration.command_name(script) == name


@pytest.mark.parametrize(
    ("argv", "entry_point"),
    [
        (["nnUNetv2_predict", "-i", "in", "--missing_modalities", "t1"], "predict_entry_point"),
        (["nnUNetv2_predict", "--missing_modalities=t1"], "predict_entry_point"),
        (["/env/bin/nnUNetv2_predict", "-h"], "predict_entry_point"),
        (["nnUNetv2_predict.exe", "--help"], "predict_entry_point"),
        (["nnUNetv2_predict_from_modelfolder", "--missing_modalities", "auto"], "predict_entry_point_modelfolder"),
        (["nnUNetv2_predict", "-i", "in", "-o", "out"], None),
        (["nnUNetv2_predict", "-i", "--missing_modalities_of_mine"], None),
        (["nnUNetv2_train", "--missing_modalities", "t1"], None),
        (["nnUNetv2_predictor", "-h"], None),
        (["nnUNetv2_train", "-h"], None),
        (["pytest", "-h"], None),
        (["", "--missing_modalities"], None),
        (["nnUNetv2_predict"], None),
    ],
)
def test_what_is_handed_over(argv, entry_point):
    assert registration.wanted_entry_point(argv) == entry_point


@pytest.fixture
def stock_module(tmp_path, monkeypatch) -> str:
    """A module that stands for nnU-Net's predict module, and one that stands for ours."""
    package = tmp_path / "stock_nnunet"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "predict.py").write_text(
        "def predict_entry_point():\n    return 'stock'\n"
        "def predict_entry_point_modelfolder():\n    return 'stock modelfolder'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "PREDICT_MODULE", "stock_nnunet.predict")
    monkeypatch.setenv(VARIABLE, "/mine")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "stock_nnunet.predict"
    for name in ("stock_nnunet", "stock_nnunet.predict"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("command", "entry_point", "other"),
    [
        ("nnUNetv2_predict", "predict_entry_point", "predict_entry_point_modelfolder"),
        ("nnUNetv2_predict_from_modelfolder", "predict_entry_point_modelfolder", "predict_entry_point"),
    ],
)
def test_only_the_function_of_the_command_is_replaced(stock_module, monkeypatch, command, entry_point, other):
    import types

    calls = []
    ours = types.ModuleType("nnunetv2_mgml.commands.predict")
    ours.main = calls.append
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    monkeypatch.setattr(sys, "argv", [f"/env/bin/{command}", "--missing_modalities", "t1"])
    finders = len(sys.meta_path)
    registration.activate()
    registration.activate()  # a virtual environment reads its .pth files twice
    assert len(sys.meta_path) == finders + 1
    module = importlib.import_module(stock_module)
    assert len(sys.meta_path) == finders
    assert getattr(module, other)().startswith("stock")
    assert getattr(module, entry_point)() is None
    assert calls == [entry_point]
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_without_our_flag_nothing_is_touched(stock_module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/env/bin/nnUNetv2_predict", "-i", "in"])
    finders = list(sys.meta_path)
    registration.activate()
    assert sys.meta_path == finders
    assert importlib.import_module(stock_module).predict_entry_point() == "stock"


def test_a_missing_module_is_reported_as_ever(stock_module, monkeypatch):
    monkeypatch.setattr(registration, "PREDICT_MODULE", "stock_nnunet.gone")
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_predict", "-h"])
    registration.activate()
    with pytest.raises(ModuleNotFoundError, match=r"stock_nnunet\.gone"):
        importlib.import_module("stock_nnunet.gone")


PREDICT = """
import sys
from nnunetv2_mgml.upstream.registration import activate
activate()
from nnunetv2.inference.predict_from_raw_data import predict_entry_point, predict_entry_point_modelfolder
print(predict_entry_point.__module__, predict_entry_point_modelfolder.__module__)
"""


@pytest.mark.parametrize(
    ("argument", "first"),
    [
        ("--missing_modalities", "nnunetv2_mgml.upstream.registration"),
        ("--disable_tta", "nnunetv2.inference.predict_from_raw_data"),
    ],
)
def test_nnunets_own_module(tmp_path, argument, first):
    printed = run_python(PREDICT, argument, script=tmp_path / "nnUNetv2_predict")
    assert printed.split() == [first, "nnunetv2.inference.predict_from_raw_data"]


TRAINERS = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
from nnunetv2_mgml.training import TRAINERS
for name, trainer in TRAINERS.items():
    assert find(name) is find(name) is pickle.loads(pickle.dumps(trainer)) is trainer, name
print("found", len(TRAINERS))
"""


def test_nnunet_finds_the_same_trainers_twice_and_they_pickle():
    """The documented fallback: the variable exported by hand, no start-up line."""
    import nnunetv2_mgml.training as training

    printed = run_python(TRAINERS, **{VARIABLE: registration.EXT_DIR})
    assert printed.splitlines()[-1] == f"found {len(training.TRAINERS)}"
