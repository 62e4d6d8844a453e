"""The two places in space that a NIfTI header can give a volume, sform and qform, and files in which they disagree.

SimpleITK goes by one, nibabel by the other. Which is right cannot be told, so that a volume with two places is on the
grid of another only where both places are (imports no torch).
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.io.grid import GRID_TOLERANCE

_ENDINGS = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Forms:
    """What a header says of a volume's place: 4x4 matrices from voxel (x, y, z) to mm, None where it does not."""

    sform: NDArray[np.float64] | None
    qform: NDArray[np.float64] | None
    shape: tuple[int, ...]
    """Voxels, axis order x, y, z."""
    spacing: float
    """The smallest, in mm."""

    @property
    def disagreement(self) -> float:
        """Largest distance in mm between the corners by sform and by qform; 0 where they are the same grid."""
        if self.sform is None or self.qform is None:
            return 0.0
        return self._apart(self.sform, self.qform)

    def _apart(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
        corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0, n - 1) for n in self.shape))])
        distance = float(np.linalg.norm((corners @ (one - other).T)[:, :3], axis=1).max())
        return distance if distance > GRID_TOLERANCE * self.spacing else 0.0

    def same(self, other: Forms) -> bool:
        """Whether two volumes have the same place by sform, and by qform."""
        pairs = ((self.sform, other.sform), (self.qform, other.qform))
        return all(a is b if a is None or b is None else not self._apart(a, b) for a, b in pairs)


def read_forms(path: str | os.PathLike[str]) -> Forms | None:
    """Return what the header of a NIfTI volume says; None for other files, and for those without three axes or more."""
    if not Path(path).name.lower().endswith(_ENDINGS):
        return None
    import nibabel  # only these files need it

    try:
        header: Any = nibabel.load(path).header
        sform, qform = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    except Exception:  # a damaged file, which is for its reader to say
        return None
    shape = tuple(int(n) for n in header.get_data_shape()[:3])
    return Forms(sform, qform, shape, float(np.min(header.get_zooms()[:3]))) if len(shape) == 3 else None


def two_places(path: str | os.PathLike[str], reference: str | os.PathLike[str]) -> str:
    """Say why two NIfTI volumes cannot be known to lie on one grid, or return an empty string.

    That is so where sform and qform of one of them disagree and the other one does not have the same two.

    Args:
        path: a volume that can be read.
        reference: another one.
    """
    forms = [(os.fspath(file), read_forms(file)) for file in (path, reference)]
    (_, mine), (_, others) = forms
    if mine is None or others is None or mine.shape != others.shape or mine.same(others):
        return ""
    for (name, found), (other, _) in (forms, forms[::-1]):
        if found is not None and found.disagreement:
            return (
                f"{name} has two places in space: its sform and qform disagree (up to {found.disagreement:.3g} mm) and "
                f"those of {other} are others, so that nobody can tell which is right. Set both to the right one, in "
                f"nibabel: image.set_qform(image.get_sform())"
            )
    return ""


def told_apart(*paths: str | os.PathLike[str]) -> str:
    """Return what to add to the news that volumes lie on different grids: whose sform and qform disagree, if any."""
    forms = {os.fspath(path): read_forms(path) for path in paths}
    return "".join(
        f"; sform and qform of {name} disagree (up to {found.disagreement:.3g} mm), set both to the right one"
        for name, found in forms.items()
        if found is not None and found.disagreement
    )
