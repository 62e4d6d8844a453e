"""Writes predictions back with the label values of BraTS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.discovery import nifti_stem
from nnunetv2_mgml.dataset_conversion.labels import ENHANCING, RESECTION_CAVITY, allowed_values, from_nnunet
from nnunetv2_mgml.io.files import naming, only_writer, read_json, scratch
from nnunetv2_mgml.io.label_mark import mark, marked, refuse_marked
from nnunetv2_mgml.io.volumes import read_image, whole_numbers, write_image
from nnunetv2_mgml.io.workers import run_jobs


@dataclass(frozen=True)
class BackRequest:
    """What `write_back` is asked for."""

    source: str | Path
    """Folder of nnU-Net predictions or labels (``.nii.gz`` or ``.nii``, values 0 to 4)."""
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
        ValueError: no or unusable files (one line each, all of them), or a target that exists. Nothing is written then.
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
    before = marked(target)
    kept = sorted({p.name for p in target.glob("*.nii*")} - {p.name for p in files}) if before else []
    if before != convention and kept:
        raise ValueError(
            f"{target} holds label maps with the values of {before} that would stay, such as {kept[0]}. Choose another "
            f"folder, so that all label maps of one have the same values."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        only_writer(target.absolute()),
        scratch(target.absolute().parent) as building,
        naming(target, building),
    ):
        done = run_jobs(
            _convert,
            [_Job(path, building / path.name, convention) for path in files],
            request.num_processes,
            "Converting back",
            progress,
        )
        bad = [f"  {problem}" for problem, _ in done if problem]
        if bad:
            raise ValueError(
                "\n".join([f"{len(bad)} of {len(files)} file(s) are bad; nothing has been written.", *bad])
            )
        _refuse_other_values(source, {label for _, labels in done for label in labels})
        target.mkdir(parents=True, exist_ok=True)
        mark(target, convention)
        for path in files:
            os.replace(building / path.name, target / path.name)
    return [target / path.name for path in files]


def _refuse_other_values(source: Path, found: set[int]) -> None:
    """Raise a ValueError where values say that a folder does not hold nnU-Net's labels, but those of BraTS 2021."""
    if RESECTION_CAVITY not in found:
        return
    known = _labels_of_data_set(source)
    if known is None and ENHANCING in found:
        return
    if known is None or RESECTION_CAVITY not in known:
        why = "but none has 3, the enhancing tumour" if known is None else "which its dataset.json does not have"
        raise ValueError(
            f"Label maps in {source} have the value 4, nnU-Net's resection cavity, {why}. Are these the values of "
            f"BraTS up to 2021, where 4 is the enhancing tumour? mgml convert back takes nnU-Net's. If so, put the "
            f"dataset.json of their data set beside them. Nothing has been written."
        )


def _labels_of_data_set(source: Path) -> set[int] | None:
    """Return the labels that the ``dataset.json`` beside label maps knows; None where there is none."""
    for file in (source / "dataset.json", source.parent / "dataset.json"):
        try:
            values = read_json(file)["labels"].values()
            return {int(label) for value in values for label in (value if isinstance(value, list) else [value])}
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # none, or of something else
            continue
    return None


def _convert(job: _Job) -> tuple[str | None, list[int]]:
    """Convert one file; return what is wrong with it, or None, and the labels it holds."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        image = read_image(job.source, (3,))
        values = whole_numbers(job.source, sitk.GetArrayViewFromImage(image))
        labels = from_nnunet(values, job.convention)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return text if text.startswith(str(job.source)) else f"{job.source}: {text}", []
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(image)
    write_image(result, job.target)
    return None, [int(label) for label in np.unique(values)]
