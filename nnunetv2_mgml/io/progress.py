"""How far an evaluation is: a bar on a terminal, lines in a log file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

Log = Callable[[str], None]
"""Takes one line."""


if TYPE_CHECKING:
    _Bar = tqdm[Any]
else:
    _Bar = tqdm  # generic in its type stubs only


class _Lines(_Bar):
    """A bar that is never drawn and says a line whenever another tenth is done."""

    def __init__(self, outcomes: Iterable[Any] | None, text: str, total: int, log: Log) -> None:
        self._log = log
        self._said = 0
        super().__init__(outcomes, desc=text, total=total, mininterval=0, miniters=1)

    def display(self, *_: Any, **__: Any) -> None:
        """Say how much is done, at most ten times."""
        tenths = int(10 * self.n // self.total) if self.total else 0
        if tenths > self._said:
            self._said = tenths
            self._log(f"{self.desc.removesuffix(': ')}: {self.n} of {self.total} cases")

    def close(self) -> None:
        """Say what is left to say; there is no bar to clear."""
        if not self.disable:
            self.display()
            self.disable = True


def progress_bar(
    outcomes: Iterable[Any] | None, total: int, show: bool, text: str = "Scoring", log: Log | None = None
) -> Any:
    """Wrap an iterable of cases in a bar with the remaining time, or in a log's lines.

    Args:
        outcomes: what to go through; None where the caller counts with ``update()``.
        total: number of cases.
        show: whether to draw the bar.
        text: what is going on.
        log: takes a line per tenth of the cases instead of a bar.
    """
    if log is not None:
        return _Lines(outcomes, text, total, log)
    return tqdm(outcomes, desc=text, total=total, unit="case", disable=not show)
