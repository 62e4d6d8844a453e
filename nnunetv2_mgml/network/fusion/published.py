"""What every design has in common with its publication and what differs, read off the designs themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from nnunetv2_mgml.network.fusion.base import FusionDesign, fusion_designs


class Published(NamedTuple):
    """One design beside its publication."""

    name: str
    publication: str
    parts: tuple[str, ...]
    """Options that both trainers named after the publication set, as ``name=value`` with a JSON value."""
    alone: tuple[str, ...]
    """Those that the one without MGML sets on top."""
    differences: tuple[str, ...]


def published_designs(designs: Mapping[str, type[FusionDesign]] | None = None) -> list[Published]:
    """Return the designs that stand for a publication, in alphabetical order.

    Args:
        designs: by name; None: all there are.
    """
    found = fusion_designs() if designs is None else designs
    return [
        Published(
            name,
            design.publication,
            _assignments(design.published_options),
            _assignments(design.published_alone),
            design.differences,
        )
        for name, design in sorted(found.items())
        if design.publication
    ]


def _assignments(options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={json.dumps(value)}" for key, value in options.items())


def differences_table(designs: Mapping[str, type[FusionDesign]] | None = None) -> str:
    """Return the table of the documentation, Markdown with one row per design and a line end at the end.

    Args:
        designs: by name; None: all there are.
    """
    rows = [
        f"| `{row.name}` | {row.publication} | {_cell(row)} | {'; '.join(row.differences) or '-'} |"
        for row in published_designs(designs)
    ]
    head = ["| design | published as | its trainers also set | what differs |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def trainers_table(designs: Mapping[str, type[FusionDesign]] | None = None) -> str:
    """Return the table of the trainers named after a publication, Markdown with one row per design and a line end.

    Args:
        designs: by name; None: all there are.
    """
    found = fusion_designs() if designs is None else designs
    rows = [
        f"| `{name}` | `nnUNetTrainer{design.trainer}` | `nnUNetTrainer{design.trainer}_MGML` |"
        for name, design in sorted(found.items())
        if design.trainer
    ]
    return "\n".join(["| design | alone | with MGML |", "|---|---|---|", *rows, ""])


def _cell(row: Published) -> str:
    both = [f"`{part}`" for part in row.parts]
    return "<br>".join([*both, *(f"`{part}` (alone)" for part in row.alone)]) or "-"
