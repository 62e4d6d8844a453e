"""Which numbers of a fusion design belong to a modality, and which to a class: read off the design itself.

It is built once more for one modality more, and for one class more; what changes belongs to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nnunetv2_mgml.network.fusion.base import FusionDesign


class DesignLayout:
    """Which tensors of a fusion design belong to modalities, and along which axis, and which to classes."""

    def __init__(self, fusion: FusionDesign, more: Mapping[str, Any], classes: Mapping[str, Any] | None) -> None:
        self.shapes = {key: tuple(tensor.shape) for key, tensor in fusion.state_dict().items()}
        self.modalities = fusion.spec.num_modalities
        self.more, self.classes = more, classes
        self.order_matters = fusion.order_matters
        self.lists = _lists(self.shapes, self.more, self.modalities)
        self.lists_of_classes = _lists(self.shapes, self.classes or {}, fusion.spec.num_classes)

    @classmethod
    def of(cls, fusion: FusionDesign) -> DesignLayout:
        """Build the design for one modality, and for one class, more."""
        spec = fusion.spec
        more = _shapes(fusion, dataclasses.replace(spec, num_modalities=spec.num_modalities + 1))
        classes = _shapes(fusion, dataclasses.replace(spec, num_classes=spec.num_classes + 1))
        return cls(fusion, more or {}, classes)

    def of_classes(self, key: str) -> bool:
        """Whether a tensor has to do with the classes, by its shape or as one of a list with an entry per class.

        All have where the design could not be asked.
        """
        return self.classes is None or self.classes.get(key) != self.shapes[key] or key in self.lists_of_classes

    def place(self, key: str, pairs: Mapping[int, int | None]) -> str | None:
        """Return where a donor has a tensor, in a list with an entry per modality its own; None where it has none."""
        if key not in self.lists:
            return key
        named = self.lists[key]
        m = next(m for m in range(self.modalities) if named(m) == key)
        j = pairs[m]
        return None if j is None else named(j)

    def take(
        self,
        key: str,
        own: torch.Tensor,
        weights: Mapping[str, torch.Tensor],
        pairs: Mapping[int, int | None],
        offered: int,
    ) -> torch.Tensor | None:
        """Return a tensor of the design from a donor with ``offered`` modalities; None where there is none."""
        if key in self.lists:
            place = self.place(key, pairs)
            return None if place is None else weights.get(f"fusion.{place}")
        found = weights.get(f"fusion.{key}")
        wide = self.more.get(key, self.shapes[key])
        axes = [axis for axis, (a, b) in enumerate(zip(self.shapes[key], wide, strict=True)) if a != b]
        if found is None or not axes:
            return found
        if len(axes) > 1 or found.ndim != own.ndim:
            return None
        return _blocks(own, found, axes[0], wide[axes[0]] - own.shape[axes[0]], pairs, offered)


def _lists(own: Mapping[str, Any], more: Mapping[str, Any], count: int) -> dict[str, Callable[[int], str]]:
    """Return, for keys of modules there is one of per modality (or class), how the key of the ``j``-th reads.

    Args:
        own: shapes of a design's tensors.
        more: those of one with one modality, or class, more.
        count: modalities, or classes.
    """
    found: dict[str, Callable[[int], str]] = {}
    for key in more:
        parts = key.split(".")
        for place, part in enumerate(parts):
            if key in own or part != str(count):
                continue

            def named(j: int, parts: list[str] = parts, place: int = place) -> str:
                return ".".join([*parts[:place], str(j), *parts[place + 1 :]])

            names = [named(j) for j in range(count)]
            if all(name in own for name in names):
                found.update(dict.fromkeys(names, named))
                break
    return found


def _blocks(
    own: torch.Tensor, found: torch.Tensor, axis: int, size: int, pairs: Mapping[int, int | None], offered: int
) -> torch.Tensor | None:
    """Copy the blocks of ``size`` that belong to modalities along an axis, and what follows them."""
    rest = own.shape[axis] - size * len(pairs)
    shape = list(own.shape)
    shape[axis] = size * offered + rest
    if rest < 0 or list(found.shape) != shape:
        return None
    result = own.detach().clone()
    for m, j in pairs.items():
        if j is not None:
            result.narrow(axis, m * size, size).copy_(found.narrow(axis, j * size, size))
    if rest:
        result.narrow(axis, size * len(pairs), rest).copy_(found.narrow(axis, size * offered, rest))
    return result


def _shapes(fusion: FusionDesign, spec: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of a design built anew, None where it cannot be built so."""
    with torch.random.fork_rng(devices=[]):
        try:
            return {key: tuple(tensor.shape) for key, tensor in type(fusion)(spec).state_dict().items()}
        except ValueError:
            return None
