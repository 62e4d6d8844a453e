"""The network behind the wrappers PyTorch puts around it.

Bends: ``torch._dynamo.OptimizedModule._orig_mod``, a private attribute.
Why: ``torch.compile`` offers no public way back to the module it was given.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def bare(network: nn.Module) -> nn.Module:
    """Return the network without the wrappers of torch.compile and DistributedDataParallel."""
    while (inner := _inside(network)) is not None:
        network = inner
    return network


def _inside(network: nn.Module) -> nn.Module | None:
    """Return what a wrapper holds; None if it is none. Importing the compiler takes as long as PyTorch itself."""
    compiler = sys.modules.get("torch._dynamo")  # imported by whoever compiled a network
    if compiler is not None and isinstance(network, compiler.OptimizedModule):
        inner = network._orig_mod
    elif isinstance(network, DistributedDataParallel):
        inner = network.module
    else:
        return None
    assert isinstance(inner, nn.Module)
    return inner
