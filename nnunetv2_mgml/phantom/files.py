"""Writes phantoms as BraTS folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunetv2_mgml.io.files import replacing_folder
from nnunetv2_mgml.modalities import BRATS_FILE_SUFFIXES, BRATS_SEGMENTATION_SUFFIX
from nnunetv2_mgml.phantom.case import make_case
from nnunetv2_mgml.phantom.difficulty import Difficulty
from nnunetv2_mgml.phantom.tumor import ENHANCING

_CASE_NAMES = {"brats2021": "Phantom_{:05d}", "brats2023": "Phantom-{:05d}-000"}


def write_phantoms(
    folder: str | Path,
    num_cases: int,
    seed: int,
    shape: tuple[int, int, int] = (64, 72, 64),
    spacing: tuple[float, float, float] = (2.7, 2.7, 2.7),
    layout: str = "brats2021",
    difficulty: Difficulty | None = None,
    first: int = 0,
) -> list[Path]:
    """Write synthetic cases as a BraTS folder.

    A case depends on ``seed`` and its own number alone: more cases extend a set, and sets with other ``first`` or
    ``seed`` are independent of each other.

    Args:
        folder: where to write; one folder a case, created if need be.
        num_cases: how many.
        seed: seed of the set, 0 or above.
        shape: number of voxels along z, y, x (foot to head, front to back, right to left).
        spacing: voxel size in mm along z, y, x.
        layout: ``brats2021`` (``_t1ce``, labels 0, 1, 2, 4) or ``brats2023`` (``-t1c``, labels 0 to 3).
        difficulty: see `Difficulty`; None for the default.
        first: number of the first case.

    Returns:
        The case folders.

    Raises:
        ValueError: unknown layout, or a case folder that exists.
    """
    if layout not in _CASE_NAMES:
        raise ValueError(f"Unknown phantom layout '{layout}'. Allowed: {', '.join(_CASE_NAMES)}.")
    if num_cases < 1 or first < 0:
        raise ValueError(f"Phantoms need num_cases of at least 1 and first of at least 0, got {num_cases} and {first}.")
    folder = Path(folder)
    written = []
    for number in range(first, first + num_cases):
        images, labels = make_case(np.random.default_rng([seed, number]), shape, difficulty)
        if layout == "brats2023":
            labels = np.where(labels == ENHANCING, np.uint8(3), labels)
        name = _CASE_NAMES[layout].format(number)
        volumes: dict[str, npt.NDArray[np.integer[Any]]] = {
            f"{name}{BRATS_FILE_SUFFIXES[layout][modality]}": np.round(image).astype(np.int16)
            for modality, image in images.items()
        }
        volumes[f"{name}{BRATS_SEGMENTATION_SUFFIX[layout]}"] = labels
        written.append(_write_case(folder / name, volumes, spacing))
    return written


def _write_case(folder: Path, volumes: dict[str, npt.NDArray[np.integer[Any]]], spacing: Sequence[float]) -> Path:
    if folder.exists():
        raise ValueError(f"{folder} exists. Choose another folder for the phantoms, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as temporary:
        for name, array in volumes.items():
            image = sitk.GetImageFromArray(array)
            image.SetSpacing([float(s) for s in reversed(spacing)])
            # BraTS puts the first voxel at the back; ITK's y axis points there.
            image.SetOrigin((0.0, -(array.shape[1] - 1) * float(spacing[1]), 0.0))
            sitk.WriteImage(image, str(temporary / f"{name}.nii.gz"), True)
    return folder
