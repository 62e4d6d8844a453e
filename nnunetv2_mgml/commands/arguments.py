"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_mgml.scoring.sources import PredictionFolders


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Add ``--trust_checkpoint``."""
    parser.add_argument(
        "--trust_checkpoint",
        action="store_true",
        help="let the model folder run code, as nnU-Net does: only for models of people whose programs you would run",
    )


def parse_predictions(entries: Sequence[str]) -> PredictionFolders:
    """Parse ``--predictions``: one root whose folders are named by subset, or ``SUBSET=FOLDER`` entries.

    Raises:
        ValueError: an entry of another form, or a subset given twice.
    """
    if len(entries) == 1 and "=" not in entries[0]:
        return Path(entries[0])
    folders: dict[str, Path] = {}
    for entry in entries:
        subset, separator, folder = entry.partition("=")
        if not separator or not folder:
            raise ValueError(f"'{entry}' is not of the form SUBSET=FOLDER, for example t1+flair=/data/predictions.")
        if subset in folders:
            raise ValueError(f"Subset {subset} is given twice: {folders[subset]} and {folder}.")
        folders[subset] = Path(folder)
    return folders
