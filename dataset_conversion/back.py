"""Writes predictions back with the label values of BraTS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.discovery import nifti_stem
from nnunetv2_mgml.dataset_conversion.labels import allowed_values, from_nnunet
from nnunetv2_mgml.io.files import naming, only_writer, scratch
from nnunetv2_mgml.io.volumes import read_image, whole_numbers, write_image
from nnunetv2_mgml.io.workers import run_jobs


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

    Args:
        source: folder of nnU-Net predictions or labels (``.nii.gz`` or ``.nii``, values 0 to 4).
        target: folder to write to, created if need be.
        convention: one of `labels.CONVENTIONS`.
        overwrite: whether files in ``target`` may be replaced.
        num_processes: worker processes, None for the smaller of 4 and the number of CPUs.
        progress: show a progress bar.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: ``source`` is not a folder.
        ValueError: no or unusable files (one line each, all of them), or a target that exists. Nothing is written then.
    """
    allowed_values(convention)
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder. Give the folder of the predictions.")
    files = sorted(path for path in source.iterdir() if nifti_stem(path.name) and not path.name.startswith("."))
    if not files:
        raise ValueError(f"No .nii.gz or .nii file in {source}.")
    if source.resolve() == target.resolve():
        raise ValueError(f"Source and target are the same folder ({source}); a second run would convert twice.")
    existing = [path.name for path in files if (target / path.name).exists()]
    if existing and not overwrite:
        raise ValueError(
            f"{len(existing)} file(s) exist in {target}, such as {existing[0]}. Give --overwrite to replace them."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        only_writer(target.absolute()),
        scratch(target.absolute().parent) as building,
        naming(target, building),
    ):
        problems = run_jobs(
            _convert,
            [_Job(path, building / path.name, convention) for path in files],
            num_processes,
            "Converting back",
            progress,
        )
        bad = [f"  {problem}" for problem in problems if problem]
        if bad:
            raise ValueError(
                "\n".join([f"{len(bad)} of {len(files)} file(s) are bad; nothing has been written.", *bad])
            )
        target.mkdir(parents=True, exist_ok=True)
        for path in files:
            os.replace(building / path.name, target / path.name)
    return [target / path.name for path in files]


def _convert(job: _Job) -> str | None:
    """Convert one file; return what is wrong with it, or None."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        image = read_image(job.source, (3,))
        values = whole_numbers(job.source, sitk.GetArrayViewFromImage(image))
        labels = from_nnunet(values, job.convention)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        return text if text.startswith(str(job.source)) else f"{job.source}: {text}"
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(image)
    write_image(result, job.target)
    return None
