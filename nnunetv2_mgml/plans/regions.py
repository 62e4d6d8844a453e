"""Whether the regions of a ``dataset.json`` survive being written as one label map.

nnU-Net predicts each region on its own and paints them over each other: region ``i`` with the label
``regions_class_order[i]``. A voxel of label L is so given the label of the last region that holds L. Only if that label
lies in the same regions as L itself does a perfect prediction score as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def check_regions(dataset_json: Mapping[str, Any]) -> None:
    """Raise unless a perfect prediction, written as a label map, has exactly the regions of the reference.

    Args:
        dataset_json: nnU-Net's; without regions there is nothing to check.

    Raises:
        ValueError: it would not; the message names the labels, what becomes of them, and what would work.
    """
    regions = _regions(dataset_json.get("labels"))
    if regions is None:
        return
    names, members = list(regions), list(regions.values())
    order = dataset_json.get("regions_class_order")
    example = suggested_order(members)
    if not isinstance(order, (list, tuple)) or not all(isinstance(value, int) for value in order):
        advice = f" {_use(example)}" if example else ""
        raise ValueError(f'dataset.json has regions, so it needs "regions_class_order", a list of labels.{advice}')
    if len(order) != len(members):
        raise ValueError(
            f"dataset.json has {len(members)} regions ({', '.join(names)}) but {len(order)} values in "
            f'"regions_class_order" {list(order)}; every region needs one.{f" {_use(example)}" if example else ""}'
        )
    wrong = misread_labels(members, order)
    if wrong:
        lines = [
            f"label {label} ({_holding(names, members, label)}) would be written as {painted}, which is "
            f"{_holding(names, members, painted)}"
            for label, painted in wrong.items()
        ]
        raise ValueError(
            f'The regions of dataset.json cannot be told from "regions_class_order" {list(order)}: '
            f"{'; '.join(lines)}. Even a perfect prediction would score badly. {_advice(names, members, example)}"
        )


def check_scored_regions(dataset_json: Mapping[str, Any]) -> None:
    """`check_regions` for label maps that are scored: without an order nothing says that regions were ever painted.

    Args:
        dataset_json: nnU-Net's, or one that only names what is to be scored.

    Raises:
        ValueError: it has an order, by which even a perfect prediction would score badly.
    """
    if dataset_json.get("regions_class_order") is not None:
        check_regions(dataset_json)


def misread_labels(regions: Sequence[Sequence[int]], order: Sequence[int]) -> dict[int, int]:
    """Return label -> the label nnU-Net writes for it, of those that then lie in other regions than before.

    Args:
        regions: the labels of each region, in nnU-Net's order, that of ``dataset.json``.
        order: ``regions_class_order``, as long.
    """
    painted = {label: value for region, value in zip(regions, order, strict=True) for label in region if label != 0}
    return {
        label: value for label, value in sorted(painted.items()) if _held_by(regions, label) != _held_by(regions, value)
    }


def suggested_order(regions: Sequence[Sequence[int]]) -> list[int] | None:
    """Return a ``regions_class_order`` that works, or None if none does while the regions stand in this order.

    Args:
        regions: the labels of each region.
    """
    last = {label: number for number, region in enumerate(regions) for label in region if label != 0}
    order = []
    for number, region in enumerate(regions):
        seen = sorted(label for label, where in last.items() if where == number)
        order.append(min(seen, default=min(region)))  # a region painted over completely may have any label
    return None if misread_labels(regions, order) else order


def _advice(names: Sequence[str], regions: Sequence[Sequence[int]], order: Sequence[int] | None) -> str:
    if order is not None:
        return _use(order)
    by_size = sorted(zip(names, regions, strict=True), key=lambda entry: -len(entry[1]))
    order = suggested_order([region for _, region in by_size])
    if order is not None:
        return f"List the regions from large to small ({', '.join(name for name, _ in by_size)}) and use {list(order)}."
    return (
        "No order works: regions that overlap need a label for every overlap, in a region of its own where it is in "
        "no other combination."
    )


def _use(order: Sequence[int]) -> str:
    return f'Use "regions_class_order": {list(order)}.'


def _holding(names: Sequence[str], regions: Sequence[Sequence[int]], label: int) -> str:
    held = [name for name, holds in zip(names, _held_by(regions, label), strict=True) if holds]
    return f"in {', '.join(held)}" if held else "in no region"


def _held_by(regions: Sequence[Sequence[int]], label: int) -> tuple[bool, ...]:
    return tuple(label in region for region in regions)


def _regions(labels: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the regions as nnU-Net takes them, or None where the labels are plain ones, or not to be understood."""
    if not isinstance(labels, Mapping):
        return None
    if not any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values()):
        return None
    found = {}
    for name, value in labels.items():
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(label, int) for label in values):
            raise ValueError(f"Label '{name}' of dataset.json must be a number or a list of numbers, got {value!r}.")
        if name != "ignore" and set(values) != {0}:
            found[str(name)] = values
    return found
