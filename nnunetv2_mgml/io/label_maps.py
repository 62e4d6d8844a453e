"""Reading label maps with their geometry, and only whole files.

SimpleITK reads them all but knows no spacing of a TIFF volume: that is in the file nnU-Net writes beside it,
``CASE.json`` with ``spacing`` in array axis order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.io.complete import check_complete
from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.io.grid import grid_difference


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

    @property
    def properties(self) -> dict[str, Any]:
        """Where it lies, as nnU-Net's SimpleITK reader puts it."""
        return {
            "spacing": self.spacing,
            "sitk_stuff": {
                "spacing": tuple(reversed(self.spacing)),
                "origin": self.origin,
                "direction": self.direction,
            },
        }


def read_image(path: Path) -> sitk.Image:
    """Read an image that is whole, with the spacing (mm) nnU-Net's readers give it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read or ends early, or a TIFF volume has a spacing file that makes no sense.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        check_complete(str(path))
        image = sitk.ReadImage(str(path))
    except Exception as error:  # nibabel, gzip and SimpleITK each raise what they like on a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(f"{path} cannot be read ({reason}). Is the file damaged or cut off?") from error
    if path.suffix.lower() in (".tif", ".tiff") and image.GetDimension() == 3:
        image.SetSpacing(tuple(reversed(_tiff_spacing(path))))
    return image


def _tiff_spacing(path: Path) -> list[float]:
    """Return the spacing in mm, (z, y, x); 1 mm where nnU-Net would assume it, too."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return [1.0, 1.0, 1.0]
    content = read_json(file)
    spacing = content.get("spacing") if isinstance(content, dict) else None
    if (
        not isinstance(spacing, list)
        or len(spacing) != 3
        or not all(isinstance(s, (int, float)) and s > 0 for s in spacing)
    ):
        raise ValueError(f'{file} must hold {{"spacing": [z, y, x]}} in mm, three numbers above 0; found {spacing!r}.')
    return [float(s) for s in spacing]


def read_label_image(path: Path, case: str) -> LabelImage:
    """Read a segmentation.

    Args:
        path: a file SimpleITK can read.
        case: named in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read or ends early, has several channels, or holds values that are not whole
            numbers.
    """
    try:
        image = read_image(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"Case {case}: {error}") from error
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
    """Raise a ValueError naming the case when two label maps do not lie on the same grid, by the rule of prediction."""
    difference = grid_difference(reference.labels.shape, reference.properties, other.labels.shape, other.properties)
    if difference:
        raise ValueError(
            f"Case {case}: {other.path} does not lie on the grid of {reference.path}: {difference}. Bring "
            f"both to one grid first."
        )
