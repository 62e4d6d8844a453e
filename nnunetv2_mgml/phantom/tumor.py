"""Tumours of a phantom: irregular, with edema, a necrotic or non-enhancing core and, in most, an enhancing rim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnunetv2_mgml.phantom.anatomy import BRAIN_RADII, Anatomy, Mask, Reals, coordinates, ellipsoid, smooth_noise

NECROSIS, EDEMA, ENHANCING = 1, 2, 4
"""Label values of BraTS 2021."""

_CHANCE_OF_SECOND = 0.15
_CHANCE_OF_NO_ENHANCEMENT = 0.25


@dataclass(frozen=True)
class TumorPlan:
    """Where a tumour grows and how; lengths in brain coordinates (1 is half the edge of the volume).

    Attributes:
        center: z, y, x.
        radius: of the whole tumour.
        core: radius of the core as a share of ``radius``.
        rim: thickness of the enhancing rim as a share of the core's radius; 0: no enhancement.
        push: how much the mass displaces its surroundings, 0 to 1.
    """

    center: Reals
    radius: float
    core: float
    rim: float
    push: float


def plan_tumors(rng: np.random.Generator) -> list[TumorPlan]:
    """Draw one tumour, now and then two; the second is smaller and elsewhere."""
    first = _plan(rng, np.array([rng.uniform(-0.25, 0.4), rng.uniform(-0.5, 0.5), _side(rng)]), rng.uniform(0.2, 0.42))
    if rng.random() >= _CHANCE_OF_SECOND:
        return [first]
    center = first.center * np.array([1, -0.8, rng.choice([-1, 1])]) + rng.uniform(-0.1, 0.1, 3)
    return [first, _plan(rng, center, rng.uniform(0.12, 0.2))]


def _side(rng: np.random.Generator) -> float:
    return float(rng.choice([-1, 1]) * rng.uniform(0.15, 0.48))


def _plan(rng: np.random.Generator, center: Reals, radius: float) -> TumorPlan:
    # Towards the middle where it would reach through the surface.
    eccentricity = float(np.linalg.norm(center / BRAIN_RADII))
    center = center * min(1, 0.7 / eccentricity)
    enhancing = rng.random() >= _CHANCE_OF_NO_ENHANCEMENT
    return TumorPlan(
        center,
        radius,
        core=rng.uniform(0.42, 0.85),
        rim=rng.uniform(0.15, 0.6) if enhancing else 0.0,
        push=rng.uniform(0.3, 1.0),
    )


def grow_tumors(rng: np.random.Generator, plans: list[TumorPlan], anatomy: Anatomy) -> npt.NDArray[np.uint8]:
    """Grow tumours in a brain.

    Args:
        rng: source of randomness.
        plans: see `plan_tumors`.
        anatomy: the brain.

    Returns:
        uint8 (z, y, x): 0, `NECROSIS`, `EDEMA` or `ENHANCING`; nothing outside the brain or in its outermost layer.
    """
    shape = anatomy.brain.shape
    points = coordinates(shape)
    labels = np.zeros(shape, np.uint8)
    # Edema spreads through white matter and hardly enters cortex and fluid.
    barrier = ndimage.gaussian_filter(anatomy.tissue[1] * 0.35 + anatomy.tissue[2] * 0.6, 0.7)
    for plan in plans:
        stretch = plan.radius * rng.uniform(0.8, 1.25, 3)
        outline = smooth_noise(rng, shape, 0.05)
        distance = ellipsoid(points, plan.center, stretch) * (1 + 0.2 * outline) + barrier
        core_center = plan.center + rng.uniform(-0.25, 0.25, 3) * plan.radius * (1 - plan.core)
        inner = ellipsoid(points, core_center, stretch * plan.core) * (1 + 0.16 * smooth_noise(rng, shape, 0.035))
        thickness = plan.rim * (1 + 0.5 * smooth_noise(rng, shape, 0.04))
        inside = anatomy.brain & (anatomy.radius < 0.97)
        core = inside & (inner < 1)
        labels[_joined(inside & (distance < 1) | core, core) & (labels == 0)] = EDEMA
        labels[core] = NECROSIS
        if plan.rim:
            labels[core & (inner > 1 - thickness)] = ENHANCING
    return labels


def _joined(mask: Mask, core: Mask) -> Mask:
    """Return the parts of ``mask`` that touch ``core``."""
    parts, _ = ndimage.label(mask)
    return np.isin(parts, np.unique(parts[core]))
