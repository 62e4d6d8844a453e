"""Recognises a BraTS folder by its file names: which cases there are, and what their label values mean."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_mgml.io.case_files import BRATS_CONTENT, BRATS_STEM, NIFTI_SUFFIXES, nifti_stem, walk_files

__all__ = ["NIFTI_SUFFIXES", "Case", "Discovery", "discover", "edition", "may_have_cavity", "nifti_stem", "patient"]


@dataclass(frozen=True)
class Case:
    """The files of one case.

    Attributes:
        name: case name, as in the file names.
        convention: what the label values mean, one of `labels.CONVENTIONS`.
        images: canonical modality name -> file; sequences that do not exist are not in it.
        segmentation: label file, or None.
        unknown: other files of the case, whose names say nothing.
    """

    name: str
    convention: str
    images: dict[str, Path]
    segmentation: Path | None
    unknown: tuple[Path, ...] = ()


@dataclass
class Discovery:
    """What a folder holds: good cases by name, problems by case name, and remarks for the user."""

    cases: list[Case] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    bad_files: list[Path] = field(default_factory=list)
    """Files of the cases with problems."""

    def files(self) -> list[Path]:
        """Return the images and segmentations of all cases, those with problems included."""
        good = [path for case in self.cases for path in (*case.images.values(), case.segmentation) if path is not None]
        return good + self.bad_files


@dataclass
class _Files:
    content: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    namings: set[str] = field(default_factory=set)
    folders: set[Path] = field(default_factory=set)


def _walk(source: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield (stem that names the content, file, folder of the case) of every NIfTI file, in sorted order."""
    for path in walk_files(source):
        stem = nifti_stem(path.name)
        if stem is None:
            continue
        outer = nifti_stem(path.parent.name)
        # Some mirrors pack every volume into a folder that bears the name of the file.
        packed = outer is not None and path.parent != source
        yield (outer, path, path.parent.parent) if outer and packed else (stem, path, path.parent)


def discover(source: Path, label_convention: str = "auto") -> Discovery:
    """Find all BraTS cases below a folder.

    Args:
        source: folder, searched to any depth; hidden files and ``__MACOSX`` are skipped.
        label_convention: ``auto`` (told by the file naming) or one of `labels.CONVENTIONS` for all cases.

    Returns:
        Cases sorted by name. A case name found in two folders, and two files for one sequence, are problems.

    Raises:
        FileNotFoundError: ``source`` is not a folder.
        ValueError: no file with a BraTS name in it.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give the folder that contains the BraTS cases.")
    found: dict[str, _Files] = defaultdict(_Files)
    strangers: dict[Path, list[Path]] = defaultdict(list)
    for stem, path, folder in _walk(source):
        match = BRATS_STEM.fullmatch(stem)
        if match is None:
            strangers[folder].append(path)
            continue
        naming, content = BRATS_CONTENT[match["suffix"].lower()]
        files = found[match["case"]]
        files.content[content].append(path)
        files.namings.add(naming)
        files.folders.add(folder)
    if not found:
        raise ValueError(
            f"No BraTS case found in {source}. Expected files such as <case>_t1ce.nii.gz (BraTS 2018-2021) or "
            f"<case>-t1c.nii.gz (BraTS 2023-2025), at any depth; found {sum(map(len, strangers.values()))} other NIfTI "
            f"file(s)."
        )
    result = Discovery()
    for name in sorted(found):
        _add_case(result, name, found[name], strangers, label_convention)
    rest = sorted(path for paths in strangers.values() for path in paths)
    if rest:
        result.notes.append(f"{len(rest)} NIfTI file(s) without a BraTS name ignored, such as {rest[0]}")
    return result


def _add_case(
    result: Discovery, name: str, files: _Files, strangers: dict[Path, list[Path]], label_convention: str
) -> None:
    problems: list[str] = []
    if len(files.folders) > 1:
        problems.append(f"found in several folders: {', '.join(map(str, sorted(files.folders)))}; keep one")
    else:
        if len(files.namings) > 1:
            problems.append("has files in the naming of 2021 (_t1) and of 2023 (-t1n); keep one")
        problems.extend(
            f"two files for {content}: {', '.join(p.name for p in paths)}; keep one"
            for content, paths in files.content.items()
            if len(paths) > 1
        )
    images = {content: paths[0] for content, paths in files.content.items() if content != "seg"}
    if not images:
        problems.append("has a segmentation but no image sequence")
    if problems:
        result.problems[name] = problems
        result.bad_files += itertools.chain(*files.content.values())
        return
    folder = next(iter(files.folders))
    segmentation = files.content["seg"][0] if files.content["seg"] else None
    if segmentation is None:
        # BraTS 2020 ships Training_355 with its segmentation named W39_1998.09.19_Segm.nii.
        likely = [path for path in strangers[folder] if "seg" in path.name.lower()]
        if len(likely) == 1 and folder.name == name:
            segmentation = likely[0]
            strangers[folder].remove(segmentation)
            result.notes.append(f"{name}: took {segmentation.name} for its segmentation")
    convention = next(iter(files.namings)) if label_convention == "auto" else label_convention
    unknown = tuple(path for path in strangers[folder] if folder.name == name or path.name.startswith(name))
    result.cases.append(Case(name, convention, images, segmentation, unknown))


def edition(case: str) -> str:
    """Return the BraTS edition a case name points to, for example ``BraTS2021``; ``BraTS`` if it names none."""
    lower = case.lower()
    if match := re.match(r"(?:brats|fets)(20)?(1[5-9]|2[0-2])(?=\D)", lower):
        return f"BraTS20{match[2]}"
    if match := re.match(r"brats-([a-z]+)-", lower):
        # Post-treatment gliomas (2024 on) count their time points from 100, the pre-operative ones from 000.
        post = match[1] == "gli" and re.search(r"-[1-9]\d\d$", lower)
        task = "" if match[1] == "gli" else f"-{match[1].upper()}"
        return f"BraTS2024{task}" if post else f"BraTS2023{task}"
    return "BraTS"


_BEFORE_SURGERY = ("BraTS2023", "BraTS2023-PED", "BraTS2023-SSA", "BraTS2023-MEN", "BraTS2023-GOAT")


def may_have_cavity(case: str) -> bool | None:
    """Return whether a case of the naming of 2023 can have a resection cavity, by its name; None if that does not tell.

    Gliomas have one after surgery only; the paediatric task has used the same value for edema since 2024.
    """
    name = edition(case)
    return False if name in _BEFORE_SURGERY else True if name == "BraTS2024" else None


def patient(case: str) -> str:
    """Return the patient of a case: the name without BraTS's time point (``BraTS-GLI-00005-101``) or BIDS's session."""
    return re.sub(r"^(brats-.+-\d+)-\d{3}$|^(sub-[^_]+)_ses-.+$", r"\1\2", case, flags=re.IGNORECASE)
