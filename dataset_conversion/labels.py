"""The one table of label values: nnU-Net's (consecutive) beside those of the two BraTS conventions.

The nnU-Net values are those of nnU-Net's own ``Dataset137_BraTS21``, so that datasets converted by that script and by
ours are interchangeable. BraTS changed the value of the enhancing tumour from 4 to 3 in 2023 and has used 4 for the
resection cavity since the post-treatment data of 2024: the same number means two things.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONVENTIONS: tuple[str, ...] = ("brats2021", "brats2023")
"""BraTS up to 2021 (values 0, 1, 2, 4), and since 2023 (values 0 to 3, plus 4 where there is a resection cavity)."""


@dataclass(frozen=True)
class Label:
    """One row of the table; None where a convention has no such label."""

    nnunet: int
    name: str
    brats2021: int | None
    brats2023: int | None


LABELS: tuple[Label, ...] = (
    Label(0, "background", 0, 0),
    Label(1, "edema", 2, 2),
    Label(2, "necrosis and non-enhancing tumour", 1, 1),
    Label(3, "enhancing tumour", 4, 3),
    Label(4, "resection cavity", None, 4),
)

ENHANCING, RESECTION_CAVITY = 3, 4

REGIONS: dict[str, tuple[int, ...]] = {
    "whole_tumor": (1, 2, 3),
    "tumor_core": (2, 3),
    "enhancing_tumor": (3,),
    "resection_cavity": (4,),
}
"""Region -> nnU-Net labels. The cavity is no tumour, hence in none of the first three."""

_OTHER_NAMES: dict[str, int] = {
    "ed": 1,
    "peritumoral edema": 1,
    "snfh": 1,
    "necrosis": 2,
    "ncr": 2,
    "net": 2,
    "ncr net": 2,
    "netc": 2,
    "necrotic core": 2,
    "necrotic tumor core": 2,
    "non enhancing tumor": 2,
    "non enhancing tumor core": 2,
    "enhancing": 3,
    "et": 3,
    "gd enhancing tumor": 3,
    "cavity": 4,
    "rc": 4,
}
"""What other data sets call our labels, spelled as `_plain` does."""

REGIONS_CLASS_ORDER: tuple[int, ...] = (1, 2, 3, 4)
"""Label that each region paints, in the order of `REGIONS`, later over earlier."""


def allowed_values(convention: str) -> tuple[int, ...]:
    """Return the label values a BraTS convention knows, in ascending order.

    Raises:
        ValueError: unknown convention.
    """
    return tuple(sorted(_table(convention)))


def _table(convention: str) -> dict[int, int]:
    if convention not in CONVENTIONS:
        raise ValueError(f"Unknown label convention '{convention}'. Allowed: {', '.join(CONVENTIONS)}.")
    values = {label.nnunet: getattr(label, convention) for label in LABELS}
    return {brats: nnunet for nnunet, brats in values.items() if brats is not None}


def _replace(segmentation: NDArray[Any], table: dict[int, int], allowed: str) -> NDArray[Any]:
    found = np.unique(segmentation)
    # An integral float such as 3.0 equals its integer; 2.5 and NaN are in no table.
    unexpected = [value for value in found.tolist() if value not in table]
    if unexpected:
        shown = ", ".join(f"{value:g}" for value in unexpected[:5]) + (", ..." if len(unexpected) > 5 else "")
        raise ValueError(f"unexpected label value(s) {shown}; {allowed}")
    lookup = np.zeros(max(table) + 1, dtype=np.uint8)
    lookup[list(table)] = list(table.values())
    replaced: NDArray[Any] = lookup[segmentation.astype(np.uint8)]
    return replaced


def to_nnunet(segmentation: NDArray[Any], convention: str) -> NDArray[Any]:
    """Replace BraTS label values by nnU-Net's.

    Args:
        segmentation: any shape, integers or integral floats, values of ``convention``.
        convention: one of `CONVENTIONS`.

    Returns:
        Same shape, uint8, values 0 to 4.

    Raises:
        ValueError: a value the convention does not have; the message names it.
    """
    table = _table(convention)
    return _replace(segmentation, table, f"{convention} has {', '.join(map(str, sorted(table)))}")


def from_nnunet(segmentation: NDArray[Any], convention: str) -> NDArray[Any]:
    """Replace nnU-Net's label values by those of a BraTS convention; the inverse of `to_nnunet`.

    Args:
        segmentation: any shape, integers or integral floats, values 0 to 4.
        convention: one of `CONVENTIONS`.

    Returns:
        Same shape, uint8, values of ``convention``.

    Raises:
        ValueError: a value that is no label of ours, or one the convention has no value for (the resection cavity in
            ``brats2021``).
    """
    table = {nnunet: brats for brats, nnunet in _table(convention).items()}
    return _replace(
        segmentation,
        table,
        f"predictions that can be written as {convention} have {', '.join(map(str, sorted(table)))}",
    )


def renumber(segmentation: NDArray[Any], table: dict[int, int]) -> NDArray[Any]:
    """Replace the values of another nnU-Net data set by ours.

    Args:
        segmentation: any shape, integers or integral floats.
        table: value there -> our label (`our_labels`).

    Returns:
        Same shape, uint8, values 0 to 4.

    Raises:
        ValueError: a value that the other data set does not have.
    """
    return _replace(segmentation, table, f"its dataset.json has {', '.join(map(str, sorted(table)))}")


def our_labels(description: Mapping[str, Any]) -> dict[int, int]:
    """Return value -> our label, as the ``dataset.json`` of another nnU-Net data set tells them.

    Regions must be those of our conversion, or nnU-Net's own ``Dataset137_BraTS21``. Plain labels may have any values
    from 0 to 255; each is told by its name.

    Args:
        description: content of ``dataset.json``, with ``labels``.

    Raises:
        ValueError: other regions, a name that may mean several things or nothing, or two names for one label.
    """
    labels = dict(description["labels"])
    given = {_plain(str(name)): _values(value) for name, value in labels.items()}
    if len(given) < len(labels):
        raise ValueError("two labels have one name")
    given.pop("ignore", None)
    if given.pop("background", ()) != (0,):
        raise ValueError("background is not 0")
    if any(len(values) != 1 for values in given.values()):
        return _of_regions(given, description.get("regions_class_order"))
    table = {0: 0}
    for name, (value,) in given.items():
        label = _KNOWN_NAMES.get(name)
        if label is None or label in table.values() or value in table or not 0 < value <= 255:
            why = "is not known" if label is None else "is there twice, or has a value that cannot be"
            raise ValueError(f"the label '{name}' {why}")
        table[value] = label
    return table


def _of_regions(given: Mapping[str, tuple[int, ...]], order: object) -> dict[int, int]:
    ours = [(_plain(name), labels) for name, labels in list(REGIONS.items())[: len(given)]]
    painted = list(REGIONS_CLASS_ORDER[: len(ours)])
    if len(given) < len(REGIONS) - 1 or list(given.items()) != ours or order not in (None, painted):
        raise ValueError(f"the regions are {', '.join(f'{name} {list(labels)}' for name, labels in given.items())}")
    return {label: label for label in (0, *painted)}


def _plain(name: str) -> str:
    """Return a label's name in lower case, with spaces only, in American spelling."""
    words = re.sub(r"[\W_]+", " ", name.lower()).strip()
    return words.replace("tumour", "tumor").replace("oedema", "edema")


def _values(value: Any) -> tuple[int, ...]:
    return tuple(int(label) for label in (value if isinstance(value, list) else [value]))


_KNOWN_NAMES = {_plain(label.name): label.nnunet for label in LABELS} | _OTHER_NAMES


def dataset_labels(with_cavity: bool) -> tuple[dict[str, int | list[int]], list[int]]:
    """Return ``labels`` and ``regions_class_order`` for nnU-Net's ``dataset.json``.

    Args:
        with_cavity: whether the dataset has resection cavities (BraTS 2024 and later, post-treatment).
    """
    count = len(REGIONS) if with_cavity else len(REGIONS) - 1
    regions = {name: list(labels) for name, labels in list(REGIONS.items())[:count]}
    return {"background": 0, **regions}, list(REGIONS_CLASS_ORDER[:count])


def plain_labels(with_cavity: bool) -> dict[str, int]:
    """Return ``labels`` for nnU-Net's ``dataset.json`` that exclude one another, instead of regions.

    Args:
        with_cavity: see `dataset_labels`.
    """
    return {label.name: label.nnunet for label in LABELS if with_cavity or label.nnunet != RESECTION_CAVITY}
