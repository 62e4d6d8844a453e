"""What every design has in common with its publication and what differs, read off the designs themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from nnunetv2_mgml.network.fusion.base import FusionDesign, fusion_designs


class Published(NamedTuple):
    """One design beside its publication."""

    name: str
    publication: str
    parts: tuple[str, ...]
    """Options that the trainers named after the publication set, as ``name=value`` with a JSON value."""
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
            tuple(f"{key}={json.dumps(value)}" for key, value in design.published_options.items()),
            design.differences,
        )
        for name, design in sorted(found.items())
        if design.publication
    ]


def differences_table(designs: Mapping[str, type[FusionDesign]] | None = None) -> str:
    """Return the table of the documentation, Markdown with one row per design and a line end at the end.

    Args:
        designs: by name; None: all there are.
    """
    rows = [
        f"| `{row.name}` | {row.publication} | {'<br>'.join(f'`{part}`' for part in row.parts) or '-'} | "
        f"{'; '.join(row.differences) or '-'} |"
        for row in published_designs(designs)
    ]
    head = ["| design | published as | its trainers also set | what differs |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])
