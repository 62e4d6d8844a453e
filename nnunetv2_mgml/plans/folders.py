"""nnU-Net's folders and the data sets in them, from the environment alone (imports neither nnU-Net nor torch)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
VARIABLES = (RAW, PREPROCESSED, RESULTS)


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


def names_in_use(dataset_id: int, variables: Sequence[str] = VARIABLES) -> dict[str, Path]:
    """Return every folder name that nnU-Net would associate with an id -> one place where it was found.

    Args:
        dataset_id: for example 137.
        variables: the folders to look into; those that are not set or do not exist hold nothing.
    """
    return {path.name: path.parent for path in _folders(f"Dataset{dataset_id:03d}*", variables)}


def dataset_name(dataset: int | str, variables: Sequence[str] = VARIABLES) -> str:
    """Return the name of a data set, ``DatasetXXX_NAME``.

    Args:
        dataset: its id (137 or ``"137"``) or its name.
        variables: the folders it may be in.

    Raises:
        ValueError: neither an id nor a name, or an id that several data sets have.
        FileNotFoundError: no such data set; the message names those there are.
    """
    text = str(dataset)
    if text.isdigit():
        names = sorted(names_in_use(int(text), variables))
    elif text.startswith("Dataset"):
        names = sorted({path.name for path in _folders("Dataset*", variables)} & {text})
    else:
        raise ValueError(f"'{text}' is neither a dataset id (137) nor a name (Dataset137_BraTS2021).")
    if len(names) > 1:
        raise ValueError(
            f"Dataset id {text} has several names: {', '.join(names)}. Give the name, or remove all but one."
        )
    if not names:
        known = ", ".join(sorted({path.name for path in _folders("Dataset*", variables)})) or "none"
        where = ", ".join(f"{variable} ({os.environ.get(variable) or 'not set'})" for variable in variables)
        raise FileNotFoundError(f"There is no dataset {text} in {where}; datasets there: {known}.")
    return names[0]


def dataset_folder(dataset: int | str, variable: str) -> Path:
    """Return the folder of a data set that one of nnU-Net's variables leads to.

    Raises:
        ValueError, FileNotFoundError: as `nnunet_folder` and `dataset_name`.
    """
    return nnunet_folder(variable) / dataset_name(dataset, (variable,))


def _folders(pattern: str, variables: Sequence[str]) -> list[Path]:
    roots = [Path(value).expanduser() for variable in variables if (value := os.environ.get(variable))]
    return [path for root in reversed(roots) for path in sorted(root.glob(pattern)) if path.is_dir()]
