"""``mgml report``: the slices the viewer shows, and that its sprites hold the very labels."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from report_page import tiles

from nnunetv2_mgml.presentation.report import sprites
from nnunetv2_mgml.presentation.report.cases import CaseVolumes


@given(depth=st.integers(1, 90), extent=st.tuples(st.integers(0, 89), st.integers(0, 89)), most=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_chosen_slices_are_few_even_and_hold_the_best(depth: int, extent: tuple[int, int], most: int):
    labels = np.zeros((depth, 3, 3), int)
    low, high = sorted(min(e, depth - 1) for e in extent)
    labels[low : high + 1, 1, 1] = 1
    labels[(low + high) // 2] = 1
    chosen = sprites.choose_slices([labels, np.zeros_like(labels)], most)
    assert 1 <= len(chosen) <= most
    assert (low + high) // 2 in chosen
    assert len(set(np.diff(chosen))) <= 1
    assert chosen.min() >= max(low - sprites.MARGIN, 0)
    assert chosen.max() <= min(high + sprites.MARGIN, depth - 1)


def test_sprites_hold_the_very_labels_and_nearly_the_image():
    rng = np.random.default_rng(0)
    reference = np.zeros((6, 30, 41), np.uint8)
    reference[1:5, 5:25, 8:33] = rng.choice([0, 1, 2, 4], size=(4, 20, 25))
    smooth = np.cumsum(np.cumsum(rng.normal(size=reference.shape), 1), 2)
    image = 300 + 50 * smooth / np.abs(smooth).max()
    volumes = CaseVolumes("c", {"dwi": image}, reference, {"dwi": np.roll(reference, 2, 2)}, (1.0, 2.0, 0.5))
    case = sprites.viewer_case(volumes, [1, 2, 4])
    assert case["aspect"] == 4.0
    assert case["sides"] == ("R", "L")
    assert case["factor"] == 1
    step = sprites.grey_step([1, 2, 4])
    ranks = np.round(tiles(case, case["reference"]) / step).astype(int)
    np.testing.assert_array_equal(np.array([0, 1, 2, 4])[ranks], reference[case["slices"]])
    shown = tiles(case, case["images"]["dwi"]).astype(float)
    expected = np.clip((image - np.percentile(image, 0.5)) / np.ptp(np.percentile(image, (0.5, 99.5))) * 255, 0, 255)
    assert np.abs(shown - expected[case["slices"]]).mean() < 4


def test_large_slices_are_reduced_and_masks_stay_aligned():
    labels = np.zeros((1, 600, 512), np.uint8)
    labels[0, 300:420, 90:180] = 1
    volumes = CaseVolumes("c", {"ct": labels * 100.0 + 1}, labels, {"ct": labels}, (1.0, 1.0, 1.0))
    case = sprites.viewer_case(volumes, [1])
    assert case["factor"] == 3
    assert max(case["height"], case["width"]) <= sprites.MAX_SIDE
    mask = tiles(case, case["reference"])[0] > 0
    bright = tiles(case, case["images"]["ct"])[0] > 128
    assert mask.sum() == 40 * 30
    assert (mask != bright).mean() < 0.01
