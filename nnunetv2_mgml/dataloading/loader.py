"""`MGMLDataLoader`: nnU-Net's loader with *full* data and, with it, what the network may see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunetv2_mgml.dataloading.masking import SubsetSampler
from nnunetv2_mgml.modalities import Subset


class MGMLDataLoader(nnUNetDataLoader):  # type: ignore[misc]  # nnunetv2 ships no types
    """Adds to nnU-Net's batch ``available`` and ``visible``, both ``(B, M)`` bool tensors.

    ``available`` is what a case has at all, ``visible`` a random subset of it (also under its older name,
    ``modality_mask``). The data stay complete, so that
    a teacher can see what the student may not. Only channels that do not exist are zeroed: nnU-Net's intensity
    transforms put noise into an empty channel in about one of ten samples.

    Args:
        availability: modalities of every case, by identifier.
        sampler: draws the masks, with a generator seeded from NumPy's global state, which nnU-Net's workers seed.
    """

    def __init__(self, *args: Any, availability: Mapping[str, Subset], sampler: SubsetSampler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.availability = availability
        self.sampler = sampler

    def generate_train_batch(self) -> dict[str, Any]:
        """Return ``data (B, C, *spatial)`` float32, ``target``, ``keys``, ``available``, ``visible``."""
        batch: dict[str, Any] = super().generate_train_batch()
        available = np.array([self.availability[key] for key in batch["keys"]], dtype=bool)
        rng = np.random.default_rng(np.random.randint(2**31, size=2))
        for sample, row in zip(batch["data"], available, strict=True):
            for channel in np.flatnonzero(~row):
                sample[channel] = 0
        batch["available"] = torch.from_numpy(available)
        batch["visible"] = batch["modality_mask"] = torch.from_numpy(self.sampler.sample(available, rng))
        return batch


def visible_modalities(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return ``visible (B, M)`` bool of a batch, or ``modality_mask`` where a loader of yours still calls it so."""
    visible: torch.Tensor = batch["visible"] if "visible" in batch else batch["modality_mask"]
    return visible
