"""`plans.regions`: region definitions by which even a perfect prediction would be wrong are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_mgml.dataset_conversion.labels import dataset_labels
from nnunetv2_mgml.plans.regions import check_regions, misread_labels, suggested_order

PAEDIATRIC = {"background": 0, "WT": [1, 2, 3, 4], "TC": [1, 2, 3], "ET": 1}


def test_the_paediatric_regions_are_refused_with_an_order_that_works() -> None:
    with pytest.raises(ValueError, match="regions_class_order") as error:
        check_regions({"labels": PAEDIATRIC, "regions_class_order": [1, 2, 3]})
    message = str(error.value)
    assert "label 1 (in WT, TC, ET) would be written as 3, which is in WT, TC" in message
    assert "label 4 (in WT) would be written as 1, which is in WT, TC, ET" in message
    assert '"regions_class_order": [4, 2, 1]' in message
    for order in ([4, 3, 1], [4, 2, 1]):
        check_regions({"labels": PAEDIATRIC, "regions_class_order": order})


@pytest.mark.parametrize("with_cavity", [False, True])
def test_what_we_write_ourselves_passes(with_cavity: bool) -> None:
    labels, order = dataset_labels(with_cavity)
    check_regions({"labels": labels, "regions_class_order": order})


@pytest.mark.parametrize(
    "labels", [{"background": 0, "a": 1, "b": 2}, {"background": 0, "a": [1], "b": 2, "ignore": 3}, None, []]
)
def test_plain_labels_have_no_order(labels: object) -> None:
    check_regions({"labels": labels})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regions_class_order": None}, r'needs "regions_class_order", a list of labels\. Use .*\[4, 2, 1\]'),
        ({"regions_class_order": [1, 2]}, r"3 regions \(WT, TC, ET\) but 2 values"),
        ({"labels": {**PAEDIATRIC, "ET": "1"}}, "Label 'ET' of dataset.json must be a number"),
        (
            {"labels": {"background": 0, "ET": 1, "TC": [1, 2, 3], "WT": [1, 2, 3, 4]}},
            "from large to small .*WT, TC, ET",
        ),
        ({"labels": {"background": 0, "a": [1, 2], "b": [2, 3], "c": 9}}, "No order works"),
    ],
)
def test_other_mistakes(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_regions({"labels": PAEDIATRIC, "regions_class_order": [1, 2, 3], **change})


regions_strategy = st.lists(
    st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True).map(tuple), min_size=1, max_size=4
)


def perfect_scores(regions: list[tuple[int, ...]], order: list[int]) -> bool:
    """Whether nnU-Net's own conversion of a perfect prediction gives back every region."""
    labels = {"background": 0, **{str(i): list(region) for i, region in enumerate(regions)}, "more": [8, 9]}
    manager = LabelManager(labels, [*order, 8])
    truth = np.arange(10)
    predicted = np.stack([np.isin(truth, region) for region in [*regions, (8, 9)]]).astype(np.float32)
    written = np.asarray(manager.convert_probabilities_to_segmentation(predicted[:, None, None])).ravel()
    return all(np.array_equal(np.isin(truth, region), np.isin(written, region)) for region in regions)


@settings(max_examples=200, deadline=None)
@given(regions_strategy, st.data())
def test_refused_exactly_when_nnunet_would_get_a_perfect_prediction_wrong(
    regions: list[tuple[int, ...]], data: st.DataObject
) -> None:
    order = data.draw(st.lists(st.integers(1, 5), min_size=len(regions), max_size=len(regions)))
    assert perfect_scores(regions, order) == (not misread_labels(regions, order))


@settings(max_examples=200, deadline=None)
@given(regions_strategy)
def test_an_order_is_suggested_exactly_when_there_is_one(regions: list[tuple[int, ...]]) -> None:
    orders = itertools.product(range(1, 5), repeat=len(regions))
    working = [list(order) for order in orders if not misread_labels(regions, order)]
    suggested = suggested_order(regions)
    assert (suggested is not None) == bool(working)
    assert suggested is None or suggested in working
