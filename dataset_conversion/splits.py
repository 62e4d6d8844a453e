"""Fixed train / validation / test splits: drawn at random by proportion, or read from published lists."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_mgml.dataset_conversion.discovery import patient
from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.io.names import some
from nnunetv2_mgml.modalities import BRATS_FILE_SUFFIXES, BRATS_SEGMENTATION_SUFFIX
from nnunetv2_mgml.plans.splits import SPLITS_FILE, TEST_FILE

PRESETS: dict[str, tuple[int, int, int]] = {"paper2020": (219, 50, 100), "paper2023": (7, 1, 2)}
"""Proportions train : validation : test in the MGML paper; which cases they are is not printed there."""

PUBLISHED: tuple[str, ...] = ("rfnet2020", "rfnet2018-1", "rfnet2018-2", "rfnet2018-3", "imfuse2023")
"""Splits whose very cases are known: BraTS 2020 and 2018 as RFNet and its successors split them, BraTS 2023 GLI as
IM-Fuse does. Their lists lie in ``case_lists``, each with its source."""
_TAIL = re.compile(r"(\.nii\.gz|\.nii|\.np[yz]|\.h5|\.pkl)$", re.IGNORECASE)
_SUFFIXES = sorted(
    {s for table in (*BRATS_FILE_SUFFIXES.values(), BRATS_SEGMENTATION_SUFFIX) for s in table.values()} | {"_vol"},
    key=len,
    reverse=True,
)


@dataclass(frozen=True)
class Split:
    """Case names of the three parts, each sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def __str__(self) -> str:
        """Return the counts."""
        return f"{len(self.train)} training, {len(self.val)} validation, {len(self.test)} test cases"


def parse_ratio(text: str) -> tuple[int, int, int]:
    """Parse ``paper2020``, ``paper2023``, ``A:B:C`` or ``A:B`` (no test cases; also with ``ratio`` before it).

    Raises:
        ValueError: anything else; training and validation must be above zero.
    """
    if text in PRESETS:
        return PRESETS[text]
    match = re.fullmatch(r"(?:ratio[ =:]*)?(\d+):(\d+)(?::(\d+))?", text.strip())
    train, val, test = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if train < 1 or val < 1:
        raise ValueError(
            f"Unknown split '{text}'. Allowed: {', '.join([*PRESETS, *PUBLISHED])}, or train:validation:test such as "
            f"7:1:2, with at least 1 for training and validation."
        )
    return train, val, test


def published_lists(name: str) -> list[Path]:
    """Return the lists of training, validation and test cases of a split in `PUBLISHED`, for `split_from_files`."""
    folder = Path(__file__).parent / "case_lists"
    return [folder / f"{name}_{part}.txt" for part in ("train", "val", "test")]


