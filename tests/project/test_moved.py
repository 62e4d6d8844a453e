"""Old paths: every public name of 0.1.0 is still there, has moved with a warning, or is said to be gone."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from nnunetv2_mgml import _moved

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "nnunetv2_mgml"
OLD: dict[str, list[str]] = json.loads((HERE / "names_of_0_1_0.json").read_text())
"""Module of 0.1.0, relative to the package -> its public names, written down from its sources."""


def exists(module: str) -> bool:
    """Return whether the module is a file of this version, and no old path."""
    path = Path(*module.split("."))
    folders = (PACKAGE, PACKAGE.parent)  # dataset_conversion/ lies beside the package
    return any((f / path).with_suffix(".py").is_file() or (f / path / "__init__.py").is_file() for f in folders)


def fresh(module: str) -> object:
    """Import an old module anew, so that its warnings are given again."""
    sys.modules.pop(f"nnunetv2_mgml.{module}", None)
    return importlib.import_module(f"nnunetv2_mgml.{module}")


@pytest.mark.parametrize("module", sorted(OLD))
def test_old_names_are_found_with_one_warning_or_said_to_be_gone(module: str) -> None:
    present = exists(module)
    assert not (present and module in _moved.MOVED), "a module that exists never asks the finder"
    found = importlib.import_module(f"nnunetv2_mgml.{module}") if present else fresh(module)
    for name in OLD[module]:
        if f"{module}.{name}" in _moved.GONE or module in _moved.GONE:
            with pytest.raises(ImportError, match=r"gone since 0\.2: \w.+"):
                getattr(found, name)
            continue
        if present and name in vars(found):
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = getattr(found, name)
        ours = [w for w in caught if w.category is DeprecationWarning and "old path" in str(w.message)]
        assert len(ours) == 1, f"{module}.{name}"
        old, place = str(ours[0].message).split(";")[0].split(" is now ")
        assert old == f"nnunetv2_mgml.{module}.{name}"
        assert ours[0].filename == __file__
        new_module, _, new_name = place.rpartition(".")
        assert value is getattr(importlib.import_module(new_module), new_name)
        assert getattr(found, name) is value


def test_the_tables_name_what_0_1_0_had() -> None:
    names = {f"{module}.{name}" for module, names in OLD.items() for name in names}
    assert set(_moved.MOVED) <= set(OLD)
    assert set(_moved.RENAMED) <= names
    assert set(_moved.GONE) <= names | set(OLD)
    assert not set(_moved.GONE) & (set(_moved.RENAMED) | set(_moved.MOVED))


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "statement",
    [
        "from nnunetv2_mgml.files import write_json",
        "import nnunetv2_mgml.files; nnunetv2_mgml.files.write_json; nnunetv2_mgml.files.write_json",
        "from nnunetv2_mgml.evaluation.regions import resolve_region",
        "from nnunetv2_mgml.evaluation.metrics import get_metric",  # a package: Python asks it twice
        "from nnunetv2_mgml import registration; registration.activate",
    ],
)
def test_the_user_sees_one_warning_at_his_line(statement: str) -> None:
    done = run(statement)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DeprecationWarning: nnunetv2_mgml.") == 1
    assert done.stderr.startswith("<string>:1: ")
    assert f"until {_moved.UNTIL}" in done.stderr


def test_unknown_names_and_modules_fail_as_everywhere() -> None:
    assert "No module named 'nnunetv2_mgml.nothing'" in run("import nnunetv2_mgml.nothing").stderr
    done = run("from nnunetv2_mgml.files import nothing")
    assert "ImportError: cannot import name 'nothing' from 'nnunetv2_mgml.files'" in done.stderr


def test_a_module_that_stayed_can_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunetv2_mgml.io import files, volumes

    monkeypatch.setitem(_moved.RENAMED, "io.files.read_labels", "io.volumes.nearly")
    monkeypatch.setitem(_moved.GONE, "io.files.magic", "Use your hands.")
    monkeypatch.setattr(volumes, "nearly", len, raising=False)
    monkeypatch.setattr(files, "__getattr__", _moved.forward(files.__name__), raising=False)
    with pytest.warns(DeprecationWarning, match=r"io\.files\.read_labels is now nnunetv2_mgml\.io\.volumes\.nearly"):
        from nnunetv2_mgml.io.files import read_labels
    assert read_labels is len
    del files.read_labels
    with pytest.raises(ImportError, match=r"io\.files\.magic is gone since 0\.2: Use your hands\."):
        from nnunetv2_mgml.io.files import magic  # noqa: F401


def test_nothing_in_this_repository_uses_an_old_path() -> None:
    used = set()
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "dataset_conversion").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnunetv2_mgml."):
                used.add(node.module.removeprefix("nnunetv2_mgml."))
    assert not used & set(_moved.MOVED)
