"""The `cubes` data: a 32^3 cube around the tumour per patient of BraTS 2020, and what a training step draws from them.

The patients are split once, by a seed, into training, validation and test. Choices rest on validation patients only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cubes_variants import CHANNELS
from numpy.typing import NDArray

from nnunetv2_mgml.dataloading.masking import SubsetSampler
from nnunetv2_mgml.dataset_conversion.missing import draw_missing

REGIONS = ("whole_tumor", "tumor_core", "enhancing_tumor")
SPLIT_SEED = 2026
HELD_OUT = {"test": 60 / 288, "validation": 36 / 288}
"""Shares of the patients; of all 288 it is 60 for the test, 36 for validation and 192 for training."""
MISSING_RATES = {"t1": 0.2, "t1ce": 0.4, "flair": 0.6, "t2": 0.8}
"""How often patients lack a modality where they are to: PASSION's protocol (docs/conversion.md)."""
_LABELS = ((1, 2, 4), (1, 4), (4,))
"""BraTS labels of `REGIONS`."""


@dataclass(frozen=True)
class Cubes:
    """Patients on one device."""

    images: torch.Tensor
    """``(N, M, x, y, z)`` float32, z-scored inside the brain of the cube, 0 outside it."""
    regions: torch.Tensor
    """``(N, R, x, y, z)`` bool."""
    patients: list[str]

    def to(self, device: torch.device | str) -> Cubes:
        """Return a copy on a device."""
        return Cubes(self.images.to(device), self.regions.to(device), self.patients)


def cubes_file() -> Path:
    """Return the file of the cubes.

    Raises:
        FileNotFoundError: ``MGML_REAL_DATA`` does not name a folder with ``brats2020_cubes/cubes.npz``.
    """
    root = os.environ.get("MGML_REAL_DATA", "")
    file = Path(root, "brats2020_cubes", "cubes.npz")
    if not root or not file.is_file():
        raise FileNotFoundError(
            f"MGML_REAL_DATA must name the folder with brats2020_cubes/cubes.npz; it is {root or 'not set'}."
        )
    return file


def read_cubes(file: Path) -> Cubes:
    """Read the cubes.

    Args:
        file: an archive of ``images (N, 4, x, y, z)`` uint8 in the order of `CHANNELS`, 0 outside the brain, else
            linear in the z-score; ``labels (N, x, y, z)`` uint8 with BraTS values 0, 1, 2, 4; ``patients (N,)``.
    """
    with np.load(file) as stored:
        images, labels = stored["images"].astype(np.float32), stored["labels"]
        patients = [str(name) for name in stored["patients"]]
    for image in images.reshape(-1, *images.shape[2:]):
        brain = image > 0
        inside = image[brain]
        image[brain] = (inside - inside.mean()) / max(float(inside.std()), 1e-8)
    regions = np.stack([np.isin(labels, values) for values in _LABELS], 1)
    return Cubes(torch.from_numpy(images), torch.from_numpy(regions), patients)


def split(patients: list[str], seed: int = SPLIT_SEED) -> dict[str, list[int]]:
    """Return the indices of the patients for "train", "validation" and "test", the same whatever their order here."""
    order = np.random.default_rng(seed).permutation(len(patients))
    by_name = sorted(range(len(patients)), key=lambda index: patients[index])
    shuffled = [by_name[place] for place in order]
    test, validation = (round(HELD_OUT[part] * len(patients)) for part in ("test", "validation"))
    return {
        "test": shuffled[:test],
        "validation": shuffled[test : test + validation],
        "train": shuffled[test + validation :],
    }


def left_by_rate(patients: Sequence[str]) -> NDArray[np.bool_]:
    """Return which modalities every patient has, ``(patients, M)``, once they lack them at `MISSING_RATES`.

    It follows from the names, so that it is the same in every training.
    """
    missing = draw_missing(patients, MISSING_RATES, SPLIT_SEED)
    return np.array([[channel not in missing.get(patient, ()) for channel in CHANNELS] for patient in patients])


class Draws(NamedTuple):
    """What the steps of a training draw, drawn before it so that no step waits; the first axis is the step."""

    case: torch.Tensor
    """``(steps, B)`` int64."""
    start: torch.Tensor
    """``(steps, B, 3)`` int64, corner of the patch, voxels."""
    flip: torch.Tensor
    """``(steps, B, 3)`` bool."""
    scale: torch.Tensor
    """``(steps, B, M)`` float32, factor of the intensities."""
    shift: torch.Tensor
    """``(steps, B, M)`` float32."""
    visible: torch.Tensor
    """``(steps, B, M)`` bool."""
    available: torch.Tensor
    """``(steps, B, M)`` bool, what the patient has."""

    def at(self, step: torch.Tensor) -> Draws:
        """Return the draws of one step, ``step (1,)`` int64 on the same device, without its axis."""
        return Draws(*(values.index_select(0, step).squeeze(0) for values in self))


def draw(
    cases: list[int],
    steps: int,
    batch: int,
    patch: int,
    edge: int,
    sampler: SubsetSampler,
    seed: int,
    intensity: float = 0.1,
    has: NDArray[np.bool_] | None = None,
) -> Draws:
    """Draw cases (with replacement, as nnU-Net), patches, flips, intensities and subsets for a training.

    Args:
        cases: indices of the training patients.
        steps: steps of the training.
        batch: samples per step.
        patch: edge of the patch, voxels.
        edge: edge of the cubes, voxels.
        sampler: of the modalities a sample may see.
        seed: everything follows from it, so trainings with one seed see the same data and subsets.
        intensity: factors lie within 1 +- this, shifts within +- this.
        has: ``(patients, M)``, see `left_by_rate`; None: everyone has everything.
    """
    # one generator for each kind: the draws of a longer training begin with those of a shorter one
    of_case, of_start, of_flip, of_scale, of_shift, of_subset = np.random.default_rng(seed).spawn(6)
    shape = (steps, batch)
    case = np.asarray(cases)[of_case.integers(len(cases), size=shape)]
    start = of_start.integers(edge - patch + 1, size=(*shape, 3))
    flip = of_flip.random((*shape, 3)) < 0.5
    scale = of_scale.uniform(1 - intensity, 1 + intensity, (*shape, len(CHANNELS))).astype(np.float32)
    shift = of_shift.uniform(-intensity, intensity, (*shape, len(CHANNELS))).astype(np.float32)
    available = np.ones((*shape, len(CHANNELS)), bool) if has is None else has[case]
    visible = sampler.sample(available.reshape(-1, len(CHANNELS)), of_subset).reshape(available.shape)
    return Draws(*map(torch.from_numpy, (case, start, flip, scale, shift, visible, available)))


def cut(cubes: Cubes, draws: Draws, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the augmented patches ``(B, M, *patch)`` and regions ``(B, R, *patch)`` bool of one step's draws."""
    offset = torch.arange(patch, device=draws.start.device)
    place = draws.start[..., None] + torch.where(draws.flip[..., None], patch - 1 - offset, offset)
    x, y, z = place.unbind(1)
    index = (
        draws.case[:, None, None, None],
        slice(None),
        x[:, :, None, None],
        y[:, None, :, None],
        z[:, None, None, :],
    )
    images, regions = (source[index].movedim(-1, 1).contiguous() for source in (cubes.images, cubes.regions))
    spread = (..., None, None, None)
    return torch.where(images != 0, images * draws.scale[spread] + draws.shift[spread], 0), regions
