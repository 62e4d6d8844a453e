"""Where random layers (dropout, sampling) act: in training, with gradients, outside the teacher's pass.

The teacher of the published code is noisy: `noise` lets them act in its pass too, which has no gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_silent = False
_noisy = False


def random_layers_act(training: bool) -> bool:
    """Return whether a layer that draws random numbers may do so now.

    Args:
        training: the layer's ``training`` flag.
    """
    return training and (_noisy or torch.is_grad_enabled()) and not _silent


@contextmanager
def silence() -> Iterator[None]:
    """Switch random layers off: the teacher's prediction (eq. 9) is a target, also where it learns itself."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


@contextmanager
def noise() -> Iterator[None]:
    """Let random layers act without gradients as well."""
    global _noisy
    before, _noisy = _noisy, True
    try:
        yield
    finally:
        _noisy = before
