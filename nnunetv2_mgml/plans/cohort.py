"""What the cases of a raw data set have and lack: from the files that exist, and from what is recorded as missing.

``missing_modalities.json`` in a raw data set maps a case to the names of the modalities it lacks. A recorded modality
is absent whether there is a file for it (a placeholder made for nnU-Net, or a volume nobody should use) or not; a file
that does not exist is absent whether it is recorded or not. Imports neither nnU-Net nor torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import Subset, channel_index, channel_names

MISSING_FILE = "missing_modalities.json"
SITES_FILE = "case_sites.json"
"""Case -> site, hospital or scanner, where the source named it; `mgml check` looks at it."""
PATIENTS_FILE = "case_patients.json"
"""Case -> number of its patient, where the source named them; a split keeps the cases of a patient together."""
FINGERPRINT = "dataset_fingerprint.json"
"""nnU-Net's, in the folder of a preprocessed data set."""
LEFT_OUT = "mgml_left_out"
"""Key of a fingerprint of ours: case -> modalities that were missing."""


@dataclass(frozen=True)
class RawCase:
    """One training case of a raw data set."""

    name: str
    files: dict[int, Path]
    """Channel index -> file, of the channels that are there and not recorded as missing."""
    label: Path

    def subset(self, num_modalities: int) -> Subset:
        """Return which of ``M`` modalities there are."""
        return tuple(channel in self.files for channel in range(num_modalities))


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Return the content of ``dataset.json`` of a data set's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or no dictionary.
    """
    content = read_json(folder / "dataset.json")
    if not isinstance(content, dict):
        raise ValueError(f"{folder / 'dataset.json'} must hold a dictionary; found {type(content).__name__}.")
    return content


def raw_cases(folder: Path, part: str = "Tr") -> list[RawCase]:
    """Return the cases of a raw data set, sorted by name, in whichever of nnU-Net's two layouts it has.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``.
        part: ``Tr`` for the training cases, ``Ts`` for those in ``imagesTs``, whose labels need not exist.

    Raises:
        FileNotFoundError: no ``dataset.json``, or no ``imagesTr``.
        ValueError: ``dataset.json`` or the record of missing modalities is not what it should be, or a case of which
            nothing is left.
    """
    description = read_dataset_json(folder)
    channels = channel_names(description)
    recorded = read_missing(folder, channels)
    listed = part == "Tr" and "dataset" in description
    found = listed_cases(folder, description) if listed else _in_folder(folder, description, part)
    cases = [
        RawCase(
            name,
            {c: path for c, path in sorted(files.items()) if channels[c] not in recorded.get(name, ())},
            label,
        )
        for name, (files, label) in sorted(found.items())
        if max(files, default=0) < len(channels) or _refuse(name, files, channels)
    ]
    empty = [case.name for case in cases if not case.files]
    if empty:
        raise ValueError(
            f"{len(empty)} case(s) of {folder} have no modality at all: {', '.join(empty[:5])}. Remove their labels, "
            f"or correct {MISSING_FILE}."
        )
    return cases


def incomplete_cases(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return case -> names of the modalities it lacks, of the incomplete training cases; raises as `raw_cases`.

    Where every case has one file and nothing is recorded, that file holds all channels (colours, four axes), and no
    case is incomplete.
    """
    channels = channel_names(read_dataset_json(folder))
    cases = raw_cases(folder)
    if not (folder / MISSING_FILE).is_file() and all(set(case.files) == {0} for case in cases):
        return {}
    return {
        case.name: tuple(name for c, name in enumerate(channels) if c not in case.files)
        for case in cases
        if len(case.files) < len(channels)
    }


def read_groups(folder: Path, name: str) -> dict[str, str]:
    """Return what `SITES_FILE` or `PATIENTS_FILE` of a raw data set says; nothing where there is none.

    Raises:
        ValueError: it is no JSON, or maps nothing.
    """
    path = folder / name
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        what = "sites" if name == SITES_FILE else "patients"
        raise ValueError(f'{path} must map cases to {what}, {{"case_7": "Ulm"}} say.')
    return {str(case): str(group) for case, group in content.items()}


def read_missing(folder: Path, channels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return what ``missing_modalities.json`` of a folder says: case -> modalities, spelled as in ``channels``.

    Args:
        folder: a raw or preprocessed data set; without that file nothing is recorded.
        channels: the data set's modality names in channel order.

    Raises:
        ValueError: the file is not JSON, has another form, or names a modality the data set does not have.
    """
    path = folder / MISSING_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content.values()
    ):
        raise ValueError(f'{path} must map cases to lists of modality names, {{"case_7": ["flair"]}} say.')
    try:
        return {
            case: tuple(channels[channel_index(name, channels, "This data set")] for name in names)
            for case, names in content.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def channel_of(path: str | os.PathLike[str], file_ending: str) -> int | None:
    """Return the channel index in a file name ``CASE_XXXX<file_ending>``, None where the name has another form."""
    match = re.fullmatch(rf".+_(\d{{4}}){re.escape(file_ending)}", os.path.basename(path))
    return int(match[1]) if match else None


_Found = dict[str, tuple[dict[int, Path], Path]]


def _in_folder(folder: Path, description: Mapping[str, Any], part: str) -> _Found:
    images, ending = folder / f"images{part}", str(description.get("file_ending", ""))
    if not images.is_dir():
        raise FileNotFoundError(f"{images} does not exist; nnU-Net expects images there.")
    found: _Found = {}
    for name in sorted(os.listdir(images)):
        channel = channel_of(name, ending)
        if channel is not None:
            case = name[: -len(ending) - len("_0000")]
            found.setdefault(case, ({}, folder / f"labels{part}" / f"{case}{ending}"))[0][channel] = images / name
    if not found:
        raise FileNotFoundError(f"{images} holds no file named CASE_XXXX{ending}.")
    labels = folder / f"labels{part}"
    _refuse_numbers_of_cases(found, set(os.listdir(labels)) if labels.is_dir() else set())
    return found


def _refuse_numbers_of_cases(found: _Found, label_names: Container[str]) -> None:
    """Raise a ValueError where images are named as label maps: their numbers are those of cases, not of channels."""
    for case, (files, label) in found.items():
        named = [path for path in files.values() if path.name in label_names]
        if named and label.name not in label_names:
            ending = label.name[len(case) :]
            raise ValueError(
                f"{named[0]} is named as the label map {label.parent / named[0].name}: its number belongs to the case, "
                f"not to the channel, and {len(files)} file(s) would become one case, {case}. Name the image "
                f"{named[0].name[: -len(ending)]}_0000{ending} if it is the first channel, _0001 for the second, and "
                f"so on."
            )


def listed_cases(folder: Path, description: Mapping[str, Any]) -> _Found:
    """Return the cases that ``dataset.json`` of a data set lists under ``dataset``, with the files that exist.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``.
        description: its ``dataset.json``.

    Returns:
        Case -> (channel index -> file, label map).
    """

    def absolute(path: str) -> Path:
        return Path(os.path.abspath(folder / os.path.expandvars(path)))

    return {
        name: (
            {c: path for c, text in enumerate(entry["images"]) if (path := absolute(text)).exists()},
            absolute(entry["label"]),
        )
        for name, entry in description["dataset"].items()
    }


def _refuse(name: str, files: Mapping[int, Path], channels: Sequence[str]) -> bool:
    raise ValueError(
        f"{files[max(files)]} of case {name} has channel number {max(files):04d}, but dataset.json names "
        f"{len(channels)} channels ({', '.join(channels)})."
    )
