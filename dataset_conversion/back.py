"""Writes predictions back with the label values of BraTS."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.checks import read_volume
from nnunetv2_mgml.dataset_conversion.discovery import nifti_stem
from nnunetv2_mgml.dataset_conversion.labels import allowed_values, from_nnunet
from nnunetv2_mgml.dataset_conversion.parallel import run_jobs


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
    building = target.absolute().with_name(f".{target.name}.incomplete-{os.getpid()}")
    building.mkdir(parents=True)
    try:
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
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return [target / path.name for path in files]


def _convert(job: _Job) -> str | None:
    """Convert one file; return what is wrong with it, or None."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        image = read_volume(job.source)
        labels = from_nnunet(sitk.GetArrayViewFromImage(image), job.convention)
    except ValueError as error:
        text = str(error)
        return text if text.startswith(job.source.name) else f"{job.source.name}: {text}"
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(image)
    sitk.WriteImage(result, str(job.target), True)
    return None
