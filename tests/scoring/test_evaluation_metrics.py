"""Metrics: hand-drawn masks with known answers, slow independent implementations, the empty-case policies."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from nnunetv2_mgml.scoring.cases import ScoringSettings, score_arrays
from nnunetv2_mgml.scoring.metrics import MaskPair, Metric, all_metrics, default_metrics, get_metric, register
from nnunetv2_mgml.scoring.policy import POLICIES, get_policy
from nnunetv2_mgml.scoring.regions import (
    are_brats_regions,
    label_set,
    resolve_region,
    short_name,
    short_names,
    table_region_order,
)

DRAWN_REFERENCE = """
. . . . . .
. # # # . .
. # # # . .
. # # # . .
. . . . . .
"""
DRAWN_PREDICTION = """
. . . . . .
. . # # # .
. . # # # .
. . . . . .
. . . . . .
"""


def draw(picture: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in line.split()] for line in picture.strip().splitlines()])


def pair(reference: np.ndarray, prediction: np.ndarray, spacing=None) -> MaskPair:
    return MaskPair.from_arrays(reference, prediction, spacing or (1.0,) * reference.ndim)


def value(name: str, masks: MaskPair) -> float:
    return get_metric(name).compute(masks)


def brute_force_hd95(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> float:
    """All pairs of surface voxels, one by one; percentile by sorting."""

    def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
        found = []
        for index in itertools.product(*map(range, mask.shape)):
            if not mask[index]:
                continue
            for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
                other = list(index)
                other[axis] += step
                if not 0 <= other[axis] < mask.shape[axis] or not mask[tuple(other)]:
                    found.append(index)
                    break
        return found

    def percentile95(values: list[float]) -> float:
        values = sorted(values)
        position = 0.95 * (len(values) - 1)
        low = math.floor(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (position - low) * (values[high] - values[low])

    a, b = surface(reference), surface(prediction)

    def directed(source: list, target: list) -> float:
        return percentile95(
            [
                min(
                    math.dist(
                        [i * s for i, s in zip(p, spacing, strict=True)],
                        [i * s for i, s in zip(q, spacing, strict=True)],
                    )
                    for q in target
                )
                for p in source
            ]
        )

    return max(directed(a, b), directed(b, a))


class TestHandDrawn:
    masks = pair(draw(DRAWN_REFERENCE), draw(DRAWN_PREDICTION), (2.0, 3.0))

    def test_counts(self):
        assert (self.masks.true_positives, self.masks.false_positives, self.masks.false_negatives) == (4, 2, 5)

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("dice", 8 / 15),
            ("sensitivity", 4 / 9),
            ("precision", 4 / 6),
            ("relative_volume_error", -3 / 9),
            ("absolute_volume_error", 3 * 6 / 1000),
        ],
    )
    def test_values(self, name, expected):
        assert value(name, self.masks) == pytest.approx(expected, abs=1e-12)

    def test_hd95_of_one_voxel_each_is_their_distance_in_mm(self):
        a, b = np.zeros((2, 5, 5, 5), dtype=bool)
        a[1, 1, 1] = b[3, 2, 1] = True
        assert value("hd95", pair(a, b, (2.0, 0.5, 7.0))) == pytest.approx(math.hypot(4, 0.5))

    def test_hd95_is_the_larger_directed_percentile(self):
        a = np.zeros((3, 60), dtype=bool)
        a[1, :30] = True
        b = np.zeros_like(a)
        b[1, :50] = True
        # from a to b: 0 everywhere. From b to a: 0 thirty times, then 1 ... 20; the 95th percentile lies at 0.95 * 49.
        assert value("hd95", pair(a, b)) == pytest.approx(17.55)
        assert value("hd95", pair(b, a)) == pytest.approx(17.55)

    def test_single_slice_volume_is_an_image(self):
        square, shifted = np.zeros((2, 9, 9), dtype=bool)
        square[2:7, 2:7] = True
        shifted[2:7, 3:8] = True
        flat = value("hd95", pair(square, shifted))
        assert value("hd95", pair(square[None], shifted[None], (5.0, 1.0, 1.0))) == flat

    def test_volume_counts_the_slice_thickness(self):
        mask = np.zeros((1, 4, 4), dtype=bool)
        mask[0, 0] = True
        assert pair(mask, mask, (5.0, 1.0, 2.0)).reference.volume_ml == pytest.approx(4 * 10 / 1000)


@st.composite
def mask_pairs(draw_value):
    shape = draw_value(st.tuples(*[st.integers(1, 7)] * draw_value(st.integers(2, 3))))
    seed = draw_value(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    density = draw_value(st.sampled_from((0.05, 0.3, 0.8)))
    spacing = tuple(draw_value(st.sampled_from((0.5, 1.0, 2.5))) for _ in shape)
    return rng.random(shape) < density, rng.random(shape) < density, spacing


class TestAgainstSlowReferences:
    @settings(max_examples=60, deadline=None)
    @given(mask_pairs())
    def test_hd95(self, masks):
        reference, prediction, spacing = masks
        if not reference.any() or not prediction.any():
            return
        keep = [axis for axis, n in enumerate(reference.shape) if n > 1] or [0]
        shape = tuple(reference.shape[axis] for axis in keep)
        expected = brute_force_hd95(
            reference.reshape(shape), prediction.reshape(shape), tuple(spacing[axis] for axis in keep)
        )
        assert value("hd95", pair(reference, prediction, spacing)) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("seed", range(8))
    def test_hd95_is_monais(self, seed):
        monai = pytest.importorskip("monai.metrics")
        rng = np.random.default_rng(seed)
        spacing = (5.0, 1.0, 0.7) if seed % 2 else (1.0, 1.0, 1.0)
        reference, prediction = (gaussian_filter(rng.normal(size=(14, 18, 20)), 2) > 0.05 for _ in range(2))
        tensors = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
        expected = monai.compute_hausdorff_distance(
            *tensors, include_background=True, percentile=95, spacing=[list(spacing)]
        ).item()
        assert value("hd95", pair(reference, prediction, spacing)) == pytest.approx(expected, abs=1e-4)

    @settings(max_examples=60, deadline=None)
    @given(mask_pairs())
    def test_overlap(self, masks):
        reference, prediction, spacing = masks
        cells = list(zip(reference.ravel().tolist(), prediction.ravel().tolist(), strict=True))
        tp, fp, fn = (sum(c == kind for c in cells) for kind in ((True, True), (False, True), (True, False)))
        found = pair(reference, prediction, spacing)
        assert (found.true_positives, found.false_positives, found.false_negatives) == (tp, fp, fn)
        for name, top, bottom in (
            ("dice", 2 * tp, 2 * tp + fp + fn),
            ("sensitivity", tp, tp + fn),
            ("precision", tp, tp + fp),
            ("relative_volume_error", fp - fn, tp + fn),
        ):
            result = value(name, found)
            assert math.isnan(result) if bottom == 0 else result == pytest.approx(top / bottom)

    @settings(max_examples=20, deadline=None)
    @given(mask_pairs())
    def test_perfect_prediction(self, masks):
        reference, _, spacing = masks
        if not reference.any():
            return
        perfect = pair(reference, reference.copy(), spacing)
        values = {name: value(name, perfect) for name in default_metrics()}
        assert values == {
            "dice": 1,
            "sensitivity": 1,
            "precision": 1,
            "hd95": 0,
            "absolute_volume_error": 0,
            "relative_volume_error": 0,
        }

    def test_moving_both_masks_changes_nothing(self):
        rng = np.random.default_rng(4)
        a, b = rng.random((2, 6, 6, 6)) < 0.3
        far = [np.pad(m, ((5, 1), (0, 3), (2, 2))) for m in (a, b)]
        inside = [np.pad(m, 1) for m in (a, b)]
        for name in default_metrics():
            assert value(name, pair(*far)) == pytest.approx(value(name, pair(*inside)))


EMPTY, FULL = np.zeros((3, 3), dtype=bool), np.ones((3, 3), dtype=bool)
NAN = math.nan


class TestPolicies:
    @pytest.mark.parametrize(
        ("policy", "metric", "expected"),
        [
            # both empty, reference empty, prediction empty
            ("brats", "dice", (1, 0, 0)),
            ("brats", "hd95", (0, 374, 374)),
            ("brats", "sensitivity", (1, 0, 0)),
            ("brats", "precision", (1, 0, 0)),
            ("brats", "absolute_volume_error", (0, 0.009, 0.009)),
            ("brats", "relative_volume_error", (0, NAN, -1)),
            ("nan", "dice", (NAN, 0, 0)),
            ("nan", "hd95", (NAN, NAN, NAN)),
            ("nan", "sensitivity", (NAN, NAN, 0)),
            ("nan", "precision", (NAN, 0, NAN)),
            ("nan", "absolute_volume_error", (0, 0.009, 0.009)),
            ("nan", "relative_volume_error", (NAN, NAN, -1)),
        ],
    )
    def test_every_empty_combination(self, policy, metric, expected):
        pairs = (pair(EMPTY, EMPTY), pair(EMPTY, FULL), pair(FULL, EMPTY))
        found = [get_policy(policy).score(get_metric(metric), p) for p in pairs]
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_non_empty_pairs_are_computed(self):
        for policy in POLICIES.values():
            assert policy.score(get_metric("dice"), TestHandDrawn.masks) == pytest.approx(8 / 15)

    def test_auto_is_brats_for_brats_regions_only(self):
        assert get_policy("auto", ["whole tumor", "tumor_core", "ET"]).name == "brats"
        assert get_policy("auto", ["lesion"]).name == "nan"

    def test_auto_does_not_turn_with_the_first_resection_cavity(self):
        regions = {"whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3], "resection_cavity": [4]}
        labels = label_set({"labels": {"background": 0, **regions}})
        scoring = ScoringSettings(labels)
        assert scoring.policy == "brats"
        assert table_region_order(reversed(list(labels.regions))) == list(labels.regions)
        empty, alarm = np.zeros((2, 4, 4, 4), np.uint8)
        alarm[0, 0, 0] = 3
        assert score_arrays(empty, alarm, (1, 1, 1), scoring)["enhancing_tumor"]["hd95"] == 374
        assert get_policy("auto", ["wt", "tc", "et", "edema"]).name == "nan"
        assert get_policy("auto", ["wt", "tc", "RC"]).name == "nan"

    def test_unknown_policy_is_named(self):
        with pytest.raises(ValueError, match=r"'zero'.*auto, brats, nan"):
            get_policy("zero")


class TestRegistry:
    def test_unknown_metric_lists_all(self):
        with pytest.raises(ValueError, match=r"'iou'.*dice, hd95"):
            get_metric("iou")

    def test_name_is_taken_once(self):
        with pytest.raises(ValueError, match="already registered"):
            register(Metric("dice", "Dice", "%", True, lambda p: 0.0))

    def test_lesion_wise_metrics_are_optional(self):
        assert set(all_metrics()) - set(default_metrics()) == {"lesion_dice", "lesion_hd95"}

    def test_masks_of_different_shape_are_refused(self):
        with pytest.raises(ValueError, match="differ in shape"):
            pair(EMPTY, np.zeros((3, 4), dtype=bool))


class TestRegions:
    def test_labels_and_regions(self):
        labels = label_set({"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "et": 3, "ignore": 4}})
        assert labels.regions == {"whole": (1, 2, 3), "core": (2, 3), "et": (3,)}
        assert labels.ignore_label == 4
        assert labels.known_labels == {0, 1, 2, 3}
        np.testing.assert_array_equal(labels.mask(np.array([0, 1, 2, 3, 4]), "core"), [False, False, True, True, False])

    def test_short_names(self):
        assert [short_name(n) for n in ("whole_tumor", "Tumour Core", "enhancing tumor", "lesion")] == [
            "WT",
            "TC",
            "ET",
            "lesion",
        ]
        assert not are_brats_regions(["whole tumor", "tumor core", "et", "edema"])
        assert resolve_region("et", ["whole_tumor", "enhancing_tumor"]) == "enhancing_tumor"

    def test_names_that_only_hold_a_short_name_are_others(self):
        others = ["et 1", "ET2", "水肿 ET", "非ET", "t_c_0", "w.t."]
        assert [short_name(name) for name in others] == others
        assert not are_brats_regions(["wt", "tc", "et 1"])
        with pytest.raises(ValueError, match=r"Unknown region 'ET'\. Allowed: et 1, "):
            resolve_region("ET", others)

    def test_two_spellings_of_one_region_keep_their_names(self):
        regions = ["whole tumor", "WT", "enhancing_tumor", "edema"]
        assert short_names(regions) == {
            "whole tumor": "whole tumor",
            "WT": "WT",
            "enhancing_tumor": "ET",
            "edema": "edema",
        }
        assert [resolve_region(text, regions) for text in ("WT", "wt", "ET", "Edema")] == ["WT", "WT", *regions[2:]]
        for text, names in (("et", ["ET ", "E_T"]), ("CORE", ["Core", "core"])):
            with pytest.raises(ValueError, match=f"'{text}' may be any of the regions {', '.join(names)}"):
                resolve_region(text, names)
        assert resolve_region("core", ["Core", "core"]) == "core"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({}, 'no "labels"'),
            ({"labels": {"0": "background", "1": "lesion"}}, "turn them round"),
            ({"labels": {"background": 0, "ignore": 1}}, "nothing to evaluate"),
        ],
    )
    def test_bad_dataset_json(self, content, message):
        with pytest.raises(ValueError, match=message):
            label_set(content)
