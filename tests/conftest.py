"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real patients (see CONTRIBUTING); the test is skipped where MGML_REAL_DATA is not set."""
    folder = os.environ.get("MGML_REAL_DATA")
    if not folder:
        pytest.skip("MGML_REAL_DATA is not set")
    path = Path(folder)
    assert path.is_dir(), f"MGML_REAL_DATA={folder} is not a folder"
    return path
