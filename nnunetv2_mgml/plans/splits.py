"""Which cases a fold trains on: nnU-Net's split file, the test cases that a fixed split keeps out of it, and how a
checkpoint knows its training cases again.

A fold that the split file does not have is drawn by nnU-Net at random from all cases there are. Imports neither nnU-Net
nor torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.io.names import some

SPLITS_FILE = "splits_final.json"
TEST_FILE = "test_cases.json"
"""Beside it: the names of the test cases of a fixed split, a list."""
TRAINING_CASES = "training_cases"
"""Key beside our options in a checkpoint's plans; see `cases_digest`."""
_OF_NNUNET = 5
"""Folds that nnU-Net makes where there is no split file."""


def held_out_cases(folder: Path, cases: Collection[str]) -> list[str]:
    """Return the test cases of a fixed split that are among the preprocessed cases, sorted.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.
        cases: names of the preprocessed cases.

    Raises:
        ValueError: the list of test cases is no list of names.
    """
    file = folder / TEST_FILE
    if not file.is_file():
        return []
    names = read_json(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} must hold a list of case names. Write the split again: mgml convert split.")
    return sorted(set(names) & set(cases))


def trains_on_test_cases(folder: Path, fold: int | str, cases: Collection[str]) -> str:
    """Say why a fold must not be trained: it is drawn from all cases, test cases among them; empty where it may.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.
        fold: a number, or ``all``.
        cases: names of the preprocessed cases.

    Raises:
        ValueError: a file that is not what it should be.
    """
    held_out = held_out_cases(folder, cases)
    splits = read_splits(folder)
    if not held_out or _of(splits, fold) is not None:
        return ""
    file = folder / SPLITS_FILE
    has, instead = (f"{file} has {_folds(len(splits))}", "Train that, or w") if splits else (f"there is no {file}", "W")
    return (
        f"Fold {fold} would be drawn from all {len(cases)} cases, of which {len(held_out)} are test cases "
        f"({some(held_out)}), since {has}. {instead}rite the split you want with mgml convert split; to train on test "
        f"cases on purpose, delete {folder / TEST_FILE}."
    )


def fold_warning(folder: Path, fold: int | str, cases: Collection[str]) -> str:
    """Say what is unusual about the cases of a fold that may be trained; empty where nothing is.

    The arguments are those of `trains_on_test_cases`, and what is raised.
    """
    splits = read_splits(folder)
    split = _of(splits, fold)
    if split is not None:
        wrong = sorted(set(held_out_cases(folder, cases)) & set(split["train"]))
        if not wrong:
            return ""
        return f"Fold {fold} of {folder / SPLITS_FILE} trains on {len(wrong)} case(s) of {TEST_FILE}: {some(wrong)}."
    number = _OF_NNUNET if splits is None else len(splits)
    if fold == "all" or int(fold) < number:
        return ""
    return (
        f"{folder / SPLITS_FILE} has {_folds(number)}, not {fold}: nnU-Net draws 80 % of the {len(cases)} cases at "
        f"random, whatever the other folds are."
    )


def read_splits(folder: Path) -> list[dict[str, Any]] | None:
    """Return the folds of the split file, each with lists of ``train`` and ``val``; None where there is no file.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``.

    Raises:
        ValueError: a file that is not what it should be.
    """
    file = folder / SPLITS_FILE
    if not file.is_file():
        return None
    splits = read_json(file)
    if not isinstance(splits, list) or not all(
        isinstance(fold, dict) and all(isinstance(fold.get(part), list) for part in ("train", "val")) for fold in splits
    ):
        raise ValueError(f'{file} must hold a list of folds, {{"train": [...], "val": [...]}} each.')
    return splits


def cases_digest(cases: Collection[str]) -> dict[str, Any]:
    """Return by what a checkpoint knows its training cases again: their number, and a digest that holds no names."""
    names = "\n".join(sorted(cases))
    return {"number": len(cases), "sha256": hashlib.sha256(names.encode()).hexdigest()}


def other_cases(fold: int | str, stored: dict[str, Any] | None, cases: Collection[str]) -> str:
    """Return a sentence where a fold's training cases are not those of its checkpoint; empty where they are, or None.

    Args:
        fold: its number, or ``all``.
        stored: the `cases_digest` in the checkpoint.
        cases: the training cases now.
    """
    if stored is None or stored == cases_digest(cases):
        return ""
    return (
        f"Fold {fold} has other training cases than when its checkpoint was written ({len(cases)} now, "
        f"{stored.get('number')} then), so what it is validated on may be what it was trained on."
    )


def _of(splits: list[dict[str, Any]] | None, fold: int | str) -> dict[str, Any] | None:
    return None if fold == "all" or splits is None or int(fold) >= len(splits) else splits[int(fold)]


def _folds(number: int) -> str:
    return "fold 0 only" if number == 1 else f"folds 0 to {number - 1}"
