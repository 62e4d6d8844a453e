"""One training by the processes that ``torchrun`` has started, on one node or on several.

Bends: the name ``DDP`` in ``nnunetv2.training.nnUNetTrainer.nnUNetTrainer`` while `process_group` is open, so that a
    network is wrapped for the device it is on; `place` corrects the device and gradient scaler nnU-Net's trainer chose.
Why: nnU-Net starts its processes itself, on one node and on GPUs, and takes the number of a process for its GPU's.
Guarded by: tests/upstream/test_distributed.py, tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as upstream
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether this process is one of several that ``torchrun`` has started."""
    return all(name in os.environ for name in _SET_BY_TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def process_group(arguments: Sequence[str]) -> Iterator[None]:
    """Join the processes of ``torchrun`` for the time of a training; does nothing where it did not start this one.

    Args:
        arguments: those of ``nnUNetv2_train``, of which ``-device`` is read: ``cpu`` talks over gloo, GPUs over NCCL.

    Raises:
        ValueError: ``-num_gpus``, by which nnU-Net would start processes of its own.
    """
    if not launched():
        yield
        return
    if any(argument.split("=")[0] == "-num_gpus" for argument in arguments):
        raise ValueError("torchrun has started the processes (--nproc_per_node); leave -num_gpus out.")
    device = _device("cpu" if "cpu" in arguments or "-device=cpu" in arguments else "cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    stock, upstream.DDP = upstream.DDP, on_own_device
    try:
        yield
    finally:
        upstream.DDP = stock
        distributed.destroy_process_group()


def on_own_device(module: nn.Module, **_: Any) -> DistributedDataParallel:
    """Wrap a module on the device where its parameters are, whatever device is asked for."""
    device = next(module.parameters()).device
    return DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device])


def place(trainer: Any, device: torch.device) -> None:
    """Put a trainer on the device of its process, which nnU-Net's constructor takes to be the GPU of its rank.

    Args:
        trainer: nnU-Net's, just constructed.
        device: as it was asked for.
    """
    if trainer.is_ddp and launched():
        trainer.device = _device(device.type)
        if trainer.device.type == "cpu":
            trainer.grad_scaler = None


def _device(kind: str) -> torch.device:
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, int(os.environ["LOCAL_RANK"]))
