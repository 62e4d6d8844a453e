"""What nnU-Net's planning has written of a data set: plans and dataset.json in nnUNet_preprocessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.plans.folders import PREPROCESSED, dataset_folder

PREPARE = "nnUNetv2_plan_and_preprocess"


def planned_folder(dataset: int | str) -> Path:
    """Return ``nnUNet_preprocessed/DatasetXXX_NAME``.

    Args:
        dataset: id (``137``) or name (``Dataset137_BraTS2021``).

    Raises:
        FileNotFoundError: no such data set there; the message says what makes it.
        ValueError: see `plans.folders.dataset_folder`.
    """
    try:
        return dataset_folder(dataset, PREPROCESSED)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Run {PREPARE} -d {dataset} first.") from error


def read_planned(file: Path) -> dict[str, Any]:
    """Read plans or dataset.json.

    Raises:
        FileNotFoundError: no such file; the message names the plans there are.
        ValueError: no JSON object.
    """
    if not file.is_file():
        present = ", ".join(sorted(path.stem for path in file.parent.glob("*Plans*.json"))) or "none"
        raise FileNotFoundError(f"There is no {file} (plans there: {present}). Run {PREPARE} first.")
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a JSON object. Run {PREPARE} again.")
    return content
