"""One synthetic case: anatomy and tumour turned into the signal of four MRI sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnunetv2_mgml.modalities import BRATS_CHANNELS
from nnunetv2_mgml.phantom.anatomy import Anatomy, Mask, Reals, build_anatomy, coordinates, smooth_noise
from nnunetv2_mgml.phantom.difficulty import Difficulty
from nnunetv2_mgml.phantom.tumor import EDEMA, ENHANCING, NECROSIS, grow_tumors, plan_tumors

# Signal relative to white matter in T1, by sequence in the order of BRATS_CHANNELS. The ranks are those of textbooks:
# T1 white > grey > fluid, T2 the reverse, FLAIR like T2 with dark fluid.
_SIGNAL = {
    #               t1    t1ce  t2    flair
    "white": (1.00, 0.98, 0.43, 0.56),
    "grey": (0.76, 0.78, 0.64, 0.74),
    "fluid": (0.36, 0.38, 1.10, 0.24),
    "lesion": (0.76, 0.76, 0.92, 1.08),
    "cavity": (0.36, 0.38, 1.15, 0.34),
    "vessel": (0.80, 1.70, 0.34, 0.52),
    "edema": (0.68, 0.72, 1.02, 1.08),
    "necrosis": (0.44, 0.46, 1.20, 0.98),
    "enhancing": (0.80, 1.60, 0.98, 1.14),
}
_VARIATION = {"necrosis": 0.18, "enhancing": 0.14, "edema": 0.1}
"""Spread of a signal between cases, as a share of it; 0.07 for all other rows. Cores reach from cyst to solid."""

Labels = npt.NDArray[np.uint8]

_LABELS = {"edema": EDEMA, "necrosis": NECROSIS, "enhancing": ENHANCING}


@dataclass(frozen=True)
class Phantom:
    """One synthetic case, all maps with axes z, y, x.

    Attributes:
        images: modality name (`modalities.BRATS_CHANNELS`) -> float32 signal, above zero in the brain, zero outside.
        labels: uint8, values of BraTS 2021: 0, 1 necrotic or non-enhancing core, 2 edema, 4 enhancing.
        anatomy: the healthy brain below, with what only looks like tumour.
    """

    images: dict[str, Reals]
    labels: Labels
    anatomy: Anatomy


def make_case(
    rng: np.random.Generator, shape: tuple[int, int, int], difficulty: Difficulty | None = None
) -> tuple[dict[str, Reals], Labels]:
    """Draw one case; `make_phantom` without the anatomy.

    Args:
        rng: source of randomness; the same state gives the same case.
        shape: number of voxels along z, y, x (foot to head, front to back, right to left), at least 16 each.
        difficulty: see `Difficulty`; None for the default.

    Returns:
        Images: modality name -> float32 (z, y, x), zero outside the brain. Labels: uint8 (z, y, x), values 0, 1, 2, 4.
    """
    phantom = make_phantom(rng, shape, difficulty)
    return phantom.images, phantom.labels


def make_phantom(
    rng: np.random.Generator, shape: tuple[int, int, int], difficulty: Difficulty | None = None
) -> Phantom:
    """Draw one case with its anatomy; arguments as for `make_case`.

    Raises:
        ValueError: ``shape`` has not three entries of at least 16.
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"A phantom needs a shape of three numbers of at least 16 voxels, got {tuple(shape)}.")
    difficulty = difficulty or Difficulty()
    plans = plan_tumors(rng)
    anatomy = build_anatomy(rng, shape, difficulty, [(plan.center, plan.radius, plan.push) for plan in plans])
    labels = grow_tumors(rng, plans, anatomy)
    shares = _shares(rng, anatomy, labels, difficulty)
    images = {
        name: _sequence(rng, channel, shares, anatomy.brain, difficulty) for channel, name in enumerate(BRATS_CHANNELS)
    }
    return Phantom(images, labels, anatomy)


def _shares(rng: np.random.Generator, anatomy: Anatomy, labels: Labels, difficulty: Difficulty) -> dict[str, Reals]:
    """Return how much of each row of `_SIGNAL` a voxel holds: float32 (z, y, x) each, in sum one."""
    shares = {name: anatomy.tissue[i].copy() for i, name in enumerate(("white", "grey", "fluid"))}
    layers = {"lesion": 0.85 * anatomy.lesions, "cavity": anatomy.cavities, "vessel": anatomy.vessels}
    # Tumour tissue is patchy; contrast stays within 0 and 1 of the way from healthy to textbook signal.
    patchy = np.clip(difficulty.tumor_contrast * (1 + 0.2 * smooth_noise(rng, labels.shape, 0.03)), 0, 1)
    for name, value in _LABELS.items():
        blur = 0.9 if value == EDEMA else 0.5
        layers[name] = ndimage.gaussian_filter((labels == value).astype(np.float32), blur) * patchy
    for name, layer in layers.items():
        for other in shares:
            shares[other] *= 1 - layer
        shares[name] = layer
    return shares


def _sequence(
    rng: np.random.Generator, channel: int, shares: dict[str, Reals], brain: Mask, difficulty: Difficulty
) -> Reals:
    """Return the signal of one sequence: contrast, blur, bias field, Rician noise, scale; float32 (z, y, x)."""
    spread = difficulty.anatomy
    signal = np.zeros(brain.shape, np.float32)
    for name, row in _SIGNAL.items():
        variation = _VARIATION.get(name, 0.07) * spread * rng.uniform(-1, 1)
        signal += shares[name] * np.float32(row[channel] * (1 + variation))
    signal = ndimage.gaussian_filter(signal, (rng.uniform(0.2, 0.6), 0.3, 0.3))
    signal *= _bias_field(rng, brain.shape, 0.12 * spread)
    sigma = difficulty.noise * rng.uniform(0.025, 0.06)
    noise = rng.standard_normal((2, *brain.shape), dtype=np.float32) * np.float32(sigma)
    signal = np.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
    scale = np.exp(rng.normal(6.5, 0.5))  # scanners have no common unit
    return np.where(brain, np.maximum(signal * np.float32(scale), 1), 0).astype(np.float32)


def _bias_field(rng: np.random.Generator, shape: tuple[int, ...], strength: float) -> Reals:
    z, y, x = coordinates(shape)
    terms = (z, y, x, z * y, y * x, z * x, z**2 - 0.5, y**2 - 0.5, x**2 - 0.5)
    exponent = sum(
        np.float32(weight) * term for weight, term in zip(rng.normal(0, strength, len(terms)), terms, strict=True)
    )
    field: Reals = np.exp(exponent)
    return field
