"""Checks one case and writes its files in nnU-Net's naming; runs in worker processes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.checks import (
    geometry_difference,
    is_empty,
    read_segmentation,
    read_volume,
    same_header,
)
from nnunetv2_mgml.dataset_conversion.dataset_folder import FILE_ENDING
from nnunetv2_mgml.dataset_conversion.discovery import Case
from nnunetv2_mgml.modalities import BRATS_CHANNELS


@dataclass(frozen=True)
class Job:
    """One case to convert and where to; ``labels`` is None for a case that gets no label file."""

    case: Case
    images: Path
    labels: Path | None
    link: bool
    missing_ok: bool


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
    volumes = _read_images(job, result)
    if not volumes:
        if not result.problems:
            result.problems.append("no sequence with any content")
        return result
    reference = next(iter(volumes.values()))
    segmentation = None
    if job.labels is not None and job.case.segmentation is not None:
        try:
            segmentation, result.labels = read_segmentation(job.case.segmentation, job.case.convention, reference)
        except ValueError as error:
            result.problems.append(str(error))
    if result.problems:
        return result
    for channel, modality in enumerate(BRATS_CHANNELS):
        target = job.images / f"{job.case.name}_{channel:04d}{FILE_ENDING}"
        _write_image(volumes.get(modality), job.case.images.get(modality), reference, target, job.link)
    if segmentation is not None and job.labels is not None:
        sitk.WriteImage(segmentation, str(job.labels / f"{job.case.name}{FILE_ENDING}"), True)
    return result


def _read_images(job: Job, result: CaseResult) -> dict[str, sitk.Image]:
    """Read the sequences that exist, in channel order; those that are absent or empty go to ``result.missing``."""
    volumes: dict[str, sitk.Image] = {}
    empty: list[str] = []
    for modality in BRATS_CHANNELS:
        path = job.case.images.get(modality)
        if path is None:
            result.missing.append(modality)
            continue
        try:
            image = read_volume(path)
        except ValueError as error:
            result.problems.append(str(error))
            continue
        if is_empty(image):
            result.missing.append(modality)
            empty.append(modality)
            continue
        difference = geometry_difference(image, next(iter(volumes.values()))) if volumes else None
        if difference:
            first = next(iter(volumes))
            result.problems.append(f"{path.name} has {difference} (those of {job.case.images[first].name})")
        volumes[modality] = image
    if result.missing and not job.missing_ok:
        absent = [name for name in result.missing if name not in empty]
        if absent:
            result.problems.append(f"no file for {', '.join(absent)} (allow with --missing_ok)")
        if empty:
            result.problems.append(f"zero all over: {', '.join(empty)} (allow with --missing_ok)")
    return volumes


def _write_image(
    volume: sitk.Image | None, source: Path | None, reference: sitk.Image, target: Path, link: bool
) -> None:
    if volume is None or source is None:
        empty = sitk.Image(reference.GetSize(), sitk.sitkUInt8)
        empty.CopyInformation(reference)
        sitk.WriteImage(empty, str(target), True)
    elif not source.name.lower().endswith(FILE_ENDING) or not same_header(volume, reference):
        volume.CopyInformation(reference)
        sitk.WriteImage(volume, str(target), True)
    elif link:
        os.symlink(source.resolve(), target)
    else:
        shutil.copyfile(source, target)
