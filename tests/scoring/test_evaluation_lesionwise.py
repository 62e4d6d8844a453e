"""Lesion-wise metrics by the BraTS 2023 rules, against drawn lesions and a slow implementation of the rules."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, generate_binary_structure, label

from nnunetv2_mgml.scoring.metrics import MaskPair, get_metric
from nnunetv2_mgml.scoring.metrics.lesionwise import lesion_scores
from nnunetv2_mgml.scoring.metrics.surface import hd95
from nnunetv2_mgml.scoring.policy import get_policy

SHAPE = (30, 40, 40)


def test_without_panoptica_the_install_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "panoptica", None)
    monkeypatch.setattr("nnunetv2_mgml.scoring.metrics.lesionwise.find_spec", lambda name: None)
    full = np.ones((4, 4, 4), dtype=bool)
    with pytest.raises(ValueError, match="pip install panoptica"):
        lesion_scores(MaskPair.from_arrays(full, full, (1, 1, 1)))


def cube(*corner: int, size: int = 5) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[tuple(slice(c, c + size) for c in corner)] = True
    return mask


def scores(reference: np.ndarray, prediction: np.ndarray):
    pytest.importorskip("panoptica")
    return lesion_scores(MaskPair.from_arrays(reference, prediction, (1.0, 1.0, 1.0)))


NOTHING = np.zeros(SHAPE, dtype=bool)
A, B = cube(3, 3, 3), cube(15, 25, 25)


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        (NOTHING, NOTHING, (1, 0, 0, 0, 0)),
        (NOTHING, A, (0, 374, 0, 0, 1)),
        (A, NOTHING, (0, 374, 0, 1, 0)),
        (A, A, (1, 0, 1, 0, 0)),
        (A | B, A, (0.5, 187, 1, 1, 0)),
        (A, A | B, (0.5, 187, 1, 0, 1)),
        (A | B, A | B, (1, 0, 2, 0, 0)),
        # two pieces whose dilations touch are one lesion; a piece within three voxels of a lesion belongs to it
        (cube(3, 3, 3) | cube(3, 3, 13), cube(3, 3, 3) | cube(3, 3, 13), (1, 0, 1, 0, 0)),
        (A, A | cube(3, 3, 10, size=1), (2 * 125 / 251, 0, 1, 0, 0)),
        # at most 50 mm^3: the lesion does not count, nor does what was predicted for it
        (A | cube(20, 20, 20, size=3), A, (1, 0, 1, 0, 0)),
        (A | cube(20, 20, 20, size=3), A | cube(20, 20, 20, size=3), (1, 0, 1, 0, 0)),
        (cube(20, 20, 20, size=3), NOTHING, (1, 0, 0, 0, 0)),
    ],
)
def test_drawn_lesions(reference, prediction, expected):
    found = scores(reference, prediction)
    assert tuple(found) == pytest.approx(expected)


def test_one_component_can_answer_for_two_lesions():
    far = cube(3, 3, 20)
    bridge = A | far | np.roll(cube(5, 5, 8, size=1), 0)
    bridge[5, 5, 8:20] = True
    found = scores(A | far, bridge)
    assert (found.found, found.missed, found.false_positives) == (2, 0, 0)
    assert found.dice == pytest.approx(2 * 125 / (125 + bridge.sum()))


def slow_rules(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """The rules as the challenge states them, on whole volumes, without any library for the matching."""
    wide, near = generate_binary_structure(3, 3), generate_binary_structure(3, 2)
    zones, zone_count = label(binary_dilation(reference, near, iterations=3), wide)
    parts, part_count = label(prediction, wide)
    dices, distances, used = [], [], set()
    for zone in range(1, zone_count + 1):
        lesion = reference & (zones == zone)
        reach = binary_dilation(lesion, near, iterations=3)
        own = {int(p) for p in parts[reach]} - {0}
        used |= own
        if lesion.sum() * np.prod(spacing) <= 50:
            continue
        answer = np.isin(parts, sorted(own))
        dices.append(2 * (lesion & answer).sum() / (lesion.sum() + answer.sum()))
        distances.append(hd95(MaskPair.from_arrays(lesion, answer, spacing)) if own else 374)
    extra = part_count - len(used)
    count = len(dices) + extra
    return (1, 0) if count == 0 else (sum(dices) / count, (sum(distances) + 374 * extra) / count)


@pytest.mark.parametrize("seed", range(8))
def test_against_the_rules_on_random_blobs(seed):
    pytest.importorskip("panoptica")
    rng = np.random.default_rng(seed)

    def blobs() -> np.ndarray:
        mask = np.zeros(SHAPE, dtype=bool)
        for _ in range(rng.integers(2, 9)):
            corner, size = rng.integers(0, (26, 36, 36)), rng.integers(1, 8, size=3)
            mask[tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))] = True
        return mask

    reference, spacing = blobs(), (1.0, 1.5, 0.8)
    prediction = blobs() | (reference & (rng.random(SHAPE) < 0.7))
    found = lesion_scores(MaskPair.from_arrays(reference, prediction, spacing))
    assert (found.dice, found.hd95) == pytest.approx(slow_rules(reference, prediction, spacing))


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [(NOTHING, NOTHING, (None, None)), (NOTHING, A, (0, None)), (A, NOTHING, (0, None)), (A, A, (1, 0))],
)
def test_the_policy_nan_gives_empty_masks_no_value(reference, prediction, expected):
    pytest.importorskip("panoptica")
    pair = MaskPair.from_arrays(reference, prediction, (1.0, 1.0, 1.0))
    found = [get_policy("nan").score(get_metric(name), pair) for name in ("lesion_dice", "lesion_hd95")]
    assert [None if math.isnan(value) else value for value in found] == list(expected)
    brats = [get_policy("brats").score(get_metric(name), pair) for name in ("lesion_dice", "lesion_hd95")]
    assert brats == list(lesion_scores(pair)[:2])
