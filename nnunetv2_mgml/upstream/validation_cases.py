"""nnU-Net's final validation, which says of each case that it comes next.

Bends: ``nnUNetTrainer.dataset_class``, while ``perform_actual_validation`` runs: the class it reads its cases through.
Why: the validation loads and predicts case by case inside one function, and the network has to be told of each what it
    has.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

Announce = Callable[[nnUNetBaseDataset, str], None]
"""Called with the data set and the name of a case before it is loaded."""


@contextmanager
def announced_cases(trainer: nnUNetTrainer, announce: Announce) -> Iterator[None]:
    """Have ``announce`` called before the trainer loads a case of its final validation."""
    stock_class = trainer.dataset_class
    trainer.dataset_class = announcing(stock_class, announce)
    try:
        yield
    finally:
        trainer.dataset_class = stock_class


def announcing(dataset_class: type[nnUNetBaseDataset], announce: Announce) -> type[nnUNetBaseDataset]:
    """Return a dataset class that calls ``announce(dataset, case)`` before it loads a case."""

    class Announcing(dataset_class):  # type: ignore[misc]  # nnunetv2 ships no types
        def load_case(self, identifier: str) -> Any:
            stock = dataset_class(self.source_folder, [identifier], self.folder_with_segs_from_previous_stage)
            announce(stock, identifier)
            return super().load_case(identifier)

    return Announcing
