"""Where random layers (dropout, sampling) act: in training, with gradients, outside the teacher's pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_silent = False


def random_layers_act(training: bool) -> bool:
    """Return whether a layer that draws random numbers may do so now.

    Args:
        training: the layer's ``training`` flag.
    """
    return training and torch.is_grad_enabled() and not _silent


@contextmanager
def silence() -> Iterator[None]:
    """Switch random layers off: the teacher's prediction (eq. 9) is a target, also where it learns itself."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before
