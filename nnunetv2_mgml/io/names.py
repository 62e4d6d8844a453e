"""Lists of names in messages: a data set may have thousands of cases, a line of a terminal does not show them."""

from __future__ import annotations

from collections.abc import Iterable

NAMES_SHOWN = 10


def some(names: Iterable[object], shown: int = NAMES_SHOWN) -> str:
    """Return the first names, and how many more there are: ``a, b and 364 more``.

    Args:
        names: cases, files or folders; anything that can be printed.
        shown: how many of them are named.
    """
    texts = [str(name) for name in names]
    rest = len(texts) - shown
    return ", ".join(texts[:shown]) + (f" and {rest} more" if rest > 0 else "")
