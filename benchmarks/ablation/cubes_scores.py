"""Scores of the cubes: Dice per patient, region and subset, and what is told of a finished run.

Rules: a prediction is what nnU-Net makes of region heads (a voxel of a later region belongs to the earlier ones too);
an enhancing tumour predicted with fewer than 4 voxels counts as none; both empty is Dice 1, one of them empty 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cubes_data import REGIONS, Cubes
from cubes_variants import CHANNELS
from step import Learner, autocast

from nnunetv2_mgml.modalities import Subset, subset_name

SMALLEST_ENHANCING = 4
"""Voxels; 17 mm^3 at the cubes' spacing."""
INVERSION = 0.01
"""By how much a larger subset may score lower without being counted as an inversion: one Dice point."""


def to_regions(logits: torch.Tensor) -> torch.Tensor:
    """Turn logits ``(..., R, x, y, z)`` of nested regions, outermost first, into predictions of that shape, bool."""
    inside = logits > 0
    nested = [inside.select(-4, len(REGIONS) - 1)]
    for region in reversed(range(len(REGIONS) - 1)):
        nested.append(inside.select(-4, region) | nested[-1])
    predicted = torch.stack(nested[::-1], -4)
    voxels = predicted.flatten(-3).sum(-1)
    kept = torch.ones_like(voxels, dtype=torch.bool)
    kept[..., -1] = voxels[..., -1] >= SMALLEST_ENHANCING
    return predicted & kept[..., None, None, None]


def dice_of(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return Dice ``(...)`` of bool tensors ``(..., x, y, z)`` that broadcast; 1 where both are empty."""
    both, one, two = ((t.flatten(-3).sum(-1).float()) for t in (predicted & truth, predicted, truth))
    total = one + two
    return torch.where(total > 0, 2 * both / total.clamp_min(1), 1)


@torch.inference_mode()
def dice(
    learner: Learner, cubes: Cubes, cases: Sequence[int], subsets: Sequence[Subset], precision: str, batch: int
) -> torch.Tensor:
    """Predict whole cubes for every subset.

    Args:
        learner: trained; it is put back into training mode.
        cubes: on the learner's device.
        cases: indices of the patients.
        subsets: the subsets.
        precision: of autocast, see `step.autocast`.
        batch: patients at a time.

    Returns:
        Dice ``(R, S, N)``, on the device.
    """
    network, device = learner.network, cubes.images.device
    table = torch.tensor(list(subsets)).to(device)
    network.eval()
    network.decoder.deep_supervision = False
    scores = []
    try:
        for chosen in torch.tensor(list(cases)).to(device).split(batch):
            with autocast(device, precision):
                logits = learner.predict(cubes.images[chosen], table)
            scores.append(dice_of(to_regions(logits), cubes.regions[chosen][:, None]))
    finally:
        network.train()
        network.decoder.deep_supervision = True
    return torch.cat(scores).permute(2, 1, 0)


def summary(values: np.ndarray, subsets: Sequence[Subset]) -> dict[str, Any]:
    """Return the means of Dice ``(R, S, N)`` in [0, 1], in percent: all, per region, by number of modalities.

    ``inversions``: the share of (patient, nested pair of subsets, region) in which the larger subset scores lower by
    more than 1 point; ``inversions_any``: by any amount. Both in percent, None where no subset contains another.
    """
    counts = [sum(subset) for subset in subsets]
    return {
        "mean": _percent(values),
        "regions": {region: _percent(values[index]) for index, region in enumerate(REGIONS)},
        "by_count": {
            str(count): _percent(values[:, [index for index, c in enumerate(counts) if c == count]])
            for count in sorted(set(counts))
        },
        "subsets": {subset_name(subset, CHANNELS): _percent(values[:, index]) for index, subset in enumerate(subsets)},
        "inversions": inversions(values, subsets, INVERSION),
        "inversions_any": inversions(values, subsets, 0.0),
    }


def inversions(values: np.ndarray, subsets: Sequence[Subset], margin: float) -> float | None:
    """Return how often, in percent, a subset scores more than ``margin`` below one that it contains; see `summary`."""
    pairs = [
        (small, large)
        for small, few in enumerate(subsets)
        for large, many in enumerate(subsets)
        if few != many and all(b or not a for a, b in zip(few, many, strict=True))
    ]
    if not pairs:
        return None
    lower = [values[:, small] - values[:, large] > margin for small, large in pairs]
    return _percent(np.stack(lower))


def cases_of(values: np.ndarray, subsets: Sequence[Subset]) -> dict[str, dict[str, list[float]]]:
    """Return Dice ``(R, S, N)`` as region -> subset -> values in case order."""
    return {
        region: {
            subset_name(subset, CHANNELS): [round(float(v), 4) for v in values[r, s]]
            for s, subset in enumerate(subsets)
        }
        for r, region in enumerate(REGIONS)
    }


def _percent(values: np.ndarray) -> float:
    return round(100 * float(values.mean()), 3)
