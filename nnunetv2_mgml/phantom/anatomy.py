"""Healthy anatomy of a phantom: brain outline, grey and white matter, fluid, and things that are no tumour.

Array axes are z, y, x (foot to head, front to back, right to left), as SimpleITK gives them. Positions are *brain
coordinates*: 0 is the middle of the volume and 1 its edge along each axis, so that shapes scale with the volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnunetv2_mgml.phantom.difficulty import Difficulty

BRAIN_RADII = np.array([0.78, 0.88, 0.74])
"""Radii of the mean brain along z, y, x, in brain coordinates."""

TISSUES = ("white", "grey", "fluid")

Reals = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Anatomy:
    """Maps of one brain, axes z, y, x.

    Attributes:
        brain: bool.
        radius: float32, 0 in the middle of the brain and 1 at its surface.
        tissue: float32 (3, z, y, x), shares of `TISSUES`, which sum up to one.
        lesions: float32 0 to 1, white-matter lesions.
        cavities: float32 0 to 1, fluid-filled cavities outside the ventricles.
        vessels: float32 0 to 1, thin vessels.
    """

    brain: Mask
    radius: Reals
    tissue: Reals
    lesions: Reals
    cavities: Reals
    vessels: Reals


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Reals:
    """Return smooth random values of mean 0 and standard deviation 1.

    Args:
        rng: source of randomness.
        shape: of the result.
        scale: standard deviation of the smoothing kernel, as a share of the mean edge length.

    Returns:
        float32, ``shape``.
    """
    kernel = scale * np.mean(shape)
    values: Reals = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), kernel, truncate=3)
    normalised: Reals = (values - values.mean()) / max(float(values.std()), 1e-6)
    return normalised


def coordinates(shape: tuple[int, ...]) -> Reals:
    """Return brain coordinates of all voxels: float32 (3, z, y, x), -1 to 1 along each axis."""
    axes = [(np.arange(n, dtype=np.float32) + 0.5) * (2 / n) - 1 for n in shape]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def rotated(points: Reals, rng: np.random.Generator, largest: float) -> Reals:
    """Return coordinates turned about all three axes by random angles.

    Args:
        points: (3, z, y, x).
        rng: source of randomness.
        largest: largest angle in degrees.

    Returns:
        float32, shape of ``points``.
    """
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(rng.uniform(-largest, largest, 3))):
        i, j = (a for a in range(3) if a != axis)
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    turned: Reals = np.einsum("ij,j...->i...", matrix, points).astype(np.float32)
    return turned


def ellipsoid(points: Reals, center: tuple[float, ...] | Reals, radii: tuple[float, ...] | Reals | float) -> Reals:
    """Return the distance from ``center`` in units of ``radii``: below 1 inside the ellipsoid; shape (z, y, x)."""
    column = (3, 1, 1, 1)
    center, radii = np.asarray(center, np.float32), np.broadcast_to(np.asarray(radii, np.float32), 3)
    squares = ((points - center.reshape(column)) / radii.reshape(column)) ** 2
    distance: Reals = np.sqrt(squares.sum(0))
    return distance


def build_anatomy(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    difficulty: Difficulty,
    pushes: list[tuple[Reals, float, float]],
) -> Anatomy:
    """Draw the healthy anatomy of one case.

    Args:
        rng: source of randomness.
        shape: number of voxels along z, y, x.
        difficulty: see `Difficulty`.
        pushes: masses that displace the tissue: centre and radius in brain coordinates, strength 0 to 1.

    Returns:
        The maps.
    """
    spread = difficulty.anatomy
    points = rotated(coordinates(shape), rng, 6 * spread)
    size: Reals = BRAIN_RADII * (1 + 0.05 * spread * rng.uniform(-1, 1, 3))
    radius = ellipsoid(points, rng.uniform(-0.03, 0.03, 3) * spread, size)
    radius += 0.025 * spread * smooth_noise(rng, shape, 0.08)
    # The under-side of a brain is flatter than its top.
    radius += 0.25 * np.clip(-points[0] / size[0] - 0.55, 0, None) * (np.abs(points[1]) < 2)
    brain = _largest_part(radius < 1)
    inner = _displaced(points, pushes) / (size / BRAIN_RADII).reshape(3, 1, 1, 1).astype(np.float32)
    labels = _tissue_labels(rng, shape, radius, inner, spread)
    tissue = np.stack([ndimage.gaussian_filter((labels == i).astype(np.float32), 0.5) for i in range(3)])
    tissue /= np.maximum(tissue.sum(0), 1e-6)
    white = (labels == 0) & (radius < 0.85)
    return Anatomy(
        brain,
        radius.astype(np.float32),
        tissue,
        lesions=_blobs(rng, points, white, rng.poisson(6 * difficulty.distractors), (0.03, 0.085)),
        cavities=_blobs(rng, points, white, rng.poisson(0.5 * difficulty.distractors), (0.07, 0.15)),
        vessels=_vessels(rng, shape, brain, radius, rng.poisson(9 * difficulty.distractors)),
    )


def _largest_part(mask: Mask) -> Mask:
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    largest: Mask = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return largest


def _displaced(points: Reals, pushes: list[tuple[Reals, float, float]]) -> Reals:
    """Return where the tissue now at each voxel would lie without the masses; shape of ``points``."""
    result = points.copy()
    for center, radius, strength in pushes:
        offset = points - center.reshape(3, 1, 1, 1).astype(np.float32)
        distance = np.sqrt((offset**2).sum(0)) / radius
        result -= 0.6 * strength * np.exp(-(distance**2)) * offset
    return result


def _tissue_labels(
    rng: np.random.Generator, shape: tuple[int, int, int], radius: Reals, points: Reals, spread: float
) -> npt.NDArray[np.int8]:
    """Return index into `TISSUES`, int8 (z, y, x)."""
    depth = 1 - radius
    # Folds are the zero crossings of a band of noise; they open towards the surface.
    fold = np.abs(smooth_noise(rng, shape, 0.032) + 0.25 * spread * smooth_noise(rng, shape, 0.02))
    atrophy = 1 + 0.5 * spread * rng.uniform(-1, 1)
    sulcus = 0.22 * atrophy * np.clip(1 - depth / 0.3, 0, None)
    ribbon = sulcus + 0.55 * np.clip(1.3 - depth / 0.32, 0, 1)
    midline = np.abs(points[2] + 0.01 * smooth_noise(rng, shape, 0.1))
    upper = points[0] > -0.15
    labels = np.zeros(shape, np.int8)
    labels[(depth < 0.11) | ((fold < ribbon) & (depth < 0.42))] = 1
    labels[(midline < 0.05) & upper & ((points[0] > 0.25) | (np.abs(points[1]) > 0.55))] = 1
    for side in (-1, 1):
        labels[ellipsoid(points, (-0.06, 0.1, side * 0.13), (0.14, 0.16, 0.10)) < 1] = 1
        labels[ellipsoid(points, (-0.02, -0.14, side * 0.24), (0.17, 0.20, 0.07)) < 1] = 1
    labels[(fold < sulcus) | (depth < 0.025)] = 2
    labels[(midline < 0.018 * atrophy) & upper & ((points[0] > 0.28) | (np.abs(points[1]) > 0.6))] = 2
    labels[ellipsoid(points, (-0.02, 0.05, 0), (0.14, 0.20, 0.022 * atrophy)) < 1] = 2
    for side in (-1, 1):
        width = 0.062 * atrophy * (1 + 0.15 * spread * rng.uniform(-1, 1))
        # Front and back horns of the lateral ventricle lean outwards, away from each other.
        lean = np.abs(points[1] - 0.02) * 0.28
        bent = np.stack([points[0], points[1], points[2] - side * (0.06 + lean)])
        labels[ellipsoid(bent, (0.1, 0.03, 0), (0.10 + 0.4 * width, 0.42, width)) < 1] = 2
    return labels


def _blobs(rng: np.random.Generator, points: Reals, where: Mask, count: int, radii: tuple[float, float]) -> Reals:
    """Return soft irregular spots with centres in ``where``; float32 0 to 1, (z, y, x)."""
    result = np.zeros(where.shape, np.float32)
    candidates = np.flatnonzero(where)
    if not count or not candidates.size:
        return result
    wobble = 0.25 * smooth_noise(rng, where.shape, 0.03)
    for index in rng.choice(candidates, count):
        center = points.reshape(3, -1)[:, index]
        distance = ellipsoid(points, center, rng.uniform(*radii) * rng.uniform(0.7, 1.3, 3)) * (1 + wobble)
        np.maximum(result, np.clip(1.5 - distance, 0, 1), out=result)
    return result


def _vessels(rng: np.random.Generator, shape: tuple[int, int, int], brain: Mask, radius: Reals, count: int) -> Reals:
    """Return thin winding tubes, most of them near the surface; float32 0 to 1, (z, y, x)."""
    centerlines = np.zeros(shape, np.float32)
    candidates = np.argwhere(brain & (radius > 0.55) & (radius < 0.97))
    scale = np.mean(shape) / 64
    for _ in range(count if len(candidates) else 0):
        position = candidates[rng.integers(len(candidates))].astype(float)
        direction = rng.standard_normal(3)
        strength = rng.uniform(0.5, 1)
        for _ in range(int(rng.integers(20, 60) * scale)):
            direction += 0.35 * rng.standard_normal(3)
            direction /= np.linalg.norm(direction)
            position = position + 0.7 * direction
            voxel = tuple(np.round(position).astype(int))
            if any(not 0 <= v < n for v, n in zip(voxel, shape, strict=True)) or not brain[voxel]:
                break
            centerlines[voxel] = strength
    width = 0.55 * scale
    blurred = ndimage.gaussian_filter(centerlines, width)
    tubes: Reals = np.clip(blurred / (0.35 / (1 + width**2)), 0, 1) * brain
    return tubes
