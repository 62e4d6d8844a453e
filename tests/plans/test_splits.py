"""Which cases a fold trains on, and which it must not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_mgml.plans.splits import fold_warning, held_out_cases, trains_on_test_cases

CASES = ["a", "b", "c", "d"]
FOLD = {"train": ["a"], "val": ["b"]}


def write(folder: Path, splits: Any = None, test: Any = None) -> Path:
    """Write the two files, each where it is given."""
    for name, content in (("splits_final.json", splits), ("test_cases.json", test)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("fold", [0, 4, "all"])
def test_nnunets_own_default_is_neither_refused_nor_warned_of(tmp_path: Path, fold: int | str) -> None:
    assert trains_on_test_cases(tmp_path, fold, CASES) == ""
    assert fold_warning(tmp_path, fold, CASES) == ""


def test_a_fold_beyond_the_split_file(tmp_path: Path) -> None:
    assert "has folds 0 to 4, not 7: nnU-Net draws 80 % of the 4" in fold_warning(tmp_path, 7, CASES)
    write(tmp_path, [FOLD, FOLD], test=["elsewhere"])  # the test cases of `mgml convert brats` are not preprocessed
    assert held_out_cases(tmp_path, CASES) == []
    for fold, warned in ((0, False), (1, False), (2, True), ("all", False)):
        assert trains_on_test_cases(tmp_path, fold, CASES) == ""
        assert bool(fold_warning(tmp_path, fold, CASES)) is warned
    assert "splits_final.json has folds 0 to 1, not 2" in fold_warning(tmp_path, 2, CASES)


@pytest.mark.parametrize("fold", [1, 9, "all"])
def test_test_cases_that_are_preprocessed_are_not_drawn(tmp_path: Path, fold: int | str) -> None:
    write(tmp_path, [FOLD], test=["d", "c", "elsewhere"])
    assert trains_on_test_cases(tmp_path, 0, CASES) == ""
    assert fold_warning(tmp_path, 0, CASES) == ""
    said = trains_on_test_cases(tmp_path, fold, CASES)
    assert said.startswith(f"Fold {fold} would be drawn from all 4 cases, of which 2 are test cases (c, d), since ")
    assert f"{tmp_path / 'splits_final.json'} has fold 0 only. Train that, or write the split" in said
    assert f"delete {tmp_path / 'test_cases.json'}." in said
    (tmp_path / "splits_final.json").unlink()
    assert "since there is no" in trains_on_test_cases(tmp_path, 0, CASES)
    (tmp_path / "test_cases.json").unlink()
    assert trains_on_test_cases(tmp_path, fold, CASES) == ""


def test_a_split_of_the_users_own_that_names_test_cases(tmp_path: Path) -> None:
    write(tmp_path, [FOLD, {"train": ["a", "c"], "val": ["d"]}], test=["c", "d"])
    assert trains_on_test_cases(tmp_path, 1, CASES) == ""
    assert fold_warning(tmp_path, 1, CASES).endswith("trains on 1 case(s) of test_cases.json: c.")


@pytest.mark.parametrize(("splits", "test"), [([FOLD], {"a": 1}), ({"train": []}, ["a"]), ([{"train": []}], ["a"])])
def test_files_of_another_form(tmp_path: Path, splits: Any, test: Any) -> None:
    write(tmp_path, splits, test)
    with pytest.raises(ValueError, match="must hold a list of"):
        trains_on_test_cases(tmp_path, 0, CASES)
