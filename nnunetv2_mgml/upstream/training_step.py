"""One optimisation step as nnU-Net does it, for several optimizers under one gradient scaler.

Bends: ``nnUNetTrainer.train_step``, whose body is repeated in pieces: moving the batch, autocast, gradient scaling and
    clipping, and the NumPy scalar that ``on_train_epoch_end`` stacks.
Why: the stock step knows one network with one output, one loss and one optimizer, and no autocast on a CPU.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

_CLIP_NORM = 12.0  # nnU-Net's


def autocast(device: torch.device, cpu_bfloat16: bool) -> AbstractContextManager[Any]:
    """nnU-Net's autocast on CUDA; bfloat16 on a CPU where ``cpu_bfloat16`` asks for it; else none."""
    if device.type == "cuda":
        return torch.autocast("cuda", enabled=True)
    if device.type == "cpu" and cpu_bfloat16:
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors, and its lists of tensors, on a device; everything else as it is."""

    def move(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    return {
        name: [move(item) for item in value] if isinstance(value, list) else move(value)
        for name, value in batch.items()
    }


def optimise(
    loss: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    network: nn.Module,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Let every optimizer make a step.

    Args:
        loss: scalar, not scaled.
        optimizers: of the network and of whatever else has parameters; one whose parameters were not used in this
            step, which a gradient scaler would refuse, rests.
        network: whose gradients are clipped; the parameters of the other optimizers are not.
        scaler: nnU-Net's, None outside CUDA. Where one gradient is not finite, none of its optimizer's weights moves.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    (loss if scaler is None else scaler.scale(loss)).backward()
    moving = [optimizer for optimizer in optimizers if _has_gradients(optimizer)]
    if scaler is not None:
        for optimizer in moving:
            scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), _CLIP_NORM)
    for optimizer in moving:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    if scaler is not None:
        scaler.update()


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def as_numbers(values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return scalars as Python floats, fetched from the device at once; ``loss`` as the NumPy scalar nnU-Net stacks."""
    fetched = torch.stack([value.detach().float() for value in values.values()]).cpu().numpy()
    return {name: value if name == "loss" else float(value) for name, value in zip(values, fetched, strict=True)}
