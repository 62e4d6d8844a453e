"""Checkpoints are loaded as data: weights, numbers and text, no code.

Bends: ``torch.load`` inside nnU-Net's loading of models and checkpoints, which unpickles whatever a file holds; here
    PyTorch's own switch ``TORCH_FORCE_WEIGHTS_ONLY_LOAD`` and its list of safe classes are set while it loads.
Why: a checkpoint of a stranger would otherwise be a program that is run.
Guarded by: tests/upstream/test_checkpoints.py
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRUST_VARIABLE = "MGML_TRUST_CHECKPOINT"
"""Environment variable: ``1`` loads checkpoints as programs, also where no flag can be given (``nnUNetv2_train``)."""
TRUST_FLAG = "--trust_checkpoint"
"""The flag of the commands that predict."""
_FORCE, _NEVER = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def trusted(trust: bool = False) -> bool:
    """Return whether the user trusts checkpoints: by an argument, or by `TRUST_VARIABLE`."""
    return trust or os.environ.get(TRUST_VARIABLE, "").lower() in ("1", "true", "yes", "y", "t")


@contextmanager
def loading(file: str | os.PathLike[str], trust: bool = False, *, flag: bool = True) -> Iterator[None]:
    """Let ``torch.load``, whoever calls it and however, read data only.

    Args:
        file: what is loaded, a checkpoint or a model folder; named in errors.
        trust: let it run the code in the file, as nnU-Net itself does.
        flag: whether errors may advise `TRUST_FLAG`; the commands that train have `TRUST_VARIABLE` only.

    Raises:
        ValueError: the file holds more than data, or cannot be read; the message says what to do.
    """
    try:
        if trusted(trust):
            yield
            return
        own = {name: os.environ.pop(name, None) for name in (_FORCE, _NEVER)}
        os.environ[_FORCE] = "1"
        try:
            with torch.serialization.safe_globals(_numpy_classes()):
                yield
        finally:
            for name, value in own.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
    except (pickle.UnpicklingError, EOFError) as error:
        raise _refusal(file, error, flag) from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error) and "Weights only" not in str(error):
            raise
        raise _refusal(file, error, flag) from error


def load_checkpoint(
    file: str | os.PathLike[str], trust: bool = False, *, mmap: bool = False, flag: bool = True
) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net or ours onto the CPU.

    Args:
        file: the checkpoint.
        trust: see `loading`.
        mmap: leave the tensors on the disk until they are used.
        flag: see `loading`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see `loading`, or no checkpoint of nnU-Net.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{os.fspath(file)} does not exist.")
    _refuse_other_formats(file)
    on_disk = mmap and zipfile.is_zipfile(file)  # the old format has to be read
    with loading(file, trust, flag=flag), _whole(file):
        content = torch.load(file, map_location="cpu", weights_only=not trusted(trust), mmap=on_disk)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{os.fspath(file)} is no checkpoint of nnU-Net: it holds a {type(content).__name__}.")
    return content


def _refuse_other_formats(file: str | os.PathLike[str]) -> None:
    """Raise a ValueError where a file cannot be what ``torch.save`` wrote: text, an image, an archive of a model."""
    with open(file, "rb") as opened:
        start = opened.read(262)
    # a zip, also one that is cut off, a pickle of an old PyTorch, or the tar of a very old one
    known = not start or start[:2] == b"PK" or start[:1] == b"\x80" or start[257:] == b"ustar"
    if not known or (zipfile.is_zipfile(file) and not _holds_pickle(file)):
        raise ValueError(
            f"{os.fspath(file)} is no PyTorch checkpoint. Give one that nnU-Net, this plugin or nnU-Net's pretraining "
            f"wrote, such as fold_0/checkpoint_final.pth."
        )


def _holds_pickle(archive: str | os.PathLike[str]) -> bool:
    try:
        with zipfile.ZipFile(archive) as opened:
            return any(name.endswith("/data.pkl") for name in opened.namelist())
    except zipfile.BadZipFile:  # damaged, which PyTorch will say
        return True


@contextmanager
def _whole(file: str | os.PathLike[str]) -> Iterator[None]:
    """Take whatever else ``torch.load`` raises for a file that is damaged."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError, MemoryError):  # told apart by `loading`
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise _damaged(file, f"{type(error).__name__}: {error}") from error


def _numpy_classes() -> list[Any]:
    """Return what NumPy's numbers and arrays in a checkpoint's log are rebuilt with, under old and new names."""
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    dtypes = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdUSO"]
    named = [
        (function, f"numpy.{room}.multiarray.{name}")
        for function, name in ((scalar, "scalar"), (rebuild, "_reconstruct"))
        for room in ("core", "_core")
    ]
    return [np.ndarray, np.dtype, *dict.fromkeys(dtypes), *named]


def _refusal(file: str | os.PathLike[str], error: Exception, flag: bool) -> ValueError:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    found = re.search(r"GLOBAL ([\w.]+)|(?:class|Trying to \w+|Can only build) ([\w.]+\.[\w.]+)", text)
    if "Weights only" in text or "weights_only" in text:
        what = f" ({next(filter(None, found.groups()))})" if found else ""
        fix = f"give {TRUST_FLAG} (trust_checkpoint=True in Python)" if flag else f"set {TRUST_VARIABLE}=1"
        return ValueError(
            f"{os.fspath(file)} holds more than weights, numbers and text{what}; loading it would run code of whoever "
            f"made it. If you trust them as you would trust a program of theirs, {fix}."
        )
    return _damaged(file, (text.strip().splitlines() or [type(error).__name__])[0])


def _damaged(file: str | os.PathLike[str], reason: str) -> ValueError:
    return ValueError(f"{os.fspath(file)} cannot be read ({reason.split('. ')[0]}). Is the file damaged or cut off?")
