"""PyTorch on shapes without data, counting the bytes that would be alive.

Bends: ``torch._subclasses.fake_tensor.FakeTensorMode``, ``torch.utils._python_dispatch.TorchDispatchMode`` and
    ``torch.utils._pytree``, which are not public.
Why: what a training step needs in memory can be said before anything is trained, without a GPU.
Guarded by: tests/upstream/test_upstream_drift.py, tests/objective/test_memory.py
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from their making to their release.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped there
        self.now = self.peak = 0
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation and count the storages it makes."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if self._known.get(key) is storage:
            return
        self._known[key] = storage
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


@contextmanager
def on_shapes() -> Iterator[LiveBytes]:
    """Make and compute with tensors that have shapes but no data, on the CPU, and count their bytes."""
    live = LiveBytes()
    with FakeTensorMode(), live:
        yield live


def take_shapes(module: nn.Module) -> None:
    """Replace parameters and buffers, inside `on_shapes`; those of the device ``meta`` cost no memory before either."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(part, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
