"""Mistakes of users that nnU-Net's own commands tell in one line, without the traceback of its functions.

Bends: ``sys.excepthook`` of a process of an ``nnUNetv2_*`` command.
Why: the commands let every exception through, and the line that helps is lost behind thirty others.
Guarded by: tests/upstream/test_plain_errors.py
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

TRACEBACK_VARIABLE = "MGML_TRACEBACK"
"""Set to 1, it brings the traceback back."""


class PlainError(ValueError):
    """A mistake that a user can mend, with everything needed for that in its message."""


def wants_traceback() -> bool:
    """Whether the user asks for tracebacks, by `TRACEBACK_VARIABLE`."""
    return os.environ.get(TRACEBACK_VARIABLE) == "1"


def tell(error: BaseException) -> None:
    """Print an error as one line, after its traceback where one is asked for."""
    sys.stdout.flush()
    if wants_traceback():
        traceback.print_exception(error)
    sys.stderr.write(f"error: {str(error) or type(error).__name__}\n")


class _Hook:
    """Tells what it knows, and hands everything else to the hook that was there."""

    def __init__(self, before: Callable[..., object]) -> None:
        self.before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, PlainError) or wants_traceback():
            self.before(kind, error, trace)
            return
        tell(error)


def install() -> None:
    """Print a `PlainError` that nobody catches as one line; calling this twice changes nothing."""
    if not isinstance(sys.excepthook, _Hook):
        sys.excepthook = _Hook(sys.excepthook)
