"""Reading label maps with their geometry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

_SPACING_TOLERANCE_MM = 1e-3
_ORIGIN_TOLERANCE_MM = 1e-2
_DIRECTION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class LabelImage:
    """A label map and where it lies."""

    labels: np.ndarray
    """Integer array in SimpleITK's array order (z, y, x), or (y, x) for an image."""
    spacing: tuple[float, ...]
    """mm, in array axis order."""
    origin: tuple[float, ...]
    """mm, in (x, y, z) order."""
    direction: tuple[float, ...]
    path: Path


def read_label_image(path: Path, case: str) -> LabelImage:
    """Read a segmentation.

    Args:
        path: a file SimpleITK can read.
        case: named in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, has several channels, or holds values that are not whole numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Case {case}: {path} does not exist.")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"Case {case}: {path} cannot be read ({reason}).") from error
    channels = image.GetNumberOfComponentsPerPixel()
    if channels != 1:
        raise ValueError(f"Case {case}: {path} has {channels} channels; a label map has 1.")
    array = sitk.GetArrayFromImage(image)
    if not np.issubdtype(array.dtype, np.integer):
        whole = np.rint(array)
        if not np.array_equal(whole, array):
            raise ValueError(f"Case {case}: {path} holds values that are not whole numbers (a probability map?).")
        array = whole.astype(np.int32)
    return LabelImage(array, tuple(reversed(image.GetSpacing())), image.GetOrigin(), image.GetDirection(), path)


def check_same_geometry(reference: LabelImage, other: LabelImage, case: str) -> None:
    """Raise a ValueError naming the case when two label maps do not lie on the same grid."""
    problems = []
    if reference.labels.shape != other.labels.shape:
        problems.append(f"shape {other.labels.shape} instead of {reference.labels.shape}")
    else:
        for what, tolerance in (("spacing", _SPACING_TOLERANCE_MM), ("origin", _ORIGIN_TOLERANCE_MM),
                                ("direction", _DIRECTION_TOLERANCE)):
            ours, theirs = getattr(reference, what), getattr(other, what)
            if not np.allclose(ours, theirs, rtol=0, atol=tolerance):
                problems.append(f"{what} {_rounded(theirs)} instead of {_rounded(ours)}")
    if problems:
        raise ValueError(f"Case {case}: {other.path} does not lie on the grid of {reference.path}: "
                         f"{'; '.join(problems)}. Bring both to one grid first.")


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)
