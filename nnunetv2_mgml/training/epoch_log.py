"""One CSV row per epoch, beside nnU-Net's own log: every loss term, the meta-parameters, pseudo Dice per region."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import distributed as dist

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
        with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def read_log(path: str | os.PathLike[str]) -> list[Row]:
    """Read a log; empty cells are left out.

    Raises:
        FileNotFoundError: no such file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value not in ("", None)}
            for row in csv.DictReader(file)
        ]


def epoch_row(epoch: int, learning_rate: float, means: Row, logger: Any, regions: Sequence[str]) -> Row:
    """Return an epoch's row, in the order of its columns.

    Args:
        epoch: from 0.
        learning_rate: of the network.
        means: what `TrainingLog.means` returned, over all ranks.
        logger: nnU-Net's, which holds this epoch's losses and pseudo Dice.
        regions: names in the order of nnU-Net's pseudo Dice, see `region_names`.
    """
    row = {"epoch": epoch, "lr": learning_rate, **means}
    row["train_total"] = float(logger.get_value("train_losses", step=-1))
    row["val_loss"] = float(logger.get_value("val_losses", step=-1))
    for name, dice in zip(regions, logger.get_value("dice_per_class_or_region", step=-1), strict=True):
        row[f"pseudo_dice_{name}"] = float(dice)
    row["pseudo_dice_mean"] = float(logger.get_value("mean_fg_dice", step=-1))
    return row


def tell_loggers(logger: Any, row: Row) -> None:
    """Give an epoch's row to every logger behind nnU-Net's (Weights & Biases, say), as ``mgml/COLUMN``.

    nnU-Net's own local one takes its own values only.

    Args:
        logger: nnU-Net's ``MetaLogger`` of this process.
        row: as `epoch_row` returns it.
    """
    for other in logger.loggers:
        for name, value in row.items():
            if name != "epoch":
                other.log(f"mgml/{name}", value, int(row["epoch"]))


def region_names(dataset_json: Mapping[str, Any], label_manager: LabelManager) -> list[str]:
    """Return the names of the regions, or of the foreground labels, in the order of nnU-Net's pseudo Dice."""
    labels = dataset_json["labels"]
    names = [name for name in labels if name not in ("background", "ignore")]
    if not label_manager.has_regions:  # by label value; regions keep the order of dataset.json
        names.sort(key=lambda name: np.max(labels[name]))
    return [name.replace(" ", "_") for name in names]


def mean_over_ranks(values: Row, is_ddp: bool) -> Row:
    """Return the mean of every value over the processes of a distributed training."""
    if not is_ddp:
        return values
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return {name: float(np.mean([rank[name] for rank in gathered])) for name in values}
