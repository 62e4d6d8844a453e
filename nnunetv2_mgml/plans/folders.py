"""nnU-Net's folders and dataset names, read from the environment without importing nnU-Net (and with it torch)."""

from __future__ import annotations

import os
import re
from pathlib import Path

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"


def nnunet_folder(variable: str) -> Path:
    """Return the folder an nnU-Net environment variable names (it need not exist yet).

    Raises:
        ValueError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"{variable} is not set. nnU-Net finds its data through it: export {variable}=/path/to/folder")
    return Path(value).expanduser().absolute()


def dataset_folder_name(dataset_id: int, name: str) -> str:
    """Return ``DatasetXXX_NAME``.

    Raises:
        ValueError: an id outside 1 to 999, or a name with characters other than letters, digits, ``_``, ``-``.
    """
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"Dataset id {dataset_id} is out of range; nnU-Net uses three digits: 1 to 999.")
    if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
        raise ValueError(f"Dataset name '{name}' may only have letters, digits, '_' and '-'.")
    return f"Dataset{dataset_id:03d}_{name}"


def names_in_use(dataset_id: int) -> dict[str, Path]:
    """Return every folder name that nnU-Net would associate with an id -> one place where it was found."""
    found: dict[str, Path] = {}
    for variable in (RESULTS, PREPROCESSED, RAW):
        folder = Path(os.environ[variable]) if os.environ.get(variable) else None
        if folder is not None and folder.is_dir():
            found.update({path.name: folder for path in folder.glob(f"Dataset{dataset_id:03d}*") if path.is_dir()})
    return found
