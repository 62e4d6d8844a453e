"""Volumes in display orientation, the most telling slice, and the crop around the head.

Arrays are ordered ``(z, y, x)`` as SimpleITK gives them. Volumes are turned to LPS axes first (x towards the patient's
left, y towards the back, z towards the head), so an axial slice drawn with its first row on top is in radiological
convention: the nose points up and the patient's left is on the viewer's right.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunetv2_mgml.io.volumes import read_image

_WITHOUT_DIRECTION = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")


def read_axial(path: str | Path) -> tuple[npt.NDArray[Any], tuple[float, float, float]]:
    """Read an image and turn it to LPS axes (to the nearest axes for oblique scans; nothing is resampled).

    Args:
        path: any file SimpleITK reads; a 2D image becomes a volume of one slice.

    Returns:
        Volume ``(z, y, x)`` in the file's data type, and its spacing in mm in the same axis order.

    Raises:
        FileNotFoundError: no such file.
        VolumeError: it cannot be read, or is no volume of one real number per voxel (see `io.volumes.read_image`).
    """
    image = read_image(path)
    if image.GetDimension() == 2:
        return sitk.GetArrayFromImage(image)[None], (1.0, *reversed(image.GetSpacing()))
    image = sitk.DICOMOrient(image, "LPS")
    return sitk.GetArrayFromImage(image), tuple(reversed(image.GetSpacing()))


def knows_sides(path: str | Path) -> bool:
    """Return whether a file's format says where the patient's left is; pictures and TIFF do not."""
    return not os.fspath(path).lower().endswith(_WITHOUT_DIRECTION)


def telling_slice(labels: npt.NDArray[Any]) -> int:
    """Return the axial slice that shows most of the tumour.

    The areas of the labels are added as square roots (that is, as diameters): the largest part counts most, yet a
    slice that also shows a small part, such as enhancing rim, is preferred to one that does not.

    Args:
        labels: label map ``(z, y, x)``, integers, 0 is background. Without any label the middle slice is returned.
    """
    values = [value for value in np.unique(labels) if value > 0]
    if not values:
        return labels.shape[0] // 2
    score = sum(np.sqrt((labels == value).sum(axis=(1, 2))) for value in values)
    return int(np.argmax(score))


def content_box(*arrays: npt.NDArray[Any], margin: int = 2) -> tuple[slice, ...]:
    """Return the smallest box that holds everything non-zero in any of the arrays.

    Args:
        arrays: arrays of one shape, any rank, any data type.
        margin: voxels to add on every side where there is room.

    Returns:
        One slice per axis, half-open; the whole array where everything is zero.
    """
    box = []
    for axis in range(arrays[0].ndim):
        others = tuple(a for a in range(arrays[0].ndim) if a != axis)
        used = np.flatnonzero(np.any([(array != 0).any(axis=others) for array in arrays], axis=0))
        size = arrays[0].shape[axis]
        low, high = (used[0], used[-1] + 1) if used.size else (0, size)
        box.append(slice(max(int(low) - margin, 0), min(int(high) + margin, size)))
    return tuple(box)


def to_grey(image: npt.NDArray[Any], low_percent: float = 0.5, high_percent: float = 99.5) -> npt.NDArray[Any]:
    """Return an image scaled to 0..255 between two percentiles of its non-zero voxels.

    Args:
        image: any shape. Zeros are background, drawn black, when they make up a tenth of the image or more
            (skull-stripped scans), and a value like any other in between. Values that are not finite count as zero.
        low_percent: percentile drawn black.
        high_percent: percentile drawn white.

    Returns:
        Array of the same shape, uint8.
    """
    image = np.where(np.isfinite(image), image, 0).astype(np.float32)
    background = image == 0
    if background.all():
        return np.zeros(image.shape, np.uint8)
    has_background = background.mean() >= 0.1
    low, high = np.percentile(image[~background] if has_background else image, (low_percent, high_percent))
    grey: npt.NDArray[Any] = np.clip((image - low) * (255.0 / max(high - low, 1e-12)), 0, 255).astype(np.uint8)
    if has_background:
        grey[background] = 0
    return grey
