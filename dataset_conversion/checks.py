"""Reads volumes and refuses those that would spoil a training: broken files, other grids, unknown labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.labels import to_nnunet
from nnunetv2_mgml.io.complete import TruncatedError, check_complete

GEOMETRY_TOLERANCE = 1e-3
"""Largest difference of spacing and origin (mm) and of direction cosines that still counts as the same grid."""


def read_volume(path: Path) -> sitk.Image:
    """Read a NIfTI file and make sure that all of it is there.

    Args:
        path: ``.nii`` or ``.nii.gz``.

    Returns:
        The volume, three axes.

    Raises:
        ValueError: unreadable, truncated or damaged file, or not three axes; one line that names the file.
    """
    try:
        check_complete(str(path))  # ITK fills up what a truncated or damaged file lacks without a word
        image = sitk.ReadImage(str(path))
    except TruncatedError as error:
        raise ValueError(f"{path.name} is {error}") from error
    except Exception as error:  # nibabel, gzip and SimpleITK each raise what they like on a damaged file
        reason = str(error).strip().splitlines()
        raise ValueError(f"{path.name} cannot be read ({reason[-1] if reason else type(error).__name__})") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path.name} must be one volume with three axes, it has size {image.GetSize()}")
    return image


def geometry_difference(image: sitk.Image, reference: sitk.Image) -> str | None:
    """Describe how the grid of a volume differs from a reference; None if it does not.

    Args:
        image: volume with three axes.
        reference: likewise; spacing and origin in mm, axes x, y, z.

    Returns:
        For example ``"spacing (1, 1, 2) instead of (1, 1, 1)"``; differences up to `GEOMETRY_TOLERANCE` are none.
    """
    if image.GetSize() != reference.GetSize():
        return f"size {image.GetSize()} instead of {reference.GetSize()}"
    for what in ("Spacing", "Origin", "Direction"):
        ours, theirs = getattr(image, f"Get{what}")(), getattr(reference, f"Get{what}")()
        if not np.allclose(ours, theirs, rtol=0, atol=GEOMETRY_TOLERANCE):
            return f"{what.lower()} {_numbers(ours)} instead of {_numbers(theirs)}"
    return None


def _numbers(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.6g}' for value in values)})"


def same_header(image: sitk.Image, reference: sitk.Image) -> bool:
    """Return whether nnU-Net will see one grid in two volumes (it compares spacings with a relative 1e-5)."""
    return all(
        np.allclose(getattr(image, f"Get{what}")(), getattr(reference, f"Get{what}")())
        for what in ("Spacing", "Origin", "Direction")
    )


def is_empty(image: sitk.Image) -> bool:
    """Return whether a volume is zero all over, which for us means an absent sequence (ITK reads NaN as zero)."""
    return not sitk.GetArrayViewFromImage(image).any()


def read_segmentation(path: Path, convention: str, reference: sitk.Image) -> tuple[sitk.Image, tuple[int, ...]]:
    """Read a BraTS segmentation as nnU-Net labels on the grid of an image.

    Args:
        path: label file, integers or integral floats.
        convention: meaning of its values, one of `labels.CONVENTIONS`.
        reference: an image of the case.

    Returns:
        uint8 volume with nnU-Net's values and exactly the geometry of ``reference``, and the nnU-Net labels it holds.

    Raises:
        ValueError: unreadable, another grid, or unexpected values.
    """
    image = read_volume(path)
    difference = geometry_difference(image, reference)
    if difference:
        raise ValueError(f"{path.name} has {difference}")
    try:
        labels = to_nnunet(sitk.GetArrayViewFromImage(image), convention)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}{_hint(image, convention)}") from error
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(reference)
    return result, tuple(np.flatnonzero(np.bincount(labels.ravel(), minlength=5)).tolist())


def _hint(image: sitk.Image, convention: str) -> str:
    values = np.unique(sitk.GetArrayViewFromImage(image))
    if convention == "brats2021" and 3 in values and set(values.tolist()) <= {0, 1, 2, 3}:
        return "; if 3 is the enhancing tumour, give --label_convention brats2023"
    return ""
