"""Which files belong to which case: folders by patterns, BIDS, BraTS names (imports neither nnU-Net nor torch).

A modality of a case without a file is simply not in it; nothing here invents one. `case_sheet` reads sheets.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_mgml.modalities import (
    BRATS_CHANNELS,
    BRATS_FILE_SUFFIXES,
    BRATS_OTHER_SUFFIXES,
    BRATS_SEGMENTATION_SUFFIX,
    canonical_name,
)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
_TAKEN_OFF = (*NIFTI_SUFFIXES, ".img.gz", ".img", ".hdr")
IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".mhd", ".nrrd", ".nhdr", ".tif", ".tiff", ".dcm")
BRATS_CONTENT = {
    suffix: (naming, modality)
    for naming, table in BRATS_FILE_SUFFIXES.items()
    for modality, suffix in {**table, "seg": BRATS_SEGMENTATION_SUFFIX[naming]}.items()
} | {suffix: (naming, modality) for naming, table in BRATS_OTHER_SUFFIXES.items() for suffix, modality in table.items()}
"""Ending of a file's stem -> (naming, modality or ``seg``)."""

BRATS_STEM = re.compile(rf"(?P<case>.+)(?P<suffix>{'|'.join(map(re.escape, BRATS_CONTENT))})", re.IGNORECASE)
_NO_IMAGE = "has a label but no image"
_LABEL_SUFFIXES = ("mask", "dseg", "seg")


