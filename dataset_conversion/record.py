"""Records what an existing nnU-Net raw data set lacks: files that do not exist, and placeholder volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.io.volumes import read_image
from nnunetv2_mgml.io.workers import run_jobs
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.cohort import MISSING_FILE, RawCase, raw_cases, read_dataset_json, read_missing


def record_missing(
    folder: Path, *, num_processes: int | None = None, progress: bool = False
) -> dict[str, tuple[str, ...]]:
    """Write ``missing_modalities.json`` into a raw data set, and nothing else.

    Every image is read: a volume with one value everywhere is a placeholder. What is recorded already stays recorded.

    Args:
        folder: ``nnUNet_raw/DatasetXXX_NAME``.
        num_processes: worker processes, None for the smaller of 4 and the number of CPUs.
        progress: show a progress bar.

    Returns:
        Case -> modalities it lacks, of the incomplete cases, those of ``imagesTs`` that were recorded before included.

    Raises:
        FileNotFoundError, ValueError: the data set is not one (`plans.cohort.raw_cases`), an image is damaged, or a
            case has no image but placeholders.
    """
    channels = channel_names(read_dataset_json(folder))
    cases = raw_cases(folder)
    placeholders = run_jobs(_placeholders, cases, num_processes, "Reading", progress)
    record = dict(read_missing(folder, channels))
    for case, empty in zip(cases, placeholders, strict=True):
        absent = tuple(name for c, name in enumerate(channels) if c not in case.files or c in empty)
        if len(absent) == len(channels):
            raise ValueError(f"Case {case.name}: every image has one value everywhere. Remove the case.")
        if absent:
            record[case.name] = absent
    if record:
        write_json(folder / MISSING_FILE, record)
    return record


def _placeholders(case: RawCase) -> tuple[int, ...]:
    """Return the channels whose volume has one value everywhere; runs in worker processes."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    empty = []
    for channel, path in case.files.items():
        image = read_image(path)  # a view does not keep its image alive
        values = sitk.GetArrayViewFromImage(image)
        if not np.any(values != values.flat[0]):
            empty.append(channel)
    return tuple(empty)
