"""Whether a training of this process has begun: what fails before is a mistake in what it was asked for.

Bends: ``on_epoch_start`` and ``perform_actual_validation`` of ``nnUNetTrainer``, while `noticed` is open.
Why: nnU-Net's command raises the same kinds of errors for a wrong argument and, hours later, for a fault.
Guarded by: tests/upstream/test_first_epoch.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

_STEPS = ("on_epoch_start", "perform_actual_validation")


@dataclass
class Progress:
    """What `noticed` has seen so far."""

    begun: bool = False
    """The first epoch, or the validation of a finished training, has started."""


@contextmanager
def noticed() -> Iterator[Progress]:
    """Watch the trainings of this process; those of processes it starts are not seen."""
    progress = Progress()
    stock = {name: getattr(nnUNetTrainer, name) for name in _STEPS}

    def announcing(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def announced(self: Any, *args: Any, **kwargs: Any) -> Any:
            progress.begun = True
            return step(self, *args, **kwargs)

        return announced

    for name, step in stock.items():
        setattr(nnUNetTrainer, name, announcing(step))
    try:
        yield progress
    finally:
        for name, step in stock.items():
            setattr(nnUNetTrainer, name, step)
