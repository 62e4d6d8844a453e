"""``deterministic``: the settings under which PyTorch repeats a run on the same machine bit by bit, where it can."""

from __future__ import annotations

import os

import torch
from torch.backends import cudnn


def make_deterministic() -> None:
    """Switch this process to deterministic algorithms; an operation that has none warns and runs as it is.

    cuBLAS reads its variable when it is first used, so this has to come before the first matrix product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn.deterministic = True
    cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
