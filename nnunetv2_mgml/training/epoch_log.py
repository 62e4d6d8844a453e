"""One CSV row per epoch, beside nnU-Net's own log: every loss term, the meta-parameters, pseudo Dice per region."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from nnunetv2_mgml.io.files import replacing

LOG_NAME = "mgml_training_log.csv"
Row = dict[str, float]


class TrainingLog:
    """Collects values during an epoch and rewrites the CSV at its end (temporary file, then rename).

    Args:
        folder: nnU-Net's fold folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / LOG_NAME
        self.rows: list[Row] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)

    def resume(self, next_epoch: int) -> None:
        """Read the rows of the epochs before ``next_epoch``; later ones (of an interrupted run) are dropped."""
        if self.path.is_file():
            self.rows = [row for row in read_log(self.path) if row["epoch"] < next_epoch]

    def add(self, values: Mapping[str, float]) -> None:
        """Add one step's values; the epoch's row holds their means."""
        for name, value in values.items():
            self._sums[name] += float(value)
            self._counts[name] += 1

    def means(self) -> Row:
        """Return the means of what was added since the last `end_epoch`."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def end_epoch(self, row: Row, write: bool = True) -> None:
        """Append a row, forget the collected values and, where ``write``, rewrite the file."""
        self._sums.clear()
        self._counts.clear()
        self.rows.append(row)
        if write:
            self._write()

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def read_log(path: str | os.PathLike[str]) -> list[Row]:
    """Read a log; empty cells are left out.

    Raises:
        FileNotFoundError: no such file.
    """
    with open(path, newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(file)
        ]