class NoBratsNamesError(ValueError):
    """No file in a folder has a name of BraTS."""


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case."""

    name: str
    images: dict[str, Path]
    """Modality -> file; modalities that do not exist are not in it."""
    label: Path | None = None
    site: str | None = None
    frames: Mapping[str, int] = field(default_factory=dict)
    """Modality -> index along the fourth axis, where one file holds several modalities."""
    patient: str | None = None
    """Whose case it is, where the source says so; cases of one patient stay together in a random split."""


@dataclass
class FoundCases:
    """Cases sorted by name, and what is wrong with others."""

    modalities: tuple[str, ...]
    """In channel order, spelled as asked for."""
    cases: list[CaseFiles] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    origin: str = ""
    """Where they come from, for the description of a data set."""
    left_over: list[Path] = field(default_factory=list)
    """Images that no pattern matches; one of them may be a modality that seems to be missing."""
    other_files: list[Path] = field(default_factory=list)
    """Files of the cases with problems, and of modalities that were left out."""

    def files(self) -> list[Path]:
        """Return every image and label map once, those of cases with problems included."""
        good = [path for case in self.cases for path in (*case.images.values(), case.label) if path is not None]
        return list(dict.fromkeys(good + self.other_files))


# --- walking ----------------------------------------------------------------------------------------------------------
def nifti_stem(name: str) -> str | None:
    """Return a file name without ``.nii`` or ``.nii.gz``; None for any other file."""
    for suffix in NIFTI_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return None


def walk_files(source: Path) -> Iterator[Path]:
    """Yield every file below a folder in sorted order; hidden ones and ``__MACOSX`` are skipped, links are followed.

    A folder to which several links lead is walked by each of them, but none that leads back up.

    Raises:
        ValueError: a folder that cannot be read.
    """
    above: dict[str, tuple[str, ...]] = {}
    for root, folders, files in os.walk(source, followlinks=True, onerror=_raise):
        real, parents = os.path.realpath(root), above.get(os.path.dirname(root), ())
        if real in parents:  # a link that leads back up
            folders.clear()
            continue
        above[root] = (*parents, real)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        yield from (Path(root) / name for name in sorted(files) if not name.startswith("."))


def ending_in_name(name: str) -> str:
    """Return what is wrong with a case's name that ends like a file, empty where nothing is: ITK takes it off.

    What is to be written as ``scan.nii.nii.gz`` it writes as ``scan.nii``.
    """
    ending = next((e for e in _TAKEN_OFF if name.lower().endswith(e)), "")
    return f"its name ends with {ending}, as a file's does; leave that out of the name" if ending else ""


def _raise(error: OSError) -> None:
    raise ValueError(f"Folder {error.filename} cannot be read ({error.strerror}); its cases would be lost.") from error


def _check_folder(source: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give the folder that contains the cases.")


def _found(
    modalities: Sequence[str],
    images: Mapping[str, Mapping[str, list[Path]]],
    labels: Mapping[str, list[Path]],
    origin: str,
    problems: Mapping[str, list[str]] | None = None,
    patients: Mapping[str, str] | None = None,
) -> FoundCases:
    """Make cases of the files that were matched; two files for one thing are a problem of their case."""
    result = FoundCases(tuple(modalities), origin=origin)
    bad = defaultdict(list, {name: list(texts) for name, texts in (problems or {}).items()})
    for name in sorted({*images, *labels, *bad}):
        matched = {**images.get(name, {}), "the label": labels.get(name, [])}
        bad[name] += [
            f"{len(paths)} files for {what}: {', '.join(str(path) for path in paths[:3])}"
            for what, paths in matched.items()
            if len(paths) > 1
        ]
        if not any(images.get(name, {}).values()):
            bad[name].append(_NO_IMAGE)
        if bad[name]:
            result.problems[name] = bad[name]
            result.other_files += itertools.chain(*matched.values())
            continue
        label = labels.get(name, [])
        result.cases.append(
            CaseFiles(
                name,
                {modality: paths[0] for modality in modalities if (paths := images[name].get(modality))},
                label[0] if label else None,
                patient=(patients or {}).get(name),
            )
        )
    return result


# --- folders ----------------------------------------------------------------------------------------------------------
def find_by_patterns(
    source: Path, patterns: Mapping[str, str], label: str | None = None, case_folders: int = 1
) -> FoundCases:
    """Find cases whose files have names that tell what they are.

    A file in a folder below ``source`` belongs to the case named by its first ``case_folders`` folders, joined by
    ``_``; a file in ``source`` itself to the case named by what the first ``*`` of its pattern stands for.

    Where several folders name a case, the first of them is its patient. Two cases of one name are a problem of it.

    Where a file matches no pattern as it is written, upper and lower case count as the same (``A_T1.NII.GZ``).

    Args:
        source: the folder.
        patterns: modality -> pattern (``*_t1.nii.gz``) of the file name, or with a slash of the path below the case's
            folder; in channel order.
        label: likewise for the label map.
        case_folders: how many folders name a case: 2 where there is a folder per patient and session.

    Raises:
        FileNotFoundError: ``source`` is not a folder.
        ValueError: a pattern that nothing matches, or names that are no modalities.
    """
    _check_folder(source)
    if case_folders < 1:
        raise ValueError(f"--case_folders must be 1 or more, got {case_folders}.")
    wanted = {**patterns, **({} if label is None else {"": label})}
    images: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    labels: dict[str, list[Path]] = defaultdict(list)
    problems: dict[str, list[str]] = defaultdict(list)
    paths = list(walk_files(source))
    hits = _matched(source, paths, wanted, case_folders)
    for path, (name, whats) in hits.items():
        if len(whats) > 1:
            named = " and ".join(f"{wanted[what]} ({what or 'label'})" for what in whats)
            problems[name].append(f"{path} matches {named}; make the patterns narrower")
        elif whats[0]:
            images[name][whats[0]].append(path)
        else:
            labels[name].append(path)
    folders = _case_folders(source, hits, case_folders)
    for name, places in folders.items():
        if len(places) > 1:
            there = ", ".join(sorted(place.as_posix() for place in places))
            problems[name].append(f"found in several folders: {there}; rename one")
    for name, doubles in _aliases(source, folders).items():
        problems[name].append(f"is the same folder as {', '.join(doubles)}; take the link out")
    patients = {name: places[0].parts[0] for name, places in folders.items()} if case_folders > 1 else {}
    matched = {what for _, whats in hits.values() for what in whats}
    others = [path for path in paths if path not in hits]
    for what, pattern in wanted.items():
        if what not in matched:
            there = f"; files there: {_some(others, source)}" if others else ""
            raise ValueError(f"No file below {source} matches {pattern} ({what or 'the label'}){there}.")
    found = _found(tuple(patterns), images, labels, str(source), problems, patients)
    found.left_over = [path for path in others if path.name.lower().endswith(IMAGE_SUFFIXES)]
    found.other_files = [path for path, (name, _) in hits.items() if name in found.problems]
    for name, texts in found.problems.items():
        own = [path for path in found.left_over if "_".join(path.relative_to(source).parts[:case_folders]) == name]
        if _NO_IMAGE in texts and own:
            texts[texts.index(_NO_IMAGE)] = f"{_NO_IMAGE} that a pattern matches: {_some(own, source)}"
    return found


def _matched(
    source: Path, paths: Sequence[Path], wanted: Mapping[str, str], case_folders: int
) -> dict[Path, tuple[str, list[str]]]:
    """Return file -> its case, and what its patterns say it is, in sorted order.

    A file that no pattern matches as it is written is matched without regard to case, unless its case has that already.
    """
    found: dict[Path, tuple[str, list[str]]] = {}
    turns: tuple[Callable[[str], str], ...] = (str, str.lower)
    for turned in turns:
        there = {(name, what) for name, whats in found.values() for what in whats}
        for path in paths:
            if path in found:
                continue
            parts = path.relative_to(source).parts
            folders = min(case_folders, len(parts) - 1)
            inner = turned("/".join(parts[folders:]))
            whats = [what for what, pattern in wanted.items() if _matches(inner, turned(pattern))]
            if whats:
                name = "_".join(parts[:folders]) or _starred(parts[-1], wanted[whats[0]])
                if not any((name, what) in there for what in whats):
                    found[path] = name, whats
    return dict(sorted(found.items()))


def _case_folders(source: Path, hits: Mapping[Path, tuple[str, list[str]]], case_folders: int) -> dict[str, list[Path]]:
    """Return case -> the folders that name it, below ``source``; files in ``source`` itself are in none."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path, (name, _) in hits.items():
        parts = path.relative_to(source).parts[:-1][:case_folders]
        if parts and Path(*parts) not in found[name]:
            found[name].append(Path(*parts))
    return found


