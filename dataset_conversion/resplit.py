"""Gives a dataset that is already converted a fixed split, without moving a file."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_mgml.dataset_conversion.dataset_folder import FILE_ENDING
from nnunetv2_mgml.dataset_conversion.splits import (
    PUBLISHED,
    Split,
    check_existing_split,
    parse_ratio,
    published_lists,
    random_split,
    split_from_files,
    write_splits,
)
from nnunetv2_mgml.plans.cohort import PATIENTS_FILE, read_dataset_json, read_groups
from nnunetv2_mgml.plans.folders import PREPROCESSED, RAW, dataset_name, nnunet_folder
from nnunetv2_mgml.plans.splits import SPLITS_FILE

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitRequest:
    """What `write_split` is asked for."""

    dataset_id: int
    """nnU-Net dataset id; its raw data must exist, in ``imagesTr`` and ``labelsTr``."""
    split: str | None = None
    """See `convert.ConversionRequest`; either this or ``split_files``."""
    split_files: Sequence[str | Path] | None = None
    """See `convert.ConversionRequest`."""
    seed: int = 0
    """Seed of a random split."""
    overwrite: bool = False
    """Replace another existing split."""


def split_dataset(
    dataset_id: int,
    *,
    split: str | None = None,
    split_files: Sequence[str | Path] | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Split, Path]:
    """Write ``splits_final.json`` for an existing dataset of nnU-Net.

    The arguments are the fields of `SplitRequest`; the rest is as in `write_split`.
    """
    return write_split(SplitRequest(dataset_id, split, split_files, seed, overwrite))


def write_split(request: SplitRequest) -> tuple[Split, Path]:
    """Write ``splits_final.json`` for an existing dataset of nnU-Net.

    Test cases stay in ``imagesTr`` (nnU-Net trains on none of them, as the split does not name them) and are linked
    into ``imagesTs`` and ``labelsTs``, ready for prediction and evaluation. A random split keeps the cases of a patient
    together, who is told by `plans.cohort.PATIENTS_FILE` or by the names of BraTS and BIDS.

    Args:
        request: of which data set, and how.

    Returns:
        The split and the path of ``splits_final.json``.

    Raises:
        FileNotFoundError: there is no such dataset, or a list is missing.
        ValueError: neither or both of ``split`` and ``split_files``; several datasets with this id; a bad list; a
            data set whose ``dataset.json`` lists its files.
    """
    split, split_files = request.split, request.split_files
    if bool(split) == bool(split_files):
        raise ValueError("Give either --split or --split_files.")
    raw = nnunet_folder(RAW) / dataset_name(request.dataset_id)
    description = read_dataset_json(raw) if (raw / "dataset.json").is_file() else {}
    if "dataset" in description:
        raise ValueError(
            f"{raw / 'dataset.json'} lists its files, so no test cases can be taken out of a folder. Write "
            f"{SPLITS_FILE} yourself, or convert the data (mgml convert sheet)."
        )
    ending = description.get("file_ending", FILE_ENDING)
    cases = sorted(path.name[: -len(ending)] for path in (raw / "labelsTr").glob(f"*{ending}"))
    if not cases:
        raise FileNotFoundError(f"No labels labelsTr/*{ending} in {raw}. Convert it first: mgml convert brats.")
    if split in PUBLISHED:
        split_files = published_lists(split)
    if split_files:
        chosen, left_out = split_from_files(cases, [Path(path) for path in split_files])
        if left_out:
            _log.warning("Left out, as no split list names them: %s", ", ".join(left_out))
    else:
        chosen = random_split(cases, parse_ratio(split or ""), request.seed, read_groups(raw, PATIENTS_FILE))
    folder = nnunet_folder(PREPROCESSED) / raw.name
    check_existing_split(chosen, folder, request.overwrite)
    for part in ("images", "labels"):
        _link_test_cases(raw, part, chosen.test, ending)
    return chosen, write_splits(chosen, folder, request.overwrite)


def _link_test_cases(raw: Path, part: str, test: Sequence[str], ending: str) -> None:
    """Make ``<part>Ts`` link to the test cases in ``<part>Tr``; links of an earlier split go."""
    target = raw / f"{part}Ts"
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        if path.is_symlink() and os.readlink(path).startswith(f"..{os.sep}{part}Tr{os.sep}"):
            path.unlink()
    pattern = "_[0-9][0-9][0-9][0-9]" if part == "images" else ""
    for case in test:
        for path in sorted((raw / f"{part}Tr").glob(f"{glob.escape(case)}{pattern}{ending}")):
            link = target / path.name
            if not link.exists():
                os.symlink(os.path.join("..", f"{part}Tr", path.name), link)
