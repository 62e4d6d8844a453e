"""A list of layers that says of what kind they are, which `torch.nn.ModuleList` cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, cast, overload

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)
_Layer = TypeVar("_Layer", bound=nn.Module, covariant=True)


class Layers(Protocol[_Layer]):
    """What is used of a `torch.nn.ModuleList` whose members are all of one kind."""

    @overload
    def __getitem__(self, index: int) -> _Layer: ...

    @overload
    def __getitem__(self, index: slice) -> Layers[_Layer]: ...

    def __iter__(self) -> Iterator[_Layer]:
        """Iterate over the layers."""

    def __len__(self) -> int:
        """Return how many there are."""


def layers(modules: Iterable[Layer]) -> Layers[Layer]:
    """Return the modules as a `torch.nn.ModuleList`."""
    return cast("Layers[Layer]", nn.ModuleList(modules))
