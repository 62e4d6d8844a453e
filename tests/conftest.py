"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # as many processes as threads would help
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("nnUNet_def_n_proc", "1")  # read when nnunetv2 is imported
os.environ.setdefault("nnUNet_n_proc_DA", "0")  # data augmentation in the test's own process
os.environ.setdefault("MPLBACKEND", "agg")

import pytest


def _find_dataset_conversion() -> None:
    """Let the tests run in a checkout that is not installed: setup.py maps the folder to the same name."""
    name = "nnunetv2_mgml.dataset_conversion"
    if importlib.util.find_spec(name) is None:
        init = Path(__file__).parents[1] / "dataset_conversion" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, init)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


_find_dataset_conversion()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests: one that begins last keeps a single process at work for minutes."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable: the order within a file, and of the others, stays


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what is no UTF-8 in what a test printed: worker processes could not send it, and everything would end."""
    report = yield
    report.sections = [(name, _sendable(text)) for name, text in report.sections]
    if report.longrepr is not None and (text := str(report.longrepr)) != _sendable(text):
        report.longrepr = _sendable(text)
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real patients (see CONTRIBUTING); the test is skipped where MGML_REAL_DATA is not set."""
    folder = os.environ.get("MGML_REAL_DATA")
    if not folder:
        pytest.skip("MGML_REAL_DATA is not set")
    path = Path(folder)
    assert path.is_dir(), f"MGML_REAL_DATA={folder} is not a folder"
    return path


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty nnUNet_raw, nnUNet_preprocessed and nnUNet_results below the returned folder, set for this test."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path
