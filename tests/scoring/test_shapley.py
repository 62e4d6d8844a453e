from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.scoring.shapley import modality_worth, shapley_values


def by_permutations(values: dict, count: int) -> list[float]:
    """The definition: average marginal gain over all orders in which the modalities can arrive."""
    gains = [0.0] * count
    orders = list(itertools.permutations(range(count)))
    for order in orders:
        present: set[int] = set()
        before = 0.0
        for modality in order:
            present.add(modality)
            after = values[tuple(i in present for i in range(count))]
            gains[modality] += (after - before) / len(orders)
            before = after
    return gains


@st.composite
def games(draw: st.DrawFn) -> tuple[int, dict]:
    count = draw(st.integers(1, 5))
    return count, {subset: draw(st.floats(0, 1)) for subset in all_subsets(count)}


@given(games())
@settings(max_examples=60, deadline=None)
def test_equals_the_average_over_all_orders_and_adds_up_to_the_full_score(game: tuple[int, dict]) -> None:
    count, values = game
    shares = shapley_values(values, count)
    assert shares == pytest.approx(by_permutations(values, count), abs=1e-12)
    assert sum(shares) == pytest.approx(values[(True,) * count], abs=1e-12)


def test_symmetric_modalities_share_alike_and_a_useless_one_gets_nothing() -> None:
    # channels 0 and 1 each suffice for 0.8; channel 2 never changes anything
    values = {s: 0.8 if s[0] or s[1] else 0.0 for s in all_subsets(3)}
    assert shapley_values(values, 3) == pytest.approx((0.4, 0.4, 0.0))


def test_modality_worth_by_hand() -> None:
    values = {(True, False): 0.5, (False, True): 0.7, (True, True): 0.8}
    worth = modality_worth(values, ["dwi", "adc"])
    assert list(worth) == ["dwi", "adc"]
    assert worth["dwi"] == pytest.approx((0.3, 0.5, 0.1))
    assert worth["adc"] == pytest.approx((0.5, 0.7, 0.3))


def test_single_modality_gets_everything() -> None:
    assert modality_worth({(True,): 0.6}, ["ct"])["ct"] == pytest.approx((0.6, 0.6, 0.6))


def test_nan_is_passed_on_and_a_missing_subset_is_named() -> None:
    values = {s: 0.5 for s in all_subsets(2)}
    assert all(math.isnan(v) for v in shapley_values({**values, (True, True): math.nan}, 2))
    del values[(False, True)]
    with pytest.raises(ValueError, match="all 3 subsets; missing are those of the channels 1"):
        shapley_values(values, 2)
