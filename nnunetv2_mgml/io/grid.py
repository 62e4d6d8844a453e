"""Whether two volumes lie on one grid: one rule for conversion, prediction and scoring (imports no torch)."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

GRID_TOLERANCE = 0.1
"""Largest distance between the corners of two volumes, in voxels, at which they still count as one grid."""

Geometry = dict[str, Any]
"""Where a volume lies, as nnU-Net's readers return it: ``spacing`` (mm, ordered as the array axes) and, of formats with
an orientation, ``sitk_stuff`` or ``nibabel_stuff``."""


def sitk_geometry(image: sitk.Image) -> Geometry:
    """Return where an image lies, as nnU-Net's SimpleITK reader puts it."""
    return {
        "spacing": list(reversed(image.GetSpacing())),
        "sitk_stuff": {
            "spacing": image.GetSpacing(),
            "origin": image.GetOrigin(),
            "direction": image.GetDirection(),
        },
    }


def image_difference(image: sitk.Image, reference: sitk.Image) -> str:
    """Say how the grid of an image differs from that of another, or return an empty string."""
    shapes = tuple(tuple(reversed(i.GetSize())) for i in (reference, image))
    return grid_difference(shapes[0], sitk_geometry(reference), shapes[1], sitk_geometry(image))


def grid_difference(
    shape_a: tuple[int, ...], properties_a: Geometry, shape_b: tuple[int, ...], properties_b: Geometry
) -> str:
    """Say how two grids differ, or return an empty string.

    Args:
        shape_a: ``(z, y, x)``, or ``(y, x)``, in voxels.
        properties_a: as nnU-Net's readers return them.
        shape_b: of the other one.
        properties_b: likewise.
    """
    if shape_a != shape_b:
        return f"shape {tuple(shape_b)} instead of {tuple(shape_a)} voxels"
    a, b = _affine(properties_a), _affine(properties_b)
    if a is None or b is None:  # formats without orientation: the spacing is all there is
        old, new = properties_a["spacing"], properties_b["spacing"]
        return "" if np.allclose(old, new, rtol=1e-3) else f"spacing {_text(new)} instead of {_text(old)} mm"
    size = [n - 1 for n in reversed(shape_a)][: len(a) - 1]
    corners = np.array([(*corner, 1.0) for corner in itertools.product(*((0, n) for n in size))])
    distance = float(np.linalg.norm((corners @ (a - b).T)[:, :-1], axis=1).max())
    spacing_a, spacing_b = (np.linalg.norm(m[:-1, :-1], axis=0) for m in (a, b))
    if distance <= GRID_TOLERANCE * float(spacing_a.min()):
        return ""
    parts = [
        f"{what} {_text(y)} instead of {_text(x)}{unit}"
        for what, x, y, unit in (
            ("spacing", spacing_a, spacing_b, " mm"),
            ("origin", a[:-1, -1], b[:-1, -1], " mm"),
            ("direction", (a[:-1, :-1] / spacing_a).ravel(), (b[:-1, :-1] / spacing_b).ravel(), ""),
        )
        if not np.allclose(x, y, rtol=1e-4, atol=1e-4)
    ]
    return f"{'; '.join(parts)} (up to {distance:.3g} mm apart)"


def _affine(properties: Geometry) -> NDArray[Any] | None:
    """Return the matrix from voxel (x, y, z) to mm, or None where the reader knows none."""
    if "sitk_stuff" in properties:
        geometry = properties["sitk_stuff"]
        size = len(geometry["spacing"])
        affine = np.eye(size + 1)
        affine[:-1, :-1] = np.reshape(geometry["direction"], (size, size)) * np.asarray(geometry["spacing"])
        affine[:-1, -1] = geometry["origin"]
        return affine
    if "nibabel_stuff" in properties:
        geometry = properties["nibabel_stuff"]
        return np.asarray(geometry.get("reoriented_affine", geometry["original_affine"]), dtype=float)
    return None


def _text(values: Any) -> str:
    return "(" + ", ".join(f"{float(v):.6g}" for v in values) + ")"
