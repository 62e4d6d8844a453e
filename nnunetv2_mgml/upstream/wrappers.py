"""The network behind the wrappers PyTorch puts around it.

Bends: ``torch._dynamo.OptimizedModule._orig_mod``, a private attribute.
Why: ``torch.compile`` offers no public way back to the module it was given.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def bare(network: nn.Module) -> nn.Module:
    """Return the network without the wrappers of torch.compile and DistributedDataParallel."""
    while isinstance(network, (OptimizedModule, DistributedDataParallel)):
        inner = network._orig_mod if isinstance(network, OptimizedModule) else network.module
        assert isinstance(inner, nn.Module)
        network = inner
    return network
