"""Draws which modalities a training sample may see: pure functions of an explicit random generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.modalities import canonical_name, channel_index
from nnunetv2_mgml.plans.options import SamplingOptions

_DEFAULT_RATE = 0.5


@dataclass(frozen=True)
class SubsetSampler:
    """Draws a non-empty subset of what each case has.

    Args:
        scheme: see ``mask_sampling`` of `SamplingOptions`.
        missing_rate: chance of each modality to be removed (``bernoulli`` only), one per channel.
    """

    scheme: str
    missing_rate: tuple[float, ...]

    def sample(self, available: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
        """Draw one mask per sample.

        Args:
            available: ``(B, M)`` bool, at least one True per row.
            rng: the generator.

        Returns:
            ``(B, M)`` bool, a non-empty subset of ``available`` in every row.

        Raises:
            ValueError: a row of ``available`` without any True.
        """
        available = np.asarray(available, dtype=bool)
        empty = np.flatnonzero(~available.any(axis=1))
        if len(empty):
            raise ValueError(
                f"Sample {', '.join(map(str, empty))} of the batch has no modality at all; every case "
                f"needs one at least. Remove such cases from the dataset and preprocess again."
            )
        return np.stack([self._sample_row(row, rng) for row in available])

    def _sample_row(self, row: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
        if self.scheme == "fixed":
            return row.copy()
        existing = np.flatnonzero(row)
        mask = np.zeros_like(row)
        if self.scheme == "uniform_subset":
            code = int(rng.integers(1, 2 ** len(existing)))
            mask[existing] = [(code >> bit) & 1 for bit in range(len(existing))]
        elif self.scheme == "uniform_count":
            count = int(rng.integers(1, len(existing) + 1))
            mask[rng.choice(existing, count, replace=False)] = True
        else:
            mask[existing] = _bernoulli(np.asarray(self.missing_rate)[existing], rng)
        return mask


def _bernoulli(rates: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw who stays, given that someone does: first who is the first to stay, then those after it on their own.

    Args:
        rates: chance of each to be removed, in [0, 1).
        rng: the generator.

    Returns:
        Bool, at least one True; each subset with the product of its chances over that of not being empty.
    """
    removed_before = np.concatenate(([1.0], np.cumprod(rates[:-1])))
    chances = (1 - rates) * removed_before
    first = rng.choice(len(rates), p=chances / chances.sum())
    kept = rng.random(len(rates)) >= rates
    kept[:first] = False
    kept[first] = True
    return kept


def build_sampler(options: SamplingOptions, channels: Sequence[str]) -> SubsetSampler:
    """Build the sampler a configuration asks for.

    Args:
        options: ``mask_sampling`` and ``modality_missing_rate`` (aliases accepted as names).
        channels: modality names in channel order.

    Raises:
        ValueError: a rate for a modality the dataset does not have.
    """
    return SubsetSampler(options.mask_sampling, missing_rates(options.modality_missing_rate, channels))


def missing_rates(by_name: Mapping[str, float], channels: Sequence[str]) -> tuple[float, ...]:
    """Return one rate per channel; 0.5 where none is named."""
    for name in by_name:
        channel_index(name, channels, "This data set")
    named = {canonical_name(name): float(rate) for name, rate in by_name.items()}
    return tuple(named.get(canonical_name(channel), _DEFAULT_RATE) for channel in channels)
