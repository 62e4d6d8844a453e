"""``-pretrained_weights`` of nnU-Net's training, for networks that take weights in their own way.

Bends: the name ``load_pretrained_weights`` in ``nnunetv2.run.run_training``, once a trainer of ours is initialised.
Why: nnU-Net's function wants every tensor of the network in the file, under the same name and of the same shape, and
    knows nothing of modalities: the encoder of T1 would be loaded where FLAIR is. All other networks are left to it.
Guarded by: tests/upstream/test_upstream_drift.py, tests/training/test_warm_start.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from nnunetv2.run import run_training
from torch import nn

from nnunetv2_mgml.upstream.wrappers import bare

_stock = run_training.load_pretrained_weights
_takers: WeakKeyDictionary[nn.Module, WeakMethod[Callable[[str], None]]] = WeakKeyDictionary()


def let_take(network: nn.Module, take: Callable[[str], None]) -> None:
    """Have a network handed to ``take`` instead, whenever nnU-Net loads pretrained weights into it.

    Args:
        network: wrapped or not.
        take: a bound method, given the file of ``-pretrained_weights``; it is not kept alive.
    """
    _takers[bare(network)] = WeakMethod(take)
    run_training.load_pretrained_weights = load_pretrained_weights


def load_pretrained_weights(network: nn.Module, fname: str, *args: Any, **kwargs: Any) -> None:
    """Stand for nnU-Net's function of this name."""
    reference = _takers.get(bare(network))
    take = None if reference is None else reference()
    if take is None:
        _stock(network, fname, *args, **kwargs)
    else:
        take(fname)