def _counts(total: int, ratio: Sequence[int]) -> list[int]:
    """Share ``total`` by proportion (largest remainder), at least one for every part that is wanted."""
    wanted = [total * part / sum(ratio) for part in ratio]
    counts = [int(w) for w in wanted]
    by_remainder = sorted(range(len(ratio)), key=lambda i: (counts[i] - wanted[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i, part in enumerate(ratio):
        if part and not counts[i]:
            counts[max(range(len(ratio)), key=counts.__getitem__)] -= 1
            counts[i] = 1
    return counts


def random_split(
    cases: Iterable[str], ratio: Sequence[int], seed: int = 0, patients: Mapping[str, str] | None = None
) -> Split:
    """Split cases by proportion; several time points of one patient stay together.

    Args:
        cases: case names, in any order (the result does not depend on it).
        ratio: train, validation, test proportions; exact counts where they sum up to the number of cases.
        seed: another seed gives another split.
        patients: case -> patient, where the source says so; others are told by the names of BraTS and BIDS.

    Raises:
        ValueError: fewer patients than parts.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for case in sorted(cases):
        groups[(patients or {}).get(case) or patient(case)].append(case)
    parts_wanted = sum(part > 0 for part in ratio)
    if len(groups) < parts_wanted:
        raise ValueError(
            f"{len(groups)} patient(s) cannot be split into {parts_wanted} parts. The patients are {some(groups)}."
        )
    order = list(groups)
    random.Random(seed).shuffle(order)
    # Patients with many time points first, while every part still has room for them.
    order.sort(key=lambda name: -len(groups[name]))
    room = _counts(sum(map(len, groups.values())), ratio)
    parts: list[list[str]] = [[] for _ in room]
    for index, name in enumerate(order):
        # The last patients go to parts that are still empty, so that none stays so.
        empty = [i for i, part in enumerate(ratio) if part and not parts[i]]
        choices = empty if empty and len(order) - index <= len(empty) else range(len(room))
        target = max(choices, key=lambda i: room[i])
        parts[target].extend(groups[name])
        room[target] -= len(groups[name])
    return Split(*(tuple(sorted(part)) for part in parts))


def choose_split(
    labelled: Sequence[str],
    bad: Iterable[str],
    split: str | None,
    split_files: Sequence[str | Path] | None,
    seed: int = 0,
    patients: Mapping[str, str] | None = None,
) -> tuple[Split | None, tuple[str, ...]]:
    """Return the split that a conversion is asked for, if any.

    Args:
        labelled: names of the cases with labels.
        bad: names of cases that cannot be used; lists may name them.
        split: a proportion (`parse_ratio`), or one of `PUBLISHED`.
        split_files: lists (`split_from_files`).
        seed: of a random split.
        patients: see `random_split`.

    Returns:
        The split or None, and labelled cases that are in none of its lists.

    Raises:
        FileNotFoundError, ValueError: both were given, or as `random_split` and `split_from_files`.
    """
    if split and split_files:
        raise ValueError("Give either --split or --split_files, not both.")
    files = published_lists(split) if split and split in PUBLISHED else split_files
    if files:
        # A list may name a case whose files are bad; that is said of the case, not of the list.
        chosen, left_out = split_from_files([*labelled, *bad], [Path(path) for path in files])
        return chosen, tuple(name for name in left_out if name in labelled)
    return (random_split(labelled, parse_ratio(split), seed, patients), ()) if split else (None, ())


def split_from_files(cases: Iterable[str], files: Sequence[Path]) -> tuple[Split, tuple[str, ...]]:
    """Read a split from published lists.

    Args:
        cases: names of the cases that exist.
        files: lists of training, validation and (optional) test cases, one a line; ``#`` starts a comment. Folders
            before a name, an ``HGG_`` or ``LGG_`` prefix and endings such as ``_vol.npy`` or ``_flair.nii.gz`` are
            dropped.

    Returns:
        The split, and the cases that are in none of the lists.

    Raises:
        FileNotFoundError: a list does not exist.
        ValueError: unknown names, a name in two places (the first of them are named, all counted), or an empty training
            or validation list.
    """
    if len(files) not in (2, 3):
        raise ValueError(
            f"--split_files needs the lists of training, validation and (optional) test cases, "
            f"got {len(files)} file(s)."
        )
    known = set(cases)
    parts: list[list[str]] = []
    unknown: list[str] = []
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"Split list {path} does not exist.")
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        resolved = {line: _resolve(line, known) for line in lines if line}
        unknown += [f"{line} ({path.name})" for line, case in resolved.items() if case is None]
        parts.append([case for line in lines if line and (case := resolved[line]) is not None])
    if unknown:
        raise ValueError(f"{len(unknown)} name(s) in the split lists are no case of this data: {some(unknown)}.")
    doubles = sorted(case for case, count in Counter(case for part in parts for case in part).items() if count > 1)
    if doubles:
        raise ValueError(f"{len(doubles)} case(s) named more than once in the split lists: {some(doubles)}.")
    if not parts[0] or not parts[1]:
        raise ValueError("The lists of training and of validation cases must not be empty.")
    left_out = tuple(sorted(known - {case for part in parts for case in part}))
    return Split(*(tuple(sorted(part)) for part in (*parts, [], [])[:3])), left_out


def _resolve(entry: str, known: set[str]) -> str | None:
    name = _TAIL.sub("", re.split(r"[/\\]", entry.rstrip("/\\"))[-1])
    without_content = next((name[: -len(s)] for s in _SUFFIXES if name.lower().endswith(s)), name)
    candidates = {stem for text in (name, without_content) for stem in (text, re.sub(r"^(HGG|LGG)[_\-]", "", text))}
    matches = candidates & known
    return matches.pop() if len(matches) == 1 else None


def write_splits(split: Split, folder: Path, overwrite: bool) -> Path:
    """Write ``splits_final.json`` where nnU-Net reads it, and the held-out names beside it.

    Args:
        split: the split.
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``; created if need be.
        overwrite: whether another existing split may be replaced.

    Returns:
        Path of ``splits_final.json``.

    Raises:
        ValueError: another split exists there and ``overwrite`` is False.
    """
    check_existing_split(split, folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / TEST_FILE, list(split.test))
    write_json(folder / SPLITS_FILE, _content(split))
    return folder / SPLITS_FILE


def _content(split: Split) -> list[Mapping[str, list[str]]]:
    return [{"train": list(split.train), "val": list(split.val)}]


def check_existing_split(split: Split, folder: Path, overwrite: bool) -> None:
    """Raise ValueError if ``folder`` has another ``splits_final.json``, or a damaged one, that may not be replaced."""
    path = folder / SPLITS_FILE
    if path.is_file() and not overwrite and read_json(path) != _content(split):
        raise ValueError(f"{path} holds another split. Give --overwrite to replace it.")


def notes_on_preprocessed(folder: Path, with_split: bool) -> list[str]:
    """Say what a data set that was converted again still has from earlier.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_NAME``; it need not exist.
        with_split: whether a split was written there just now.
    """
    notes = []
    if (folder / "dataset.json").is_file():
        notes.append(f"{folder} holds an earlier preprocessing; run nnUNetv2_plan_and_preprocess again")
    old = [name for name in (SPLITS_FILE, TEST_FILE) if (folder / name).is_file()]
    if old and not with_split:
        files = " and ".join(str(folder / name) for name in old)
        notes.append(f"from earlier, and still in force: {files}; delete what does not fit, or give --split")
    return notes
