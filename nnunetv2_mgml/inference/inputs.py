"""Find the cases to predict and decide which modalities each has. Files may be absent; their numbers never shift.

nnU-Net names a file ``CASE_XXXX<file_ending>`` with the four-digit channel index ``XXXX``. The index is read from the
name, never from the position in a sorted list, so a case without ``_0001`` keeps its ``_0002`` in channel 2. Folders
with the names of BraTS and sheets name the modality instead.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

from nnunetv2_mgml.io.case_files import (
    NIFTI_SUFFIXES,
    FoundCases,
    NoBratsNamesError,
    find_brats,
)
from nnunetv2_mgml.io.case_sheet import SHEET_SUFFIXES, read_sheet
from nnunetv2_mgml.modalities import (
    BRATS_CHANNELS,
    Subset,
    canonical_name,
    channel_index,
    split_names,
    subset_from_missing,
)

AUTO = "auto"
"""The word that means: go by the files that exist, case by case."""

_log = logging.getLogger(__name__)


class CaseError(ValueError):
    """Something is wrong with one case; the others are not affected."""


class EmptyCaseError(CaseError):
    """Every volume of a case has one value everywhere."""


@dataclass(frozen=True)
class Case:
    """The input files of one case."""

    name: str
    files: dict[int, str]
    """Channel index -> path."""
    problems: tuple[tuple[int | None, str], ...] = ()
    """What was wrong with the file names, as ``(channel or None, text)``; `resolve` raises them."""


@dataclass(frozen=True)
class MissingModalities:
    """A parsed ``--missing_modalities``."""

    auto: bool
    """Whether a file that does not exist means a missing modality (else it is an error)."""
    allowed: Subset
    """False for modalities that count as missing whether their files exist or not."""


def parse_missing(missing: str | Sequence[str] | None, channels: Sequence[str]) -> MissingModalities:
    """Parse what the user said is missing.

    Args:
        missing: modality names (aliases accepted) and/or ``"auto"``, several in one text apart by comma or plus, or by
            blanks where the whole is no name itself (``"T2 FLAIR"`` is one); None: nothing may be missing.
        channels: the model's ``M`` modality names in channel order.

    Raises:
        ValueError: an unknown name, every modality named, or an empty list.
    """
    if missing is None:
        return MissingModalities(False, (True,) * len(channels))
    texts = [missing] if isinstance(missing, str) else list(missing)
    names = [name for text in texts for part in split_names(text, channels) for name in _names(part, channels)]
    if not names:
        raise ValueError(f"Name at least one missing modality of {', '.join(channels)}, or '{AUTO}'.")
    named = [name for name in names if name.lower() != AUTO]
    for name in named:
        try:
            channel_index(name, channels)
        except ValueError as error:
            raise ValueError(f"{error} '{AUTO}' goes by the files that exist.") from None
    return MissingModalities(len(named) < len(names), subset_from_missing(named, channels))


def _names(text: str, channels: Sequence[str]) -> list[str]:
    """Return the names in a text without separators: the whole where it is one, else its words."""
    try:
        channel_index(text, channels)
    except ValueError:
        return text.split()
    return [text.strip()]


def check_source(folder: str | Path) -> None:
    """Raise a FileNotFoundError unless there is a folder, or a sheet, of this name."""
    if not os.path.isdir(folder) and not (os.path.isfile(folder) and str(folder).lower().endswith(SHEET_SUFFIXES)):
        raise FileNotFoundError(f"Input folder {folder} does not exist.")


def find_cases(folder: str | Path, file_ending: str, channels: Sequence[str]) -> list[Case]:
    """Return the cases of an input folder, sorted by name.

    Args:
        folder: flat folder of ``CASE_XXXX<file_ending>`` files; or a folder of any depth with the file names of BraTS;
            or a CSV or TSV sheet (`io.case_sheet.read_sheet`).
        file_ending: ``file_ending`` of the model's dataset.json, for example ``".nii.gz"``.
        channels: the model's modality names in channel order.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no file in it is named as nnU-Net or BraTS does, or the sheet is none.
    """
    check_source(folder)
    if os.path.isfile(folder):
        return _named_cases(read_sheet(Path(folder), known=channels), channels)
    # A broken link is listed too: it is an unreadable file, not a missing modality.
    names = sorted(
        n for n in os.listdir(folder) if not n.startswith(".") and not os.path.isdir(os.path.join(folder, n))
    )
    good, other = _patterns(file_ending)
    grouped: dict[str, list[str]] = {}
    ignored = []
    for name in names:
        match = good.fullmatch(name) or other.fullmatch(name)
        if match:
            grouped.setdefault(match["case"], []).append(os.path.join(folder, name))
        elif name.endswith(file_ending):
            ignored.append(name)
    if not any(good.fullmatch(os.path.basename(p)) for paths in grouped.values() for p in paths):
        if file_ending in NIFTI_SUFFIXES and (cases := _brats_cases(Path(folder), channels)):
            return cases
        found = f"found {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "it is empty"
        raise ValueError(f"No case in {folder}: {found}. Name the files {_naming(file_ending, channels)}.")
    if ignored:
        _log.warning("Ignored in %s, no channel number _XXXX before %s: %s", folder, file_ending, ", ".join(ignored))
    cases = [_case(name, paths, file_ending) for name, paths in sorted(grouped.items())]
    _doubt_numbers(cases, channels)
    _doubt_names(cases)
    return cases


def _doubt_names(cases: Sequence[Case]) -> None:
    """Warn of files that may be the segmentation of another case: ``p_0001`` beside a case named so."""
    names = {case.name for case in cases}
    doubtful = {
        os.path.basename(path): f"{case.name}_{channel:04d}"
        for case in cases
        for channel, path in case.files.items()
        if f"{case.name}_{channel:04d}" in names
    }
    if doubtful:
        _log.warning(
            "Taken for images, but perhaps segmentations, or without the channel in their names, as there are cases of "
            "these names: %s. If so, move them out of the input folder.",
            ", ".join(f"{file} (case {name})" for file, name in doubtful.items()),
        )


def _doubt_numbers(cases: Sequence[Case], channels: Sequence[str]) -> None:
    """Warn where numbers of patients may have been taken for numbers of channels: one case, without the first one."""
    if len(cases) != 1 or 0 in cases[0].files:
        return
    case = cases[0]
    known = {c: os.path.basename(case.files[c]) for c in sorted(case.files) if c < len(channels)}
    if len(known) > 1:
        number, first = next(iter(known.items()))
        ending = first[len(f"{case.name}_0000") :]
        _log.warning(
            "The numbers of %s are taken for channels: one case, %s, with %s. If they are numbers of patients, add the "
            "channel: %s is then to be named %s_%04d_0000%s, if it is %s.",
            ", ".join(known.values()),
            case.name,
            ", ".join(channels[c] for c in known),
            first,
            case.name,
            number,
            ending,
            channels[0],
        )


def _brats_cases(folder: Path, channels: Sequence[str]) -> list[Case]:
    """Return the cases with the file names of BraTS, none where there are none that the model knows."""
    if not set(channels) & set(BRATS_CHANNELS):
        return []
    try:
        found = find_brats(folder)
    except NoBratsNamesError:
        return []
    return _named_cases(found, channels)


def _named_cases(found: FoundCases, channels: Sequence[str]) -> list[Case]:
    """Number the modalities of cases as the model does.

    Raises:
        ValueError: no modality of the cases is one of the model's.
    """
    numbers = {name: channels.index(known) for name in found.modalities if (known := canonical_name(name)) in channels}
    if not numbers:
        raise ValueError(
            f"{found.origin} has {', '.join(found.modalities)}; the model's modalities are {', '.join(channels)}."
        )
    left = [name for name in found.modalities if name not in numbers]
    if left:
        _log.warning("Not of this model and left out: %s", ", ".join(left))
    cases = [
        Case(
            case.name, dict(sorted((numbers[name], str(path)) for name, path in case.images.items() if name in numbers))
        )
        for case in found.cases
    ]
    bad = [Case(name, {}, tuple((None, text) for text in texts)) for name, texts in found.problems.items()]
    return sorted(cases + bad, key=lambda case: case.name)


def cases_from_lists(
    lists: Sequence[Sequence[str | Path | None]], file_ending: str, channels: Sequence[str]
) -> list[Case]:
    """Return one case per list of files, in the order given (nnU-Net's list-of-lists input).

    Args:
        lists: per case its files; absent ones are left out or None. The channel is read from the file name.
        file_ending: ``file_ending`` of the model's dataset.json.
        channels: the model's modality names in channel order.
    """
    good, other = _patterns(file_ending)
    cases = []
    for number, entry in enumerate(lists):
        paths = [str(path) for path in entry if path is not None]
        matches = [good.fullmatch(os.path.basename(p)) or other.fullmatch(os.path.basename(p)) for p in paths]
        named = [match["case"] for match in matches if match]
        case = _case(
            named[0] if named else f"case {number}", [p for p, m in zip(paths, matches, strict=True) if m], file_ending
        )
        problems = [
            (None, f"{path} is not named {_naming(file_ending, channels)}")
            for path, match in zip(paths, matches, strict=True)
            if not match
        ]
        if len(set(named)) > 1:
            problems.append((None, f"its files belong to different cases: {', '.join(sorted(set(named)))}"))
        cases.append(replace(case, problems=case.problems + tuple(problems)))
    return cases


def resolve(case: Case, missing: str | Sequence[str] | None, channels: Sequence[str]) -> Subset:
    """Return which modalities of a case are used.

    Args:
        case: the files that exist.
        missing: as for `parse_missing`.
        channels: the model's ``M`` modality names in channel order.

    Returns:
        ``M`` bools, at least one True.

    Raises:
        ValueError: ``missing`` itself is wrong (see `parse_missing`).
        CaseError: a needed file is absent, no modality is left, or the file names are contradictory.
    """
    wish = parse_missing(missing, channels)
    problems = [
        text for channel, text in case.problems if channel is None or channel >= len(channels) or wish.allowed[channel]
    ]
    problems += beyond(case, channels)
    if problems:
        raise CaseError(f"Case {case.name}: {'; '.join(problems)}.")
    present = tuple(c in case.files and wish.allowed[c] for c in range(len(channels)))
    found = f"found {_numbered(sorted(case.files), channels) or 'no file'}"
    lacking = [c for c in range(len(channels)) if wish.allowed[c] and not present[c]]
    if lacking and not wish.auto:
        raise CaseError(
            f"Case {case.name}: no file for {_numbered(lacking, channels)}; {found}. Add it, or allow it "
            f"to be absent with --missing_modalities {AUTO}."
        )
    if not any(present):
        dropped = _numbered([c for c in range(len(channels)) if not wish.allowed[c]], channels)
        raise CaseError(
            f"Case {case.name}: no modality is left; {found}"
            f"{f', told to ignore {dropped}' if dropped else ''}. At least one of {', '.join(channels)} is "
            f"needed."
        )
    return present


def _patterns(file_ending: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    endings = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings} | {file_ending}
    name = r"(?P<case>.+)_(?P<channel>\d{4})"
    others = "|".join(re.escape(ending) for ending in sorted(endings))
    return re.compile(name + re.escape(file_ending)), re.compile(f"{name}(?i:{others})")


def _case(name: str, paths: Sequence[str], file_ending: str) -> Case:
    good, other = _patterns(file_ending)
    files: dict[int, str] = {}
    problems: list[tuple[int | None, str]] = []
    for path in sorted(paths, key=lambda p: not p.endswith(file_ending)):
        match = good.fullmatch(os.path.basename(path)) or other.fullmatch(os.path.basename(path))
        assert match is not None
        channel = int(match["channel"])
        if channel in files:
            problems.append((channel, f"two files for channel {channel:04d}: {files[channel]} and {path}"))
        elif path.endswith(file_ending):
            files[channel] = path
        else:
            problems.append(
                (channel, f"{path} has channel number {channel:04d}, but the model reads {file_ending} files only")
            )
    return Case(name, files, tuple(problems))


def beyond(case: Case, channels: Sequence[str]) -> list[str]:
    """Return what is wrong with files whose channel number the model does not have."""
    return [
        f"{case.files[c]} has channel number {c:04d}, but the model has {len(channels)} channels "
        f"({_numbered(range(len(channels)), channels)}). If {c:04d} is part of the case's name, the file of its "
        f"{channels[0]} is to be named {case.name}_{c:04d}_0000 with the same ending"
        for c in sorted(case.files)
        if c >= len(channels)
    ]


def _numbered(indices: Sequence[int] | range, channels: Sequence[str]) -> str:
    return ", ".join(f"{channels[i] if i < len(channels) else '?'} (_{i:04d})" for i in indices)


def _naming(file_ending: str, channels: Sequence[str]) -> str:
    return ", ".join(f"CASE_{i:04d}{file_ending} ({name})" for i, name in enumerate(channels))
