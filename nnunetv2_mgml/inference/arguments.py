"""Arguments of prediction that nnU-Net would only fail at later, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_device(device: str) -> None:
    """Raise unless PyTorch finds the device.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        ValueError: it does not; the message names another.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("-device cuda, but PyTorch finds no CUDA device. Use -device cpu (slow) or mps.")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("-device mps, but PyTorch finds no Apple GPU. Use -device cpu (slow) or cuda.")


def check_step_size(step_size: float) -> None:
    """Raise a ValueError unless a sliding window can move by this share of the patch."""
    if not 0 < step_size <= 1:
        raise ValueError(
            f"-step_size is a share of the patch, above 0 and at most 1, got {step_size:g}. The default is 0.5."
        )


def check_part(part_id: int, num_parts: int) -> None:
    """Raise a ValueError unless there is such a part of so many."""
    if num_parts < 1:
        raise ValueError(f"num_parts must be at least 1, got {num_parts}.")
    if not 0 <= part_id < num_parts:
        raise ValueError(f"part_id must be 0 to {num_parts - 1} with num_parts {num_parts}, got {part_id}.")


def check_processes(preprocessing: int, export: int, num_parts: int) -> None:
    """Raise a ValueError unless nnU-Net's own prediction works with so many worker processes: both kinds, or none."""
    if min(preprocessing, export) < 0 or (preprocessing == 0) != (export == 0):
        raise ValueError(
            f"-npp and -nps are both 1 or more, or both 0 for no worker processes, got {preprocessing} and {export}."
        )
    if preprocessing == 0 and num_parts > 1:
        raise ValueError(
            f"Without worker processes (-npp 0 -nps 0) nnU-Net would predict all {num_parts} parts. Use some."
        )


def check_folds(folds: Sequence[str | int]) -> None:
    """Raise a ValueError unless every fold is a number or ``all``."""
    wrong = [str(fold) for fold in folds if str(fold) != "all" and not str(fold).isdecimal()]
    if wrong:
        raise ValueError(f"-f takes fold numbers (0 1 2) or 'all', got {', '.join(wrong)}.")
