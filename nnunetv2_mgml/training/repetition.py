"""What a run needs to repeat: a seed for every epoch, and PyTorch's deterministic algorithms."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch.backends import cudnn


def seed_epoch(seed: int | None, epoch: int, rank: int) -> None:
    """With a seed, make what follows depend on the seed, the epoch and the rank only."""
    if seed is None:
        return
    own = (seed + 1_000_003 * epoch + 7919 * rank) % 2**32
    np.random.seed(own)
    torch.manual_seed(own)


def make_deterministic() -> None:
    """Switch this process to deterministic algorithms; an operation that has none warns and runs as it is.

    cuBLAS reads its variable when it is first used, so this has to come before the first matrix product on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn.deterministic = True
    cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
