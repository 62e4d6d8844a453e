"""Lesion-wise Dice and HD95 by the rules of the BraTS 2023 challenge (GLI, SSA and PEDS tasks), on panoptica.

1. Reference voxels whose dilations (3 iterations, 18-neighbourhood) touch form one lesion.
2. A connected component (26-neighbourhood) of the prediction belongs to every lesion whose dilation it touches.
3. A lesion is compared with all its components together; one without any scores Dice 0 and HD95 374 mm.
4. Lesions of at most 50 mm^3 are left out, and so are components that belong only to them.
5. A component that belongs to no lesion counts as one more lesion with Dice 0 and HD95 374 mm.
6. The mean over all of these is the case's value; 1 and 0 mm if there are none.

panoptica finds the components and computes each lesion's Dice. The distance is our `hd95`, because the challenge takes
the larger of the two directed percentiles while panoptica pools both directions; panoptica's own matching knows no
dilation.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from scipy.ndimage import binary_dilation, generate_binary_structure

from nnunetv2_mgml.scoring.metrics.base import MaskPair, Metric
from nnunetv2_mgml.scoring.metrics.surface import hd95

DILATION_ITERATIONS = 3
MIN_LESION_MM3 = 50.0
PENALTY_MM = 374.0


class LesionScores(NamedTuple):
    """Lesion-wise result of one region of one case."""

    dice: float
    """Mean Dice over lesions and false positives, a fraction."""
    hd95: float
    """Mean HD95 over lesions and false positives, mm."""
    found: int
    """Lesions above the size limit with at least one predicted component."""
    missed: int
    """Lesions above the size limit without one."""
    false_positives: int
    """Predicted components that belong to no lesion."""


def require_panoptica() -> None:
    """Raise a ValueError with the install line when panoptica is not there."""
    if find_spec("panoptica") is None:
        raise ValueError(
            "Lesion-wise metrics need the panoptica library, which is not installed. "
            "Fix: pip install panoptica (or the package with its extra 'lesions')."
        )


@lru_cache(maxsize=1)
def lesion_scores(pair: MaskPair) -> LesionScores:
    """Score a region lesion by lesion.

    Args:
        pair: reference and prediction; either may be empty.

    Raises:
        ValueError: panoptica is not installed.
    """
    require_panoptica()
    from panoptica import ConnectedComponentsInstanceApproximator, SemanticPair
    from panoptica import Metric as PanopticaMetric

    if pair.situation == "both_empty":
        return LesionScores(1.0, 0.0, 0, 0, 0)
    box = _joint_box(pair)
    reference, prediction = pair.reference.mask[box], pair.prediction.mask[box]
    spacing = pair.reference.spacing
    structure = generate_binary_structure(reference.ndim, min(2, reference.ndim))
    dilated = binary_dilation(reference, structure, iterations=DILATION_ITERATIONS)
    instances = ConnectedComponentsInstanceApproximator().approximate_instances(
        SemanticPair(prediction_arr=prediction.astype(np.uint8), reference_arr=dilated.astype(np.uint8))
    )
    components, zones = instances.prediction_arr, instances.reference_arr

    dices, distances, found, missed, matched = [], [], 0, 0, set()
    for zone in range(1, int(zones.max()) + 1):
        lesion = reference & (zones == zone)
        touching = [int(c) for c in np.unique(components[zones == zone]) if c]
        matched.update(touching)
        if np.count_nonzero(lesion) * float(np.prod(spacing)) <= MIN_LESION_MM3:
            continue
        if not touching:
            missed += 1
            dices.append(0.0)
            distances.append(PENALTY_MM)
            continue
        found += 1
        answer = np.isin(components, touching)
        dices.append(float(PanopticaMetric.DSC(lesion, answer)))
        distances.append(hd95(MaskPair.from_arrays(lesion, answer, spacing)))
    false_positives = int(components.max()) - len(matched)
    count = len(dices) + false_positives
    if not count:
        return LesionScores(1.0, 0.0, found, missed, 0)
    return LesionScores(
        sum(dices) / count, (sum(distances) + false_positives * PENALTY_MM) / count, found, missed, false_positives
    )


def _joint_box(pair: MaskPair) -> tuple[slice, ...]:
    """Half-open box in voxels around both masks, with room for the dilation, inside the image."""
    boxes = [m.box for m in (pair.reference, pair.prediction) if not m.empty]
    margin = DILATION_ITERATIONS + 1
    return tuple(
        slice(max(0, min(s.start for s in sides) - margin), min(length, max(s.stop for s in sides) + margin))
        for sides, length in zip(zip(*boxes, strict=True), pair.reference.mask.shape, strict=True)
    )


LESION_DICE = Metric(
    "lesion_dice", "Lesion-wise Dice (BraTS 2023)", "%", True, lambda pair: lesion_scores(pair).dice, optional=True
)
LESION_HD95 = Metric(
    "lesion_hd95", "Lesion-wise HD95 (BraTS 2023)", "mm", False, lambda pair: lesion_scores(pair).hd95, optional=True
)
