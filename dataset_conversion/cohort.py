"""Converts cases of any disease, of which some lack modalities, into an nnU-Net raw data set without placeholders."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.bad_cases import bad_case_lines, bad_cases_text, without_bad_cases
from nnunetv2_mgml.dataset_conversion.case_writer import same_header
from nnunetv2_mgml.dataset_conversion.dataset_folder import FILE_ENDING, building, check_target, refuse_files_inside
from nnunetv2_mgml.dataset_conversion.splits import (
    Split,
    check_existing_split,
    choose_split,
    notes_on_preprocessed,
    write_splits,
)
from nnunetv2_mgml.io.case_files import CaseFiles, FoundCases, ending_in_name
from nnunetv2_mgml.io.files import replacing_folder, write_json
from nnunetv2_mgml.io.forms import told_apart, two_places
from nnunetv2_mgml.io.grid import image_difference
from nnunetv2_mgml.io.volumes import read_image, whole_numbers, write_image
from nnunetv2_mgml.io.workers import run_jobs
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.cohort import MISSING_FILE, PATIENTS_FILE, SITES_FILE
from nnunetv2_mgml.plans.folders import PREPROCESSED, RAW, dataset_folder_name, nnunet_folder

LARGEST_LABEL = 255
IGNORE = "ignore"
"""Name of the label that nnU-Net takes for voxels without annotation."""


@dataclass(frozen=True)
class CohortRequest:
    """What `convert_cohort` is asked for."""

    found: FoundCases
    """The cases, from one of the functions of `io.case_files` and `io.case_sheet`."""
    dataset_id: int
    """nnU-Net dataset id, 1 to 999."""
    name: str
    """Dataset name."""
    labels: Mapping[str, int] = field(default_factory=dict)
    """Name -> value in the label maps, in the order of nnU-Net's values 1, 2, ...; ``ignore`` gets the last. Empty:
    every value there is."""
    link: bool = False
    """Make symbolic links to ``.nii.gz`` images instead of copies."""
    skip_bad: bool = False
    """Convert the good cases although others are bad."""
    overwrite: bool = False
    """Replace an existing data set of the same id and name."""
    split: str | None = None
    """``A:B:C`` (`splits.parse_ratio`), or one of `splits.PUBLISHED`."""
    split_files: Sequence[str | Path] | None = None
    """Lists of training, validation and test cases; see `splits.split_from_files`."""
    seed: int = 0
    """Seed of a random split."""
    num_processes: int | None = None
    """Worker processes, None for the smaller of 4 and the number of CPUs."""


@dataclass(frozen=True)
class CohortSummary:
    """What `convert_cohort` wrote.

    Attributes:
        folder: the new data set.
        channels: modality names in channel order.
        labels: name -> (value in the label maps, value in nnU-Net's).
        num_training: cases in ``imagesTr``.
        num_test: cases in ``imagesTs``, with or without label.
        missing: case -> absent modalities.
        skipped: case -> why it was not converted; empty unless ``skip_bad``.
        split: the fixed split, or None.
        left_out: labelled cases that are in none of the split lists.
        left_over: images that no pattern matches, below the source.
        seconds: wall-clock time.
        notes: remarks for the user.
    """

    folder: Path
    channels: tuple[str, ...]
    labels: dict[str, tuple[int, int]]
    num_training: int
    num_test: int
    missing: dict[str, tuple[str, ...]]
    skipped: dict[str, list[str]]
    split: Split | None
    left_out: tuple[str, ...]
    seconds: float
    left_over: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    case: CaseFiles
    modalities: tuple[str, ...]
    images: Path
    link: bool
    labelled: bool


@dataclass
class _Result:
    problems: list[str] = field(default_factory=list)
    missing: tuple[str, ...] = ()
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class _LabelJob:
    source: Path
    target: Path
    image: Path
    table: tuple[int, ...]
    """nnU-Net's value of each value in the source."""


def convert_cohort(request: CohortRequest, *, progress: bool = False) -> CohortSummary:
    """Convert cases to ``nnUNet_raw/DatasetXXX_NAME``; what a case lacks gets no file and is recorded.

    A volume that has one value everywhere counts as absent. Absent modalities are listed in
    ``missing_modalities.json``; sites, where the cases have some, in ``case_sites.json``.

    Args:
        request: what to convert, and how.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: a split list does not exist.
        ValueError: anything wrong with the data (one line per bad case, all of them) or the target. Nothing has been
            written then.
        OSError: the disk is full, or a folder cannot be written to; nothing has been put in place then.
    """
    started = time.perf_counter()
    found = request.found
    channels = channel_names({"channel_names": {str(i): name for i, name in enumerate(found.modalities)}})
    if not any(case.label for case in found.cases):
        raise ValueError(_nothing_to_train(found))
    folder_name = dataset_folder_name(request.dataset_id, request.name)
    target, preprocessed = nnunet_folder(RAW) / folder_name, nnunet_folder(PREPROCESSED) / folder_name
    source = Path(found.origin)
    check_target(source, target, request.dataset_id, request.overwrite)
    refuse_files_inside(target, found.files())
    split, left_out = _choose_split(request)
    if split is not None:
        check_existing_split(split, preprocessed, request.overwrite)
    with building(target) as folder:
        check_target(source, target, request.dataset_id, request.overwrite)  # another conversion may just have finished
        cases = [case for case in found.cases if case.name not in left_out]
        test = {case.name for case in cases if case.label is None} | set(split.test if split else ())
        jobs = [
            _Job(
                case,
                found.modalities,
                folder / f"images{'Ts' if case.name in test else 'Tr'}",
                request.link,
                case.label is not None,
            )
            for case in cases
        ]
        results = run_jobs(_convert_images, jobs, request.num_processes, "Converting", progress)
        bad_cases = {
            **found.problems,
            **{case.name: result.problems for case, result in zip(cases, results, strict=True) if result.problems},
        }
        if bad_cases and not request.skip_bad:
            raise ValueError(bad_cases_text(bad_cases, len(cases) + len(found.problems)))
        good = [(case, result) for case, result in zip(cases, results, strict=True) if not result.problems]
        split = without_bad_cases(split, bad_cases)
        training = [case for case, _ in good if case.name not in test]
        if not training:
            raise ValueError(f"No training case is left. {bad_cases_text(bad_cases, len(cases) + len(found.problems))}")
        labels = _number_labels(request.labels, {value for _, result in good for value in result.values})
        _write_labels(folder, good, test, labels, found.modalities, request.num_processes)
        missing = {case.name: result.missing for case, result in good if result.missing}
        _check_channels(found.modalities, training, missing)
        write_json(
            folder / "dataset.json",
            {
                "channel_names": {str(i): name for i, name in enumerate(found.modalities)},
                "labels": {"background": 0, **{name: new for name, (_, new) in labels.items()}},
                "numTraining": len(training),
                "file_ending": FILE_ENDING,
                "name": folder_name,
                "description": f"Converted by mgml convert from {source.name}",  # travels with models: no path
            },
        )
        if missing:
            write_json(folder / MISSING_FILE, missing)
        sites = {case.name: case.site for case, _ in good if case.site is not None}
        if sites:
            write_json(folder / SITES_FILE, sites)
        if patients := _patients(case for case, _ in good):
            numbers = {name: str(n) for n, name in enumerate(dict.fromkeys(patients.values()))}
            write_json(folder / PATIENTS_FILE, {case: numbers[name] for case, name in patients.items()})
        if split is not None:  # fails here rather than after the data set is in place
            preprocessed.mkdir(parents=True, exist_ok=True)
    if split is not None:
        write_splits(split, preprocessed, overwrite=True)
    return CohortSummary(
        target,
        channels,
        labels,
        len(training),
        len(good) - len(training),
        missing,
        bad_cases,
        split,
        left_out,
        time.perf_counter() - started,
        tuple(path.relative_to(source) for path in found.left_over),
        tuple(notes_on_preprocessed(preprocessed, split is not None)),
    )


@dataclass(frozen=True)
class WrittenImages:
    """What `write_images` wrote."""

    missing: dict[str, tuple[str, ...]]
    """Case -> absent modalities, of every case written."""
    skipped: dict[str, list[str]]
    """Case -> why it was not written; empty unless ``skip_bad``."""


def write_images(
    found: FoundCases,
    target: Path,
    *,
    skip_bad: bool = False,
    overwrite: bool = False,
    num_processes: int | None = None,
    progress: bool = False,
) -> WrittenImages:
    """Write cases without labels as ``CASE_XXXX.nii.gz``, ready for prediction; an absent modality gets no file.

    Args:
        found: the cases; channels are numbered in the order of their modalities.
        target: folder to write to.
        skip_bad: write the good cases although others are bad.
        overwrite: whether ``target`` may be replaced.
        num_processes: worker processes, None for the smaller of 4 and the number of CPUs.
        progress: show a progress bar.

    Raises:
        ValueError: bad cases, all of them, or a target that exists; nothing has been written then.
        OSError: the disk is full, or the folder cannot be written to; nothing has been put in place then.
    """
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists. Give --overwrite to replace it, or choose another folder.")
    target = target.absolute()
    real_source, real_target = Path(found.origin).resolve(), target.resolve()
    if real_source == real_target or real_target in real_source.parents:
        raise ValueError(f"{target} holds the source {found.origin}; write to another folder.")
    refuse_files_inside(target, found.files())
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(target) as folder:
        jobs = [_Job(case, found.modalities, folder, False, False) for case in found.cases]
        results = run_jobs(_convert_images, jobs, num_processes, "Writing", progress)
        good = {job.case.name: r.missing for job, r in zip(jobs, results, strict=True) if not r.problems}
        bad = {
            **found.problems,
            **{job.case.name: r.problems for job, r in zip(jobs, results, strict=True) if r.problems},
        }
        if bad and not (skip_bad and good):
            raise ValueError(bad_cases_text(bad, len(jobs) + len(found.problems)))
    return WrittenImages(good, bad)


# --- one case; runs in worker processes -------------------------------------------------------------------------------
def _convert_images(job: _Job) -> _Result:
    """Check the images and the label map of one case and write its images; bad data is listed, never raised."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    result, case = _Result(), job.case
    if text := ending_in_name(case.name):
        result.problems.append(text)
    volumes: dict[str, sitk.Image] = {}
    empty: list[str] = []
    for modality, path in case.images.items():
        try:
            image = _read(path, case.frames.get(modality), len(case.frames))
        except (ValueError, FileNotFoundError) as error:
            result.problems.append(str(error))
            continue
        values = sitk.GetArrayViewFromImage(image)
        if not np.any(values != values.flat[0]):
            empty.append(modality)
            continue
        if volumes:
            first = next(iter(volumes))
            doubt, difference = two_places(path, case.images[first]), image_difference(image, volumes[first])
            if doubt or difference:
                result.problems.append(doubt or f"{path} is not on the grid of {case.images[first].name}: {difference}")
        volumes[modality] = image
    result.missing = tuple(name for name in job.modalities if name not in volumes)
    if not volumes:
        result.problems = result.problems or [f"one value everywhere in {', '.join(empty)}, so no image is left"]
        return result
    reference = next(iter(volumes.values()))
    if job.labelled and case.label is not None:
        try:
            label = _read(case.label)
            difference = image_difference(label, reference)
            if difference:
                result.problems.append(
                    f"{case.label} is not on the grid of the images: {difference}{told_apart(case.label)}. "
                    f"Resample it to their grid (nearest neighbour)"
                )
            values = whole_numbers(case.label, sitk.GetArrayViewFromImage(label))
            result.values = tuple(int(value) for value in np.unique(values))
            wrong = [value for value in result.values if not 0 <= value <= LARGEST_LABEL]
            if wrong:
                result.problems.append(f"{case.label} has the value {wrong[0]}; label values are 0 to {LARGEST_LABEL}")
        except (ValueError, FileNotFoundError) as error:
            result.problems.append(str(error))
    if result.problems:
        return result
    for modality, image in volumes.items():
        target = job.images / f"{case.name}_{job.modalities.index(modality):04d}{FILE_ENDING}"
        path = case.images[modality]
        as_it_is = modality not in case.frames and path.name.endswith(FILE_ENDING) and same_header(image, reference)
        if as_it_is and job.link:
            os.symlink(path.resolve(), target)
        elif as_it_is:
            shutil.copyfile(path, target)
        else:
            image.CopyInformation(reference)
            write_image(image, target)
    return result


def _read(path: Path, frame: int | None = None, frames: int = 1) -> sitk.Image:
    """Read a volume: one of a 4-D file with ``frames``, or, without ``frame``, of a 3-D file or one of one volume."""
    image = read_image(path, (2, 3, 4) if frame is None else (4,))
    if image.GetDimension() < 4:
        return image
    size = list(image.GetSize())
    if frame is None and size[3] > 1:
        raise ValueError(
            f"{path} holds {size[3]} volumes; a modality has one. Split it, or, if they are the modalities, convert it "
            f"as the Medical Segmentation Decathlon's (mgml convert msd)"
        )
    if frame is not None and size[3] != frames:
        raise ValueError(f"{path} holds {size[3]} volumes, but dataset.json names {frames} modalities")
    volume: sitk.Image = sitk.Extract(image, [*size[:3], 0], [0, 0, 0, frame or 0])
    return volume


def _write_label(job: _LabelJob) -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    image = _read(job.source)  # a view does not keep its image alive
    values = whole_numbers(job.source, sitk.GetArrayViewFromImage(image))
    label = sitk.GetImageFromArray(np.asarray(job.table, dtype=np.uint8)[values])
    label.CopyInformation(sitk.ReadImage(str(job.image)))
    write_image(label, job.target)


# --- labels and splits ------------------------------------------------------------------------------------------------
def _number_labels(names: Mapping[str, int], found: Iterable[int]) -> dict[str, tuple[int, int]]:
    """Return name -> (value there, value for nnU-Net), whose values follow each other."""
    values = sorted(set(found) - {0})
    if names:
        if len(set(names.values())) < len(names) or "background" in names or 0 in names.values():
            raise ValueError(f"--labels must give each name a value of its own above 0; got {dict(names)}.")
        unknown = [value for value in values if value not in names.values()]
        if unknown:
            raise ValueError(
                f"The label maps also have {', '.join(map(str, unknown))}; name every value with --labels."
            )
        ordered = sorted(names, key=lambda name: name == IGNORE)  # which nnU-Net wants to be the highest
        return {name: (names[name], new) for new, name in enumerate(ordered, 1)}
    if not values:
        raise ValueError("The label maps are empty in every case, so nothing can be learned.")
    return {f"label_{value}": (value, new) for new, value in enumerate(values, 1)}


def _write_labels(
    folder: Path,
    good: Sequence[tuple[CaseFiles, _Result]],
    test: set[str],
    labels: Mapping[str, tuple[int, int]],
    modalities: Sequence[str],
    num_processes: int | None,
) -> None:
    table = [0] * (LARGEST_LABEL + 1)
    for old, new in labels.values():
        table[old] = new
    jobs = []
    for case, result in good:
        if case.label is not None:
            part = "Ts" if case.name in test else "Tr"
            channel = next(c for c, name in enumerate(modalities) if name not in result.missing)
            image = folder / f"images{part}" / f"{case.name}_{channel:04d}{FILE_ENDING}"
            target = folder / f"labels{part}" / f"{case.name}{FILE_ENDING}"
            jobs.append(_LabelJob(case.label, target, image, tuple(table)))
    run_jobs(_write_label, jobs, num_processes, "Labels", progress=False)


def _check_channels(
    modalities: Sequence[str], training: Sequence[CaseFiles], missing: Mapping[str, Sequence[str]]
) -> None:
    never = [name for name in modalities if all(name in missing.get(case.name, ()) for case in training)]
    if never:
        raise ValueError(f"No training case has {', '.join(never)}, so nothing can be learned from it. Leave it out.")


def _nothing_to_train(found: FoundCases) -> str:
    """Say why no case that was found can be trained with."""
    bad, good = found.problems, len(found.cases)
    if bad and not good:
        return bad_cases_text(bad, len(bad))
    which = f"None of the {good} case(s)" if bad else "No case"
    text = (
        f"{which} of {found.origin} has a label map, so nothing can be trained. Say where the label maps are, or "
        f"write images for prediction: mgml convert images."
    )
    return "\n".join([text, f"{len(bad)} more case(s) are bad:", *bad_case_lines(bad)]) if bad else text


def _patients(cases: Iterable[CaseFiles]) -> dict[str, str]:
    """Return case -> patient of those whose source says it."""
    return {case.name: case.patient for case in cases if case.patient is not None}


def _choose_split(request: CohortRequest) -> tuple[Split | None, tuple[str, ...]]:
    labelled = [case.name for case in request.found.cases if case.label is not None]
    patients = _patients(request.found.cases)
    bad = request.found.problems
    return choose_split(labelled, bad, request.split, request.split_files, request.seed, patients)
