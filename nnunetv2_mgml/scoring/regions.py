"""Which regions a data set has (from ``dataset.json``), and their masks in a label map."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_SHORT_NAMES = {
    "wholetumor": "WT",
    "wholetumour": "WT",
    "wt": "WT",
    "tumorcore": "TC",
    "tumourcore": "TC",
    "tc": "TC",
    "enhancingtumor": "ET",
    "enhancingtumour": "ET",
    "et": "ET",
    "resectioncavity": "RC",
    "rc": "RC",
}
BRATS_ORDER = ("WT", "TC", "ET")
CAVITY = "RC"
"""Resection cavity, a region of its own since the post-treatment data of BraTS 2024."""


@dataclass(frozen=True)
class LabelSet:
    """Regions of a data set and the labels its segmentations may hold."""

    regions: dict[str, tuple[int, ...]]
    """Name as in ``dataset.json`` -> the labels it consists of."""
    ignore_label: int | None = None

    @property
    def known_labels(self) -> frozenset[int]:
        """Labels a prediction may hold: background and every label of a region."""
        return frozenset({0}.union(*self.regions.values()))

    def mask(self, labels: npt.NDArray[Any], region: str) -> npt.NDArray[Any]:
        """Return the bool mask of a region in a label map (same shape)."""
        wanted = self.regions[region]
        return labels == wanted[0] if len(wanted) == 1 else np.isin(labels, wanted)


def label_set(dataset_json: dict[str, Any]) -> LabelSet:
    """Read the regions from nnU-Net's ``dataset.json`` (``labels``: a label or a list of labels per name).

    Raises:
        ValueError: no ``labels``, labels that are not numbers, or no region beside background and ignore.
    """
    labels = dataset_json.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise ValueError('dataset.json has no "labels"; add them, for example {"background": 0, "lesion": 1}.')
    regions, ignore = {}, None
    for name, value in labels.items():
        try:
            values = tuple(sorted({int(v) for v in (value if isinstance(value, (list, tuple)) else [value])}))
        except (TypeError, ValueError):
            raise ValueError(
                f"Label '{name}' of dataset.json must be a number or a list of numbers, got {value!r}. "
                f"(Files of nnU-Net v1 have number: name; turn them round.)"
            ) from None
        if name == "ignore":
            ignore = values[0]
        elif values not in ((0,), ()):
            regions[str(name)] = values
    if not regions:
        raise ValueError("dataset.json has no label beside background and ignore, so there is nothing to evaluate.")
    return LabelSet(regions, ignore)


def short_name(region: str) -> str:
    """Return WT, TC, ET or RC for the spellings of the BraTS regions, else the name itself.

    Case, blanks, ``_`` and ``-`` do not count; everything else does: ``ET 1`` is no ET. Of several regions use
    `short_names`, which keeps them apart.
    """
    return _SHORT_NAMES.get(re.sub(r"[\s_-]", "", region.lower()), region)


def short_names(regions: Iterable[str]) -> dict[str, str]:
    """Return region -> what it is called in tables and figures: `short_name` where no other region is called so."""
    regions = list(regions)
    found = {region: short_name(region) for region in regions}
    counts = Counter(found.values())
    return {region: short if counts[short] == 1 else region for region, short in found.items()}


def are_brats_regions(regions: Iterable[str]) -> bool:
    """Return whether the regions are whole tumour, tumour core and enhancing tumour, with or without the cavity."""
    names = sorted(short_name(region) for region in regions)
    return names in (sorted(BRATS_ORDER), sorted((*BRATS_ORDER, CAVITY)))


def table_region_order(regions: Iterable[str]) -> list[str]:
    """Return the regions in table order: WT, TC, ET (and the cavity) for BraTS, else as given."""
    regions = list(regions)
    if are_brats_regions(regions):
        return sorted(regions, key=lambda r: (*BRATS_ORDER, CAVITY).index(short_name(r)))
    return regions


def resolve_region(text: str, regions: Iterable[str]) -> str:
    """Return the region a user means by its name or short name, in any case.

    Raises:
        ValueError: no such region, or several; the message lists them.
    """
    regions = list(regions)
    if text in regions:
        return text
    wanted = text.lower()
    for name_of in (str, short_name):
        found = [region for region in regions if name_of(region).lower() == wanted]
        if len(found) > 1:
            raise ValueError(f"'{text}' may be any of the regions {', '.join(found)}. Give its name as it is written.")
        if found:
            return found[0]
    raise ValueError(f"Unknown region '{text}'. Allowed: {', '.join(regions)}.")
