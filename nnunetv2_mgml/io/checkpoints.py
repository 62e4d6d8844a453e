"""Checkpoints of others read as data: tensors, numbers and text, never code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch


def numpy_classes() -> list[Any]:
    """Return what NumPy's numbers and arrays in a checkpoint's log are rebuilt with, under old and new names."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdUSO"]
    named = [
        (function, f"numpy.{room}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (rebuild, "_reconstruct"))
        for room in ("core", "_core")
    ]
    return [np.ndarray, np.dtype, *dict.fromkeys(dtypes), *named]


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into memory, on the CPU, without running anything that is stored in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, damaged, or with objects that only running its code would restore.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        with torch.serialization.safe_globals(numpy_classes()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint of weights ({reason}). Give a .pth file of nnU-Net or of this "
            f"plugin that is whole; one that needs code of its own to be read is not opened."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    return content
