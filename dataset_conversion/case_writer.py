"""Checks one case and writes its files in nnU-Net's naming; runs in worker processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunetv2_mgml.dataset_conversion.dataset_folder import FILE_ENDING
from nnunetv2_mgml.dataset_conversion.discovery import Case, edition, may_have_cavity
from nnunetv2_mgml.dataset_conversion.labels import ENHANCING, RESECTION_CAVITY, to_nnunet
from nnunetv2_mgml.io.case_files import ending_in_name
from nnunetv2_mgml.io.forms import told_apart, two_places
from nnunetv2_mgml.io.grid import image_difference
from nnunetv2_mgml.io.volumes import read_image, whole_numbers, write_image
from nnunetv2_mgml.modalities import BRATS_CHANNELS, BRATS_FILE_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One case to convert and where to; ``labels`` is None for a case that gets no label file."""

    case: Case
    images: Path
    labels: Path | None
    link: bool
    missing_ok: bool
    convention_stated: bool = False
    """Whether the user named the label convention, rather than leaving it to the file names."""
    channels: tuple[str, ...] = BRATS_CHANNELS
    """Canonical modality names to write, in channel order; other sequences are left alone."""
    taken: tuple[str, ...] = ()
    """Modalities whose files were taken from the case; it may lack these whatever ``missing_ok`` says."""


@dataclass
class CaseResult:
    """Outcome of one case: problems (then it is not converted), absent sequences, and nnU-Net labels found."""

    name: str
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    labels: tuple[int, ...] = ()


def convert_case(job: Job) -> CaseResult:
    """Check and write one case. Nothing of a case with a problem is written.

    Args:
        job: the case and its target folders (which exist).

    Returns:
        The outcome; bad data never raises, it is listed in ``problems``.
    """
    # The processes are the parallelism; ITK's threads would only compete with them.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    result = CaseResult(job.case.name)
    if text := ending_in_name(job.case.name):
        result.problems.append(text)
    volumes = _read_images(job, result)
    if not volumes:
        if not result.problems:
            taken = (
                f" but {', '.join(job.taken)}, which --missing_rate took: delete the empty files, or try another --seed"
            )
            result.problems.append(f"no sequence with any content{taken if job.taken else ''}")
        return result
    reference = next(iter(volumes.values()))
    segmentation = None
    if job.labels is not None and job.case.segmentation is not None:
        try:
            segmentation, result.labels = read_segmentation(job.case.segmentation, job.case.convention, reference)
            result.problems += _doubts(job.case, result.labels, job.convention_stated)
        except (ValueError, FileNotFoundError) as error:
            result.problems.append(str(error))
    if result.problems:
        return result
    for channel, modality in enumerate(job.channels):
        target = job.images / f"{job.case.name}_{channel:04d}{FILE_ENDING}"
        _write_image(volumes.get(modality), job.case.images.get(modality), reference, target, job.link)
    if segmentation is not None and job.labels is not None:
        write_image(segmentation, job.labels / f"{job.case.name}{FILE_ENDING}")
    return result


def _doubts(case: Case, labels: Sequence[int], convention_stated: bool) -> list[str]:
    """Return why a resection cavity (4 since 2024) is rather the enhancing tumour of 2021, or another label."""
    if case.convention != "brats2023" or RESECTION_CAVITY not in labels:
        return []
    if edition(case.name) == "BraTS2023-PED":
        return ["has the value 4, which paediatric cases have since 2024, with other meanings; they are not supported"]
    cavity = may_have_cavity(case.name)
    if cavity is False:
        return [
            f"has the value 4, the resection cavity since 2024, but a case of {edition(case.name)} has none; if 4 is "
            f"the enhancing tumour, as up to 2021, give --label_convention brats2021"
        ]
    if cavity is None and not convention_stated and ENHANCING not in labels:
        return [
            "has the value 4 (since 2024 the resection cavity) but not 3 (enhancing tumour); if 4 is the enhancing "
            "tumour, as up to 2021, give --label_convention brats2021, else brats2023"
        ]
    return []