def _aliases(source: Path, folders: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """Return case -> other cases that are the same folder by a link; each would be there twice."""
    owners: dict[str, set[str]] = defaultdict(set)
    for name, places in folders.items():
        for place in places:
            owners[os.path.realpath(source / place)].add(name)
    return {name: sorted(names - {name}) for names in owners.values() if len(names) > 1 for name in names}


def _some(paths: Sequence[Path], source: Path, shown: int = 3) -> str:
    return ", ".join(path.relative_to(source).as_posix() for path in paths[:shown])


def _matches(inner: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(inner if "/" in pattern else inner.rsplit("/", 1)[-1], pattern)


def _starred(name: str, pattern: str) -> str:
    """Return what the first ``*`` of a pattern stands for in a file name."""
    before, star, after = pattern.partition("*")
    if not star:
        raise ValueError(f"Pattern {pattern} has no *, which would name the case of a file outside a folder.")
    regex = f"{_regex(before)}(.*?){_regex(after)}"
    match = re.fullmatch(regex, name, re.DOTALL) or re.fullmatch(regex, name, re.DOTALL | re.IGNORECASE)
    case = match[1].strip("_-. ") if match else ""
    if not case:
        raise ValueError(f"The * of {pattern} stands for nothing in {name}; it names the case. Use a narrower pattern.")
    return case


def _regex(pattern: str) -> str:
    return re.sub(r"^\(\?s:(.*)\)\\[zZ]$", r"\1", fnmatch.translate(pattern), flags=re.DOTALL)


# --- BIDS -------------------------------------------------------------------------------------------------------------
def find_bids(source: Path, patterns: Mapping[str, str] | None = None, label: str | None = None) -> FoundCases:
    """Find the cases of a BIDS data set: ``sub-X`` or ``sub-X_ses-Y``.

    Args:
        source: the data set's folder.
        patterns: modality -> ending of the file name without extension, such as ``T1w``, or ``ce-*_T1w`` for images
            with contrast agent; in channel order. None: t1, t1ce, t2, flair and every other ending there is.
        label: pattern of the label maps' file names; None: masks and ``dseg`` in ``derivatives``, but no brain masks.

    Raises:
        FileNotFoundError: ``source`` is not a folder.
        ValueError: no file with a BIDS name, or a modality that no file has.
    """
    _check_folder(source)
    images: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    labels: dict[str, list[Path]] = defaultdict(list)
    for path in walk_files(source):
        stem = nifti_stem(path.name)
        entities = dict(part.split("-", 1) for part in (stem or "").split("_") if "-" in part)
        if stem is None or "sub" not in entities:
            continue
        case = "_".join(f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities)
        suffix = stem.rsplit("_", 1)[-1]
        derived = "derivatives" in path.relative_to(source).parts
        is_label = suffix in _LABEL_SUFFIXES and derived and entities.get("desc") != "brain"
        if is_label if label is None else fnmatch.fnmatchcase(path.name, label):
            labels[case].append(path)
        elif not derived and suffix not in _LABEL_SUFFIXES:
            key = f"ce-{entities['ce']}_{suffix}" if "ce" in entities else suffix
            modality = _bids_modality(key, patterns)
            if modality is not None:
                images[case][modality].append(path)
    there = {modality for files in images.values() for modality in files}
    if not there:
        raise ValueError(f"No image with a BIDS name (sub-X[_ses-Y]_SUFFIX.nii.gz) below {source}.")
    lacking = [name for name in patterns or () if name not in there]
    if lacking:
        raise ValueError(f"No file below {source} is of {', '.join(f'{n}={(patterns or {})[n]}' for n in lacking)}.")
    others = sorted(there - set(BRATS_CHANNELS))
    modalities = tuple(patterns) if patterns else (*(n for n in BRATS_CHANNELS if n in there), *others)
    return _found(modalities, images, labels, str(source))


def _bids_modality(key: str, patterns: Mapping[str, str] | None) -> str | None:
    if patterns is not None:
        return next((name for name, pattern in patterns.items() if fnmatch.fnmatchcase(key, pattern)), None)
    contrast, suffix = key.startswith("ce-"), key.rsplit("_", 1)[-1]
    name = canonical_name(suffix)
    return ("t1ce" if name == "t1" else f"{name}ce") if contrast else name


# --- BraTS ------------------------------------------------------------------------------------------------------------
def find_brats(source: Path) -> FoundCases:
    """Find cases with the file names of BraTS, 2017 to 2025, at any depth; other files are left alone.

    Raises:
        FileNotFoundError: ``source`` is not a folder.
        NoBratsNamesError: no file with such a name.
        ValueError: a folder that cannot be read.
    """
    _check_folder(source)
    images: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    labels: dict[str, list[Path]] = defaultdict(list)
    for path in walk_files(source):
        match = BRATS_STEM.fullmatch(nifti_stem(path.name) or "")
        if match is None:
            continue
        content = BRATS_CONTENT[match["suffix"].lower()][1]
        (labels[match["case"]] if content == "seg" else images[match["case"]][content]).append(path)
    if not images:
        raise NoBratsNamesError(
            f"No BraTS case found in {source}. Expected files such as <case>_t1ce.nii.gz (BraTS 2018-2021) or "
            f"<case>-t1c.nii.gz (BraTS 2023-2025), at any depth."
        )
    return _found(BRATS_CHANNELS, images, labels, str(source))
