"""The cases nnU-Net's final validation loads, known before they are predicted.

Bends: the trainer's ``dataset_class`` while ``nnUNetTrainer.perform_actual_validation`` runs.
Why: nnU-Net hands its predictor an image without the name of its case; what a case has is known by its name.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@contextmanager
def announcing(trainer: nnUNetTrainer, announce: Callable[[nnUNetBaseDataset, str], None]) -> Iterator[None]:
    """Let data sets of the trainer's class call ``announce(dataset, case)`` before they load a case."""
    stock: type[nnUNetBaseDataset] = trainer.dataset_class
    trainer.dataset_class = _announcing_class(stock, announce)
    try:
        yield
    finally:
        trainer.dataset_class = stock


def _announcing_class(
    stock: type[nnUNetBaseDataset], announce: Callable[[nnUNetBaseDataset, str], None]
) -> type[nnUNetBaseDataset]:
    class Announcing(stock):  # type: ignore[misc]  # nnunetv2 ships no types
        def load_case(self, identifier: str) -> Any:
            of_this_case = stock(self.source_folder, [identifier], self.folder_with_segs_from_previous_stage)
            announce(of_this_case, identifier)
            return super().load_case(identifier)

    return Announcing
