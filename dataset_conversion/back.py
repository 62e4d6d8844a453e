"""Writes predictions back with the label values of BraTS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.discovery import nifti_stem
from nnunetv2_mgml.dataset_conversion.labels import (
    ENHANCING,
    LABELS,
    REGIONS,
    RESECTION_CAVITY,
    allowed_values,
    from_nnunet,
    our_labels,
    renumber,
)
from nnunetv2_mgml.io.files import naming, only_writer, read_json, scratch
from nnunetv2_mgml.io.label_mark import MARK_FILE, mark, marked, refuse_marked
from nnunetv2_mgml.io.volumes import read_image, whole_numbers, write_image
from nnunetv2_mgml.io.workers import run_jobs


@dataclass(frozen=True)
class BackRequest:
    """What `write_back` is asked for."""

    source: str | Path
    """Folder of nnU-Net predictions or labels (``.nii.gz`` or ``.nii``). Their values are those of our conversion, or
    what the ``dataset.json`` beside them or their folder says (`labels.our_labels`)."""
    target: str | Path
    """Folder to write to, created if need be."""
    convention: str
    """One of `labels.CONVENTIONS`."""
    overwrite: bool = False
    """Replace files in ``target``."""
    num_processes: int | None = None
    """Worker processes, None for the smaller of 4 and the number of CPUs."""


@dataclass(frozen=True)
class _Job:
    source: Path
    target: Path
    convention: str
    numbering: dict[int, int] | None
    """Value there -> our label; None where they are ours."""


def convert_back(
    source: str | Path,
    target: str | Path,
    convention: str,
    *,
    overwrite: bool = False,
    num_processes: int | None = None,
    progress: bool = False,
) -> list[Path]:
    """Write all segmentations of a folder with BraTS values; file names and geometry stay.

    The arguments are the fields of `BackRequest`, and ``progress`` shows a bar; the rest is as in `write_back`.
    """
    return write_back(BackRequest(source, target, convention, overwrite, num_processes), progress=progress)


def write_back(request: BackRequest, *, progress: bool = False) -> list[Path]:
    """Write all segmentations of a folder with BraTS values; file names and geometry stay.

    The new folder is marked (`io.label_mark`), so that it is not taken for label maps with nnU-Net's values.

    Args:
        request: which, and where to.
        progress: show a progress bar.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: ``source`` is not a folder.
        ValueError: no or unusable files (one line each, all of them), labels of another data set that are not known, or
            a target that exists or has label maps with other values. Nothing is written then.
    """
    convention = request.convention
    allowed_values(convention)
    source, target = Path(request.source).expanduser(), Path(request.target).expanduser()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give the folder of the predictions.")
    files = sorted(path for path in source.iterdir() if nifti_stem(path.name) and not path.name.startswith("."))
    if not files:
        raise ValueError(f"No .nii.gz or .nii file in {source}.")
    if source.resolve() == target.resolve():
        raise ValueError(f"Source and target are the same folder ({source}); a second run would convert twice.")
    existing = [path.name for path in files if (target / path.name).exists()]
    if existing and not request.overwrite:
        raise ValueError(
            f"{len(existing)} file(s) exist in {target}, such as {existing[0]}. Give --overwrite to replace them."
        )
    refuse_marked(source, "mgml convert back")
    _refuse_mixing(target, convention, {path.name for path in files})
    numbering = _numbering(source)
    ours = numbering is None or all(there == label for there, label in numbering.items())
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        only_writer(target.absolute()),
        scratch(target.absolute().parent) as building,
        naming(target, building),
    ):
        done = run_jobs(
            _convert,
            [_Job(path, building / path.name, convention, None if ours else numbering) for path in files],
            request.num_processes,
            "Converting back",
            progress,
        )
        bad = [f"  {problem}" for problem, _ in done if problem]
        if bad:
            raise ValueError(
                "\n".join([f"{len(bad)} of {len(files)} file(s) are bad; nothing has been written.", *bad])
            )
        known = None if numbering is None else set(numbering.values())
        _refuse_other_values(source, known, {label for _, labels in done for label in labels})
        target.mkdir(parents=True, exist_ok=True)
        mark(target, convention)
        for path in files:
            os.replace(building / path.name, target / path.name)
    return [target / path.name for path in files]


def _refuse_mixing(target: Path, convention: str, written: set[str]) -> None:
    """Raise a ValueError where label maps with other values would stay in the folder to write to."""
    before = marked(target)
    there = {path.name for path in target.glob("*.nii*") if not path.name.startswith(".")}
    kept = sorted(there - written)
    if before != convention and kept:
        whose = f"the values of {before}" if before else f"unknown values (no {MARK_FILE}), perhaps nnU-Net's,"
        raise ValueError(
            f"{target} holds label maps with {whose} that would stay, such as {kept[0]}. Choose another "
            f"folder, so that all label maps of one have the same values."
        )


def _refuse_other_values(source: Path, known: set[int] | None, found: set[int]) -> None:
    """Raise a ValueError where values say that a folder does not hold nnU-Net's labels, but those of BraTS 2021.

    Args:
        source: the folder.
        known: our labels that its data set has, None where nothing says so.
        found: our labels that are there.
    """
    if RESECTION_CAVITY not in found or (known is None and ENHANCING in found):
        return
    if known is None or RESECTION_CAVITY not in known:
        why = "but none has 3, the enhancing tumour" if known is None else "which its dataset.json does not have"
        raise ValueError(
            f"Label maps in {source} have the value 4, nnU-Net's resection cavity, {why}. Are these the values of "
            f"BraTS up to 2021, where 4 is the enhancing tumour? mgml convert back takes nnU-Net's. If so, put the "
            f"dataset.json of their data set beside them. Nothing has been written."
        )


def _numbering(source: Path) -> dict[int, int] | None:
    """Return value -> our label by the ``dataset.json`` beside label maps or their folder; None where there is none.

    Raises:
        ValueError: it has labels that are not known.
    """
    for file in (source / "dataset.json", source.parent / "dataset.json"):
        try:
            content = read_json(file)
        except (FileNotFoundError, ValueError):  # none, or of something else
            continue
        if isinstance(content, dict) and isinstance(content.get("labels"), dict):
            try:
                return our_labels(content)
            except (ValueError, TypeError) as error:
                expected = ", ".join(f"{label.nnunet} {label.name}" for label in LABELS)
                raise ValueError(
                    f"{file} says that the label maps in {source} have labels that mgml convert back does not know: "
                    f"{error}. Expected are the values and regions of mgml convert brats ({expected}; "
                    f"{', '.join(REGIONS)}), or plain labels of these names with any values. Nothing has been written."
                ) from error
    return None


def _convert(job: _Job) -> tuple[str | None, list[int]]:
    """Convert one file; return what is wrong with it, or None, and the labels it holds."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        image = read_image(job.source, (3,))
        values = whole_numbers(job.source, sitk.GetArrayViewFromImage(image))
        if job.numbering is not None:
            values = renumber(values, job.numbering)
        labels = from_nnunet(values, job.convention)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return text if text.startswith(str(job.source)) else f"{job.source}: {text}", []
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(image)
    write_image(result, job.target)
    return None, [int(label) for label in np.unique(values)]