def _read_images(job: Job, result: CaseResult) -> dict[str, sitk.Image]:
    """Read the sequences that exist, in channel order; those that are absent or empty go to ``result.missing``."""
    volumes: dict[str, sitk.Image] = {}
    empty: list[str] = []
    for modality in job.channels:
        path = job.case.images.get(modality)
        if path is None:
            result.missing.append(modality)
            continue
        try:
            image = read_image(path, (3,))
        except (ValueError, FileNotFoundError) as error:
            result.problems.append(str(error))
            continue
        if is_empty(image):
            result.missing.append(modality)
            empty.append(modality)
            continue
        if volumes:
            first = next(iter(volumes))
            doubt, difference = two_places(path, job.case.images[first]), image_difference(image, volumes[first])
            if doubt or difference:
                result.problems.append(
                    doubt or f"{path} is not on the grid of {job.case.images[first].name}: {difference}"
                )
        volumes[modality] = image
    if result.missing and not job.missing_ok:
        absent = [name for name in result.missing if name not in (*empty, *job.taken)]
        if absent:
            unknown = ", ".join(path.name for path in job.case.unknown)
            if unknown:  # most likely the one that is sought: zeros in its place would be a pity
                result.problems.append(
                    f"no file for {', '.join(absent)}, but {unknown} is there, whose name says no sequence: name it "
                    f"{job.case.name}{_suffixes(job.case, absent)}, or allow the case with --missing_ok"
                )
            else:
                result.problems.append(f"no file for {', '.join(absent)} (allow with --missing_ok)")
        if empty:
            result.problems.append(f"zero all over: {', '.join(empty)} (allow with --missing_ok)")
    return volumes


def _suffixes(case: Case, modalities: Sequence[str]) -> str:
    """Return how the files of modalities are to end, in the naming of a case's other files."""
    files = [path.name[len(case.name) :] for path in case.images.values() if path.name.startswith(case.name)]
    naming = "brats2023" if files and files[0].startswith("-") else "brats2021"
    return " or ".join(f"{BRATS_FILE_SUFFIXES[naming][name]}{FILE_ENDING}" for name in modalities)


def _write_image(
    volume: sitk.Image | None, source: Path | None, reference: sitk.Image, target: Path, link: bool
) -> None:
    if volume is None or source is None:
        empty = sitk.Image(reference.GetSize(), sitk.sitkUInt8)
        empty.CopyInformation(reference)
        write_image(empty, target)
    elif not source.name.lower().endswith(FILE_ENDING) or not same_header(volume, reference):
        volume.CopyInformation(reference)
        write_image(volume, target)
    elif link:
        os.symlink(source.resolve(), target)
    else:
        shutil.copyfile(source, target)


def same_header(image: sitk.Image, reference: sitk.Image) -> bool:
    """Return whether nnU-Net will see one grid in two volumes (it compares spacings with a relative 1e-5)."""
    return all(
        np.allclose(getattr(image, f"Get{what}")(), getattr(reference, f"Get{what}")())
        for what in ("Spacing", "Origin", "Direction")
    )


def is_empty(image: sitk.Image) -> bool:
    """Return whether a volume is zero all over, which for us means an absent sequence."""
    return not sitk.GetArrayViewFromImage(image).any()


def read_segmentation(path: Path, convention: str, reference: sitk.Image) -> tuple[sitk.Image, tuple[int, ...]]:
    """Read a BraTS segmentation as nnU-Net labels on the grid of an image.

    Args:
        path: label file, integers or integral floats.
        convention: meaning of its values, one of `labels.CONVENTIONS`.
        reference: an image of the case.

    Returns:
        uint8 volume with nnU-Net's values and exactly the geometry of ``reference``, and the nnU-Net labels it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, lies on another grid, or holds unexpected values.
    """
    image = read_image(path, (3,))
    difference = image_difference(image, reference)
    if difference:
        raise ValueError(f"{path} is not on the grid of the images: {difference}{told_apart(path)}")
    values = whole_numbers(path, sitk.GetArrayViewFromImage(image))
    try:
        labels = to_nnunet(values, convention)
    except ValueError as error:
        raise ValueError(f"{path}: {error}{_hint(values, convention)}") from error
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(reference)
    return result, tuple(np.flatnonzero(np.bincount(labels.ravel(), minlength=5)).tolist())


def _hint(labels: NDArray[Any], convention: str) -> str:
    found = set(np.unique(labels).tolist())
    if convention == "brats2021" and 3 in found and found <= {0, 1, 2, 3}:
        return "; if 3 is the enhancing tumour, give --label_convention brats2023"
    if len(found) == 2 and 0 in found and max(found) > 4:
        return (
            f"; 0 and {max(found)} look like a mask of one structure saved as a picture, not like a BraTS segmentation"
        )
    return ""
