"""Fixed splits: proportions, patients that stay together, published lists, and an existing dataset."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cohort_cases import write_raw
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.dataset_conversion.discovery import patient
from nnunetv2_mgml.dataset_conversion.resplit import split_dataset
from nnunetv2_mgml.dataset_conversion.splits import (
    PUBLISHED,
    Split,
    parse_ratio,
    published_lists,
    random_split,
    split_from_files,
    write_splits,
)

TRAINING_2020 = [f"BraTS20_Training_{i:03d}" for i in range(1, 370)]


def test_split_of_the_paper_is_exact() -> None:
    split = random_split(TRAINING_2020, parse_ratio("paper2020"))
    assert (len(split.train), len(split.val), len(split.test)) == (219, 50, 100)
    assert sorted(split.train + split.val + split.test) == TRAINING_2020


def test_split_depends_on_the_seed_and_not_on_the_order() -> None:
    ratio = parse_ratio("paper2020")
    split = random_split(TRAINING_2020, ratio, 1)
    assert random_split(TRAINING_2020[::-1], ratio, 1) == split
    assert random_split(TRAINING_2020, ratio, 2) != split
    # A case has no better chance for its number: the mean position of the test cases is that of all.
    positions = [
        np.mean([TRAINING_2020.index(case) for case in random_split(TRAINING_2020, ratio, s).test]) for s in range(30)
    ]
    assert np.mean(positions) == pytest.approx(184, abs=8)


@settings(max_examples=60, deadline=None)
@given(
    visits=st.lists(st.integers(1, 6), min_size=3, max_size=60),
    seed=st.integers(0, 99),
    ratio=st.sampled_from([(219, 50, 100), (7, 1, 2), (1, 1, 1), (4, 1, 0)]),
)
def test_patients_stay_together_and_no_part_is_empty(visits: list[int], seed: int, ratio: tuple[int, ...]) -> None:
    cases = [f"BraTS-GLI-{i:05d}-{100 + v}" for i, count in enumerate(visits) for v in range(count)]
    split = random_split(cases, ratio, seed)
    parts = (split.train, split.val, split.test)
    assert sorted(sum(parts, ())) == cases
    patients = [{patient(case) for case in part} for part in parts]
    assert sum(map(len, patients)) == len(visits)
    assert [bool(part) for part in parts] == [part > 0 for part in ratio]
    if set(visits) == {1}:
        for part, share in zip(parts, ratio, strict=True):
            assert abs(len(part) - len(cases) * share / sum(ratio)) <= 2


@pytest.mark.parametrize(
    ("text", "ratio"),
    [
        ("7:1:2", (7, 1, 2)),
        ("ratio 4:1", (4, 1, 0)),
        ("ratio:3:1:1", (3, 1, 1)),
        ("paper2023", (7, 1, 2)),
        ("paper2020", (219, 50, 100)),
    ],
)
def test_ratios(text: str, ratio: tuple[int, ...]) -> None:
    assert parse_ratio(text) == ratio


@pytest.mark.parametrize("text", ["paper2021", "7", "0:1:1", "1:0:1", "a:b:c", "7:1:2:3"])
def test_bad_ratios(text: str) -> None:
    with pytest.raises(ValueError, match=r"Allowed: paper2020, paper2023, .*or train:validation:test"):
        parse_ratio(text)


def test_too_few_cases() -> None:
    with pytest.raises(ValueError, match=r"2 patient\(s\) cannot be split into 3 parts"):
        random_split(["a", "b"], (7, 1, 2))


def _lists(folder: Path, *contents: str) -> list[Path]:
    paths = [folder / name for name in ("train.txt", "val.txt", "test.txt")][: len(contents)]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def test_published_lists(tmp_path: Path) -> None:
    known = ["Brats18_2013_1_1", "Brats18_2013_11_1", "BraTS20_Training_001", "BraTS-GLI-00000-000", "Extra_1"]
    files = _lists(
        tmp_path,
        "\ufeffHGG_Brats18_2013_11_1_vol.npy\r\n\r\n# a remark\n",
        "vol/LGG/Brats18_2013_1_1/\n",
        "BraTS20_Training_001  # odd\nBRATS\\BraTS-GLI-00000-000-t1c.nii.gz",
    )
    split, left_out = split_from_files(known, files)
    assert split == Split(
        ("Brats18_2013_11_1",), ("Brats18_2013_1_1",), ("BraTS-GLI-00000-000", "BraTS20_Training_001")
    )
    assert left_out == ("Extra_1",)


def test_all_unknown_names_are_listed(tmp_path: Path) -> None:
    files = _lists(tmp_path, "A\nBraTS_9\n", "B\nC_vol.npy\n")
    with pytest.raises(ValueError, match=r"2 name\(s\) .* BraTS_9 \(train.txt\), C_vol.npy \(val.txt\)"):
        split_from_files(["A", "B"], files)


def test_of_many_names_the_first_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^366 name\(s\) .*, rfnet_9 \(train.txt\) and 356 more\.$"):
        split_from_files(["A", "B"], _lists(tmp_path, "\n".join(f"rfnet_{i}" for i in range(366)), "B"))
    twice = "\n".join(f"case_{i:03d}" for i in range(20))
    with pytest.raises(ValueError, match=r"^20 case\(s\) named more than once .* case_009 and 10 more\.$"):
        split_from_files(twice.split(), _lists(tmp_path, twice, twice))


def test_ambiguous_names_are_refused(tmp_path: Path) -> None:
    files = _lists(tmp_path, "HGG_A\n", "B")
    with pytest.raises(ValueError, match=r"HGG_A \(train.txt\)"):
        split_from_files(["A", "HGG_A", "B"], files)


def test_other_mistakes_in_lists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"named more than once .* A"):
        split_from_files(["A", "B"], _lists(tmp_path, "A\n", "B\nA\n"))
    with pytest.raises(ValueError, match="must not be empty"):
        split_from_files(["A", "B"], _lists(tmp_path, "A\nB", ""))
    with pytest.raises(ValueError, match="got 1 file"):
        split_from_files(["A", "B"], _lists(tmp_path, "A\nB"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        split_from_files(["A", "B"], [tmp_path / "none.txt", tmp_path / "train.txt"])


def test_another_split_is_not_replaced_unasked(tmp_path: Path) -> None:
    first, second = Split(("a",), ("b",), ("c",)), Split(("b",), ("a",), ())
    path = write_splits(first, tmp_path / "new", overwrite=False)
    assert write_splits(first, tmp_path / "new", overwrite=False) == path
    with pytest.raises(ValueError, match="Give --overwrite"):
        write_splits(second, tmp_path / "new", overwrite=False)
    assert json.loads(path.read_text()) == [{"train": ["a"], "val": ["b"]}]
    path.write_text('[{"train": ["a"')
    with pytest.raises(ValueError, match=r"splits_final\.json is not valid JSON"):
        write_splits(second, tmp_path / "new", overwrite=False)
    write_splits(second, tmp_path / "new", overwrite=True)
    assert json.loads(path.read_text()) == [{"train": ["b"], "val": ["a"]}]
    assert sorted(p.name for p in path.parent.iterdir()) == ["splits_final.json", "test_cases.json"]


def _raw_dataset(folder: Path, count: int) -> Path:
    raw = folder / "raw" / "Dataset137_BraTS2021"
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    for i in range(count):
        (raw / "labelsTr" / f"case_{i}.nii.gz").write_text(str(i))
        for channel in range(4):
            (raw / "imagesTr" / f"case_{i}_{channel:04d}.nii.gz").write_text(f"{i} {channel}")
    return raw


def test_split_of_an_existing_dataset(nnunet_folders: Path) -> None:
    raw = _raw_dataset(nnunet_folders, 12)
    split, path = split_dataset(137, split="7:1:2")
    assert path == nnunet_folders / "preprocessed" / "Dataset137_BraTS2021" / "splits_final.json"
    assert json.loads(path.read_text()) == [{"train": list(split.train), "val": list(split.val)}]
    assert len(split.test) == 2
    assert sorted(p.name for p in (raw / "labelsTs").iterdir()) == [f"{case}.nii.gz" for case in split.test]
    assert len(list((raw / "imagesTs").iterdir())) == 8
    for link in (raw / "imagesTs").iterdir():
        assert link.read_text() == (raw / "imagesTr" / link.name).read_text()
    other, _ = split_dataset(137, split="7:1:2", seed=4, overwrite=True)
    assert other.test != split.test
    assert sorted(p.name for p in (raw / "labelsTs").iterdir()) == [f"{case}.nii.gz" for case in other.test]
    assert len(list((raw / "imagesTr").iterdir())) == 48


def test_names_with_brackets_are_linked_as_they_are(nnunet_folders: Path) -> None:
    raw = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", cases=("p[1]", "p[2]", "p[3]"))
    split, _ = split_dataset(45, split="1:1:1")
    links = sorted(path.name for path in raw.glob("*Ts/*"))
    assert links == sorted([f"{split.test[0]}.nii.gz", *(f"{split.test[0]}_{c:04d}.nii.gz" for c in range(3))])


def test_a_later_split_keeps_patients_together_and_any_format(nnunet_folders: Path) -> None:
    """By the numbers that a conversion from a sheet has written, where names tell nothing."""
    cases = [f"x{i}" for i in range(8)]
    raw = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", cases=cases)
    (raw / "case_patients.json").write_text(json.dumps({case: str(i // 2) for i, case in enumerate(cases)}))
    for seed in range(5):
        split, _ = split_dataset(45, split="2:1:1", seed=seed, overwrite=True)
        parts = [{cases.index(case) // 2 for case in part} for part in (split.train, split.val, split.test)]
        assert [len(part) for part in parts] == [2, 1, 1]
    for path in [*raw.glob("*Tr/*.nii.gz")]:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**description, "file_ending": ".mha"}))
    split, _ = split_dataset(45, split="2:1:1", seed=0, overwrite=True)
    assert {path.name for path in (raw / "labelsTs").iterdir()} >= {f"{case}.mha" for case in split.test}
    (raw / "dataset.json").write_text(json.dumps({**description, "dataset": {}}))
    with pytest.raises(ValueError, match="lists its files, so no test cases can be taken out"):
        split_dataset(45, split="2:1:1", overwrite=True)


def test_split_of_no_dataset(nnunet_folders: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no dataset 137 in nnUNet_raw .*datasets there: none"):
        split_dataset(137, split="7:1:2")
    with pytest.raises(ValueError, match="either --split or --split_files"):
        split_dataset(137)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("rfnet2020", (219, 50, 100)),
        *((f"rfnet2018-{i}", (199, 29, 57)) for i in (1, 2, 3)),
        ("imfuse2023", (875, 125, 251)),
    ],
)
def test_published_splits(name: str, counts: tuple[int, ...]) -> None:
    """Their lists are whole and name no case twice; data that lacks some of them is refused with their names."""
    assert name in PUBLISHED
    files = published_lists(name)
    parts = [[line for line in file.read_text().splitlines() if not line.startswith("#")] for file in files]
    assert tuple(map(len, parts)) == counts
    cases = [case for part in parts for case in part]
    assert len(set(cases)) == sum(counts)
    assert all(file.read_text().startswith("# BraTS 20") for file in files), "each list says where it comes from"
    split, left_out = split_from_files([*cases, "another"], files)
    assert (split.train, split.val, split.test) == tuple(tuple(sorted(part)) for part in parts)
    assert left_out == ("another",)
    with pytest.raises(ValueError, match=rf"1 name\(s\) in the split lists are no case of this data: {cases[0]} "):
        split_from_files(cases[1:], files)


def test_the_published_split_of_2020_is_all_its_training_cases() -> None:
    split, left_out = split_from_files(TRAINING_2020, published_lists("rfnet2020"))
    assert left_out == ()
    assert sorted(split.train + split.val + split.test) == TRAINING_2020


def test_a_dataset_gets_a_published_split_by_name(nnunet_folders: Path) -> None:
    labels = nnunet_folders / "raw" / "Dataset137_BraTS2020" / "labelsTr"
    labels.mkdir(parents=True)
    for case in TRAINING_2020:
        (labels / f"{case}.nii.gz").touch()
    split, path = split_dataset(137, split="rfnet2020")
    assert split_from_files(TRAINING_2020, published_lists("rfnet2020"))[0] == split
    assert json.loads(path.read_text())[0]["val"] == list(split.val)
    (labels / "BraTS20_Training_005.nii.gz").unlink()
    with pytest.raises(ValueError, match="no case of this data: BraTS20_Training_005"):
        split_dataset(137, split="rfnet2020", overwrite=True)
