"""What a metric is computed from (`RegionMask`, `MaskPair`), what it is (`Metric`), and the registry they join."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree


class RegionMask:
    """One region of one segmentation, with the derived quantities metrics need computed once and kept.

    Args:
        mask: bool array of any dimension, in the image's array axis order.
        spacing: voxel size in mm, one number per axis, in the same axis order.
    """

    def __init__(self, mask: npt.NDArray[Any], spacing: Sequence[float]) -> None:
        if mask.ndim != len(spacing):
            raise ValueError(f"A mask of {mask.ndim} axes needs {mask.ndim} spacings in mm, got {tuple(spacing)}.")
        # A single-slice volume is an image: along an axis of length 1 every voxel would count as surface.
        kept = [axis for axis, length in enumerate(mask.shape) if length > 1] or [0]
        self.mask = mask.reshape([mask.shape[axis] for axis in kept])
        self.spacing = tuple(float(spacing[axis]) for axis in kept)
        self._voxel_ml = float(np.prod([float(s) for s in spacing])) / 1000.0

    @cached_property
    def voxels(self) -> int:
        """Number of voxels of the region."""
        return int(np.count_nonzero(self.mask))

    @property
    def empty(self) -> bool:
        """Whether the region has no voxel."""
        return self.voxels == 0

    @property
    def volume_ml(self) -> float:
        """Volume in ml (1 ml = 1000 mm^3)."""
        return self.voxels * self._voxel_ml

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """Half-open bounding box in voxels (empty slices where the region is empty)."""
        box = []
        for axis in range(self.mask.ndim):
            others = tuple(a for a in range(self.mask.ndim) if a != axis)
            found = np.flatnonzero(self.mask.any(axis=others))
            box.append(slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0))
        return tuple(box)

    @cached_property
    def surface_mm(self) -> npt.NDArray[Any]:
        """Surface voxel centres in mm, ``(N, ndim)`` float64.

        A surface voxel has a face neighbour outside the region; beyond the image border counts as outside.
        """
        inside = self.mask[self.box]
        surface = inside & ~binary_erosion(inside, border_value=0)
        corner = np.array([s.start for s in self.box])
        points: npt.NDArray[Any] = (np.argwhere(surface) + corner) * np.array(self.spacing)
        return points

    @cached_property
    def surface_tree(self) -> cKDTree:
        """Nearest-neighbour index of `surface_mm`."""
        return cKDTree(self.surface_mm)


@dataclass(frozen=True)
class MaskPair:
    """Reference and prediction of one region of one case; both masks have the same shape and spacing."""

    reference: RegionMask
    prediction: RegionMask

    @classmethod
    def from_arrays(
        cls, reference: npt.NDArray[Any], prediction: npt.NDArray[Any], spacing: Sequence[float]
    ) -> MaskPair:
        """Build a pair from two bool arrays of one shape and the voxel size in mm (array axis order)."""
        if reference.shape != prediction.shape:
            raise ValueError(f"Reference {reference.shape} and prediction {prediction.shape} differ in shape.")
        return cls(
            RegionMask(reference.astype(bool, copy=False), spacing),
            RegionMask(prediction.astype(bool, copy=False), spacing),
        )

    @cached_property
    def true_positives(self) -> int:
        """Voxels in both masks."""
        if self.reference.empty or self.prediction.empty:
            return 0
        box = self.reference.box
        return int(np.count_nonzero(self.reference.mask[box] & self.prediction.mask[box]))

    @property
    def false_positives(self) -> int:
        """Voxels in the prediction only."""
        return self.prediction.voxels - self.true_positives

    @property
    def false_negatives(self) -> int:
        """Voxels in the reference only."""
        return self.reference.voxels - self.true_positives

    @property
    def situation(self) -> str | None:
        """``both_empty``, ``reference_empty``, ``prediction_empty``, or None when both have voxels."""
        return {
            (True, True): "both_empty",
            (True, False): "reference_empty",
            (False, True): "prediction_empty",
            (False, False): None,
        }[(self.reference.empty, self.prediction.empty)]


@dataclass(frozen=True)
class Metric:
    """A metric as data: how it is called, read and computed."""

    name: str
    """Column value in ``results.csv``."""
    title: str
    """Heading in tables."""
    unit: str
    """``%``, ``mm``, ``ml``; values in the CSV are fractions where the unit is ``%``."""
    higher_is_better: bool | None
    """None: neither (a signed error, best at 0)."""
    compute: Callable[[MaskPair], float]
    """Called on pairs the empty-case policy does not decide."""
    optional: bool = False
    """Not computed unless asked for (needs an extra library)."""

    @property
    def display_factor(self) -> float:
        """What a value is multiplied by in tables."""
        return 100.0 if self.unit == "%" else 1.0


_REGISTRY: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Add a metric to the registry.

    Raises:
        ValueError: the name is taken.
    """
    if metric.name in _REGISTRY:
        raise ValueError(f"Metric '{metric.name}' is already registered.")
    _REGISTRY[metric.name] = metric
    return metric


def all_metrics() -> dict[str, Metric]:
    """Return every registered metric by name, in the order tables show them."""
    return dict(_REGISTRY)


def default_metrics() -> tuple[str, ...]:
    """Return the names of the metrics computed unless the user chooses others."""
    return tuple(name for name, metric in _REGISTRY.items() if not metric.optional)


def get_metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        ValueError: no such metric; the message lists all.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown metric '{name}'. Allowed: {', '.join(_REGISTRY)}.")
    return _REGISTRY[name]
