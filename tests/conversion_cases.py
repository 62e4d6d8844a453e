"""Tiny BraTS folders for the tests of the conversion."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_mgml.phantom import write_phantoms

SHAPE = (16, 20, 18)


def write_cases(folder: Path, count: int = 3, layout: str = "brats2021", first: int = 0) -> list[str]:
    """Write phantoms of `SHAPE` (z, y, x) and return their names."""
    return [path.name for path in write_phantoms(folder, count, 5, SHAPE, (4.0, 5.0, 6.0), layout, first=first)]


def rewrite(path: Path, change: Callable[[sitk.Image], sitk.Image]) -> None:
    """Replace a volume by a changed one."""
    image = change(sitk.ReadImage(str(path)))
    sitk.WriteImage(image, str(path), True)


def with_array(image: sitk.Image, array: np.ndarray) -> sitk.Image:
    """Return ``array`` with the geometry of ``image``."""
    result = sitk.GetImageFromArray(array)
    result.CopyInformation(image)
    return result


def array_of(path: Path) -> np.ndarray:
    """Return the voxels of a volume, axes z, y, x."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def tree(folder: Path) -> list[str]:
    """Return all files and folders below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def needs_installation() -> None:
    """Skip where worker processes cannot import the package, that is in a checkout that is not installed."""
    command = [sys.executable, "-c", "import nnunetv2_mgml.dataset_conversion"]
    if subprocess.run(command, cwd="/", capture_output=True, check=False).returncode:
        pytest.skip("nnunetv2_mgml is not installed")
