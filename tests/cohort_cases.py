"""Tiny cases of no disease in particular, some of them incomplete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

CHANNELS = ("ct", "t1", "flair")
SHAPE = (12, 14, 16)


def volume(seed: int, mean: float = 40.0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Noise around ``mean`` in a box, 0 outside it; float32, axes z, y, x (or y, x)."""
    array = np.zeros(shape, dtype=np.float32)
    inner = tuple(slice(2, size - 2) for size in shape)
    array[inner] = np.random.default_rng(seed).normal(mean, 5.0, size=array[inner].shape)
    return array


def label(value: int = 1, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A box of one value; uint8."""
    array = np.zeros(shape, dtype=np.uint8)
    array[tuple(slice(5, 9) for _ in shape)] = value
    return array


def save(array: np.ndarray, path: Path, spacing: Sequence[float] | None = None) -> Path:
    """Write an array as NIfTI, 1 mm unless told otherwise (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    if spacing is not None:
        image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))
    return path


def write_raw(
    folder: Path,
    absent: Mapping[str, Sequence[str]] | None = None,
    cases: Sequence[str] = ("a", "b", "c"),
    channels: Sequence[str] = CHANNELS,
    **description: Any,
) -> Path:
    """Write a raw data set of nnU-Net in which cases lack the files named by ``absent``."""
    for index, case in enumerate(cases):
        for c, name in enumerate(channels):
            if name not in (absent or {}).get(case, ()):
                save(volume(10 * index + c, 40.0 + 100 * c), folder / "imagesTr" / f"{case}_{c:04d}.nii.gz")
        save(label(), folder / "labelsTr" / f"{case}.nii.gz")
    content = {
        "channel_names": {str(c): name for c, name in enumerate(channels)},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        **description,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder
