"""The table of label values: inverse of itself, equal to nnU-Net's own script, usable by nnU-Net's label manager."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nnunetv2.dataset_conversion.Dataset137_BraTS21 import convert_labels_back_to_BraTS
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_mgml.dataset_conversion.labels import (
    CONVENTIONS,
    allowed_values,
    dataset_labels,
    from_nnunet,
    plain_labels,
    to_nnunet,
)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    convention=st.sampled_from(CONVENTIONS),
    dtype=st.sampled_from([np.uint8, np.int16, np.float32, np.float64]),
)
def test_round_trip(data: st.DataObject, convention: str, dtype: type) -> None:
    values = st.sampled_from(allowed_values(convention))
    brats = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3), elements=values))
    nnunet = to_nnunet(brats, convention)
    assert nnunet.dtype == np.uint8
    assert nnunet.shape == brats.shape
    back = from_nnunet(nnunet, convention)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, brats)
    np.testing.assert_array_equal(nnunet == 0, brats == 0)


def test_values_of_each_convention() -> None:
    assert to_nnunet(np.array([0, 1, 2, 4]), "brats2021").tolist() == [0, 2, 1, 3]
    assert to_nnunet(np.array([0, 1, 2, 3, 4]), "brats2023").tolist() == [0, 2, 1, 3, 4]


def test_back_conversion_equals_that_of_nnunet() -> None:
    labels = np.array([0, 1, 2, 3], np.uint8)
    np.testing.assert_array_equal(from_nnunet(labels, "brats2021"), convert_labels_back_to_BraTS(labels))


@pytest.mark.parametrize(
    ("values", "convention", "named"),
    [
        ([0, 3], "brats2021", "3"),
        ([0, 5], "brats2023", "5"),
        ([0.0, 1.5], "brats2023", "1.5"),
        ([0, -1], "brats2023", "-1"),
        ([0.0, np.nan], "brats2021", "nan"),
        ([0, 256], "brats2021", "256"),
    ],
)
def test_unexpected_values_are_named(values: list[float], convention: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"unexpected label value\(s\) {named}; {convention} has 0, 1, 2"):
        to_nnunet(np.array(values), convention)


def test_cavity_has_no_value_before_2023() -> None:
    with pytest.raises(ValueError, match=r"unexpected label value\(s\) 4"):
        from_nnunet(np.array([0, 4]), "brats2021")
    assert from_nnunet(np.array([0, 4]), "brats2023").tolist() == [0, 4]


def test_unknown_convention() -> None:
    with pytest.raises(ValueError, match="Allowed: brats2021, brats2023"):
        to_nnunet(np.zeros(1), "brats2015")


@pytest.mark.parametrize("with_cavity", [False, True])
def test_plain_labels_exclude_one_another(with_cavity: bool) -> None:
    manager = LabelManager(plain_labels(with_cavity), None)
    assert not manager.has_regions
    assert manager.num_segmentation_heads == (5 if with_cavity else 4)
    assert manager.all_labels == list(range(5 if with_cavity else 4))


@pytest.mark.parametrize("with_cavity", [False, True])
def test_label_manager_inverts_regions(with_cavity: bool) -> None:
    """Perfect region probabilities give back the labels; a region of one label, the cavity, is a region too."""
    labels, order = dataset_labels(with_cavity)
    manager = LabelManager(labels, order)
    count = 4 if with_cavity else 3
    assert manager.has_regions
    assert manager.num_segmentation_heads == count
    assert manager.all_labels == list(range(count + 1))
    segmentation = torch.arange(count + 1).repeat(3).reshape(3, 1, -1)
    regions = [region if isinstance(region, tuple) else (region,) for region in manager.foreground_regions]
    probabilities = torch.stack([torch.isin(segmentation, torch.tensor(region)).float() for region in regions])
    assert torch.equal(manager.convert_probabilities_to_segmentation(probabilities).long(), segmentation)
