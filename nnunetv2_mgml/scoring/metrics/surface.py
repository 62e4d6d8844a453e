"""HD95: the 95th percentile of surface distances, in mm.

Surface voxels are those with a face neighbour outside the mask; the distance of one is that to the nearest surface
voxel centre of the other mask; the result is the larger of the two directed 95th percentiles (linear interpolation).
The BraTS challenges take the same maximum, but weight each distance by the surface area around it; medpy and panoptica
pool both directions before taking one percentile, which gives the same or a lower value.
"""

from __future__ import annotations

import math

import numpy as np

from nnunetv2_mgml.scoring.metrics.base import MaskPair, Metric


def hd95(pair: MaskPair) -> float:
    """Return the 95th-percentile Hausdorff distance in mm; NaN when a mask is empty."""
    if pair.situation is not None:
        return math.nan
    to_reference, _ = pair.reference.surface_tree.query(pair.prediction.surface_mm)
    to_prediction, _ = pair.prediction.surface_tree.query(pair.reference.surface_mm)
    return float(max(np.percentile(to_reference, 95), np.percentile(to_prediction, 95)))


HD95 = Metric("hd95", "HD95", "mm", False, hd95)
