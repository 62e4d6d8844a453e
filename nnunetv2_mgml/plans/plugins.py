"""What other installed packages add to ours, found by their entry points: fusion designs, loss terms.

They are imported when first asked for. One that cannot be used is reported and left out; all others still work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")
_log = logging.getLogger(__name__)


def load_plugins(group: str, kind: str, accept: Callable[[Any], Any], registry: dict[K, V]) -> list[str]:
    """Hand to ``accept``, which may raise, what each entry point of a group names.

    Args:
        group: of entry points.
        kind: what they are, for messages ("Fusion design").
        accept: puts one into the registry.
        registry: what a package put there before it turned out to be broken is taken out again.

    Returns:
        What is wrong, one sentence per entry point that could not be used; also logged as warnings.
    """
    problems = []
    for point in entry_points(group=group):
        before = dict(registry)
        try:
            accept(point.load())
        except Exception as error:  # other people's code: anything may be raised
            registry.clear()
            registry.update(before)
            problems.append(_problem(point, kind, error))
    for problem in problems:
        _log.warning(problem)
    return problems


def _problem(point: EntryPoint, kind: str, error: Exception) -> str:
    package = "an unknown package" if point.dist is None else point.dist.name
    return (
        f"{kind} '{point.name}' of {package} cannot be used: {type(error).__name__}: {error}. Mend or uninstall "
        f"{package} (entry point {point.value} in group {point.group})."
    )
