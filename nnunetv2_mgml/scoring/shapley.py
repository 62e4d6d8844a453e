"""Shapley value of each modality: its fair share of the score reached with all of them.

The value of a modality is its marginal contribution averaged over all orders in which the modalities could be acquired
(Shapley, A value for n-person games, 1953). With all ``2^M - 1`` subsets scored it is computed exactly:

    phi_i = sum over S without i of |S|! (M - |S| - 1)! / M! * (v(S with i) - v(S))

where ``v(S)`` is the mean score on subset ``S`` and ``v`` of no modality at all is 0 by convention: without any image
there is no segmentation. The values of all modalities therefore add up to the score with all modalities. Use it for
scores where more is better and 0 means nothing was found (Dice, sensitivity, precision), not for distances.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import factorial
from typing import NamedTuple

from nnunetv2_mgml.modalities import Subset, all_subsets, subset_name


class ModalityWorth(NamedTuple):
    """What one modality contributes to one score."""

    shapley: float
    """Average gain over all orders of acquisition."""
    alone: float
    """Score with this modality only."""
    if_dropped: float
    """Score lost when only this modality is missing (negative: the model does better without it)."""


def shapley_values(values: Mapping[Subset, float], num_modalities: int) -> tuple[float, ...]:
    """Return the exact Shapley value of each modality.

    Args:
        values: score of each of the ``2^M - 1`` non-empty subsets (tuples of ``M`` bools, True = visible); NaN is
            allowed and makes every Shapley value it touches NaN.
        num_modalities: ``M``.

    Returns:
        ``M`` values in channel order, whose sum is the score of the full subset.

    Raises:
        ValueError: a subset has no value.
    """
    missing = [subset for subset in all_subsets(num_modalities) if subset not in values]
    if missing:
        names = [subset_name(subset, [str(i) for i in range(num_modalities)]) for subset in missing]
        raise ValueError(
            f"Shapley values need the score of all {2**num_modalities - 1} subsets; missing are those "
            f"of the channels {', '.join(names)}. Evaluate them too."
        )
    score = {**values, (False,) * num_modalities: 0.0}
    return tuple(_shapley_value(score, modality, num_modalities) for modality in range(num_modalities))


def _shapley_value(score: Mapping[Subset, float], modality: int, num_modalities: int) -> float:
    total = 0.0
    for others in itertools.product((False, True), repeat=num_modalities - 1):
        without = (*others[:modality], False, *others[modality:])
        with_it = (*others[:modality], True, *others[modality:])
        size = sum(others)
        weight = factorial(size) * factorial(num_modalities - size - 1) / factorial(num_modalities)
        total += weight * (score[with_it] - score[without])
    return total


def modality_worth(values: Mapping[Subset, float], channels: Sequence[str]) -> dict[str, ModalityWorth]:
    """Return Shapley value, score alone and loss when dropped for each modality, in channel order.

    Args:
        values: score of each non-empty subset, as `shapley_values` takes it.
        channels: ``M`` modality names in channel order.

    Raises:
        ValueError: a subset has no value.
    """
    count = len(channels)
    shares = shapley_values(values, count)
    full = (True,) * count
    worth = {}
    for index, name in enumerate(channels):
        alone = tuple(i == index for i in range(count))
        dropped = tuple(i != index for i in range(count))
        lost = values[full] - (values[dropped] if any(dropped) else 0.0)
        worth[name] = ModalityWorth(shares[index], values[alone], lost)
    return worth
