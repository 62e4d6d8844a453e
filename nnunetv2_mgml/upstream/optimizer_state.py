"""A checkpoint's optimizer, left out while nnU-Net loads the rest.

Bends: the trainer's ``optimizer`` while ``nnUNetTrainer.load_checkpoint`` runs, which loads its state in any case.
Why: to validate again needs the weights only, and the state of another kind of optimizer does not fit.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@contextmanager
def without_optimizer_state(trainer: nnUNetTrainer) -> Iterator[None]:
    """Let nnU-Net load a checkpoint whose optimizer is of another kind; the trainer keeps its own as it is."""
    own, trainer.optimizer = trainer.optimizer, SimpleNamespace(load_state_dict=lambda _: None)
    try:
        yield
    finally:
        trainer.optimizer = own
