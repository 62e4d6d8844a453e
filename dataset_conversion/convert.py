"""Converts a BraTS folder into an nnU-Net raw dataset: all cases or none, in one step."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_mgml.dataset_conversion.bad_cases import bad_cases_text, without_bad_cases
from nnunetv2_mgml.dataset_conversion.case_writer import CaseResult, Job, convert_case
from nnunetv2_mgml.dataset_conversion.dataset_folder import (
    building,
    check_target,
    refuse_files_inside,
    write_description,
)
from nnunetv2_mgml.dataset_conversion.discovery import Case, Discovery, discover, edition
from nnunetv2_mgml.dataset_conversion.labels import CONVENTIONS, RESECTION_CAVITY
from nnunetv2_mgml.dataset_conversion.missing import check_rates, draw_missing
from nnunetv2_mgml.dataset_conversion.splits import (
    Split,
    check_existing_split,
    choose_split,
    notes_on_preprocessed,
    write_splits,
)
from nnunetv2_mgml.io.workers import run_jobs
from nnunetv2_mgml.modalities import BRATS_CHANNELS, subset_from_present
from nnunetv2_mgml.plans.folders import PREPROCESSED, RAW, dataset_folder_name, nnunet_folder

Converted = list[tuple[Case, CaseResult]]


@dataclass(frozen=True)
class ConversionSummary:
    """What `convert_brats` found and wrote.

    Attributes:
        folder: the new dataset, ``nnUNet_raw/DatasetXXX_NAME``.
        editions: BraTS edition -> number of converted cases.
        conventions: label convention -> number of converted cases.
        labels: nnU-Net label values found in the segmentations, ascending.
        num_training: cases in ``imagesTr``.
        num_held_out: labelled cases in ``imagesTs`` and ``labelsTs`` (test part of the split).
        num_unlabelled: cases without segmentation, in ``imagesTs``.
        missing: case -> absent modalities (canonical names).
        skipped: case -> why it was not converted; empty unless ``skip_bad``.
        split: the fixed split, or None.
        splits_file: where it was written, or None.
        left_out: labelled cases that are in none of the split lists.
        notes: remarks for the user.
        seconds: wall-clock time.
        channels: canonical modality names in channel order.
    """

    folder: Path
    editions: dict[str, int]
    conventions: dict[str, int]
    labels: tuple[int, ...]
    num_training: int
    num_held_out: int
    num_unlabelled: int
    missing: dict[str, list[str]]
    skipped: dict[str, list[str]]
    split: Split | None
    splits_file: Path | None
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    channels: tuple[str, ...] = BRATS_CHANNELS


@dataclass(frozen=True)
class ConversionRequest:
    """What `convert` is asked for."""

    source: str | Path
    """Folder with the cases, at any depth."""
    dataset_id: int
    """nnU-Net dataset id, 1 to 999."""
    name: str | None = None
    """Dataset name; None takes the edition, such as ``BraTS2021``."""
    link: bool = False
    """Make symbolic links to ``.nii.gz`` images instead of copies."""
    missing_ok: bool = False
    """Accept cases that lack sequences and write empty volumes for these."""
    skip_bad: bool = False
    """Convert the good cases although others are bad."""
    overwrite: bool = False
    """Replace an existing dataset of the same id and name."""
    split: str | None = None
    """``paper2020``, ``paper2023`` or ``A:B:C`` (`splits.parse_ratio`), or one of `splits.PUBLISHED`."""
    split_files: Sequence[str | Path] | None = None
    """Lists of training, validation and test cases; see `splits.split_from_files`."""
    seed: int = 0
    """Seed of a random split, and of what is drawn by ``missing_rates``."""
    missing_rates: Mapping[str, float] | None = None
    """Modality -> chance in [0, 1) that a case of the training part lacks it, drawn once per case among what it has
    (`missing.draw_missing`) and written as if the file did not exist. Needs a split: validation and test cases stay
    whole."""
    subset_of: Sequence[str] | None = None
    """Modalities to take, in BraTS's order whatever the order here; None for all four."""
    label_convention: str = "auto"
    """``auto`` (told by the file names), ``brats2021`` or ``brats2023``."""
    plain_labels: bool = False
    """Let networks learn labels that exclude one another, as published losses want it, instead of the regions WT, TC
    and ET."""
    num_processes: int | None = None
    """Worker processes, None for the smaller of 4 and the number of CPUs. With more than one, a script that converts
    needs the usual ``if __name__ == "__main__":``."""


def convert_brats(
    source: str | Path,
    dataset_id: int,
    name: str | None = None,
    *,
    link: bool = False,
    missing_ok: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    split: str | None = None,
    split_files: Sequence[str | Path] | None = None,
    seed: int = 0,
    missing_rates: Mapping[str, float] | None = None,
    subset_of: Sequence[str] | None = None,
    label_convention: str = "auto",
    plain_labels: bool = False,
    num_processes: int | None = None,
    progress: bool = False,
) -> ConversionSummary:
    """Convert a BraTS folder of any edition from 2018 to 2025 to ``nnUNet_raw/DatasetXXX_NAME``.

    The arguments are the fields of `ConversionRequest`, and ``progress`` shows a bar; the rest is as in `convert`.
    """
    request = ConversionRequest(
        source=source,
        dataset_id=dataset_id,
        name=name,
        link=link,
        missing_ok=missing_ok,
        skip_bad=skip_bad,
        overwrite=overwrite,
        split=split,
        split_files=split_files,
        seed=seed,
        missing_rates=missing_rates,
        subset_of=subset_of,
        label_convention=label_convention,
        plain_labels=plain_labels,
        num_processes=num_processes,
    )
    return convert(request, progress=progress)


def convert(request: ConversionRequest, *, progress: bool = False) -> ConversionSummary:
    """Convert a BraTS folder of any edition from 2018 to 2025 to ``nnUNet_raw/DatasetXXX_NAME``.

    Args:
        request: what to convert, and how.
        progress: show a progress bar.

    Returns:
        Summary of what was recognised and written.

    Raises:
        FileNotFoundError: the source or a split list does not exist.
        ValueError: anything wrong with the data (one line per bad case, all of them) or the target. Nothing has been
            written then.
        OSError: the disk is full, or a folder cannot be written to; nothing has been put in place then.
    """
    started = time.perf_counter()
    source = Path(request.source).expanduser().absolute()
    channels = _channels(request)
    rates = check_rates(request.missing_rates or {})
    found = _discover(source, request.label_convention)
    folder_name = dataset_folder_name(request.dataset_id, request.name or _default_name(found))
    target = nnunet_folder(RAW) / folder_name
    check_target(source, target, request.dataset_id, request.overwrite)
    refuse_files_inside(target, found.files())
    chosen, left_out = choose_split(_labelled(found), found.problems, request.split, request.split_files, request.seed)
    if chosen is not None:
        check_existing_split(chosen, nnunet_folder(PREPROCESSED) / folder_name, request.overwrite)
    missing = _missing_by_rate(found, chosen, rates, request.seed)
    with building(target) as folder:
        check_target(source, target, request.dataset_id, request.overwrite)  # another conversion may just have finished
        held_out = set(chosen.test) if chosen else set()
        jobs = [
            _job(case, folder, case.name in held_out, missing.get(case.name, ()), channels, request)
            for case in found.cases
            if case.name not in left_out
        ]
        results = run_jobs(convert_case, jobs, request.num_processes, "Converting", progress)
        bad = {**found.problems, **{r.name: r.problems for r in results if r.problems}}
        if bad and not request.skip_bad:
            raise ValueError(bad_cases_text(bad, len(jobs) + len(found.problems)))
        good = [(job.case, result) for job, result in zip(jobs, results, strict=True) if not result.problems]
        summary = _summary(target, good, bad, held_out, without_bad_cases(chosen, bad), left_out, found.notes)
        write_description(
            folder,
            folder_name,
            ", ".join(summary.editions),
            summary.num_training,
            RESECTION_CAVITY in summary.labels,
            summary.missing,
            channels,
            request.plain_labels,
        )
        if chosen is not None:  # fails here rather than after the dataset is in place
            (nnunet_folder(PREPROCESSED) / folder_name).mkdir(parents=True, exist_ok=True)
    splits_file = (
        write_splits(summary.split, nnunet_folder(PREPROCESSED) / folder_name, overwrite=True)
        if summary.split is not None
        else None
    )
    return dataclasses.replace(
        summary,
        splits_file=splits_file,
        channels=channels,
        seconds=time.perf_counter() - started,
        notes=(*summary.notes, *_notes(folder_name, splits_file)),
    )


def _discover(source: Path, label_convention: str) -> Discovery:
    if label_convention not in ("auto", *CONVENTIONS):
        raise ValueError(f"Unknown label convention '{label_convention}'. Allowed: auto, {', '.join(CONVENTIONS)}.")
    found = discover(source, label_convention)
    labelled = _labelled(found)
    paediatric = [name for name in labelled if name.lower().startswith("brats-ped")]
    if paediatric and label_convention == "auto":
        raise ValueError(
            f"{len(paediatric)} case(s) are of the paediatric task, such as {paediatric[0]}. Names do not tell what "
            f"its labels mean: in 2023 the same as for gliomas; since 2024 1 is enhancing, 2 non-enhancing, 3 cyst, "
            f"4 edema. For data of 2023 give --label_convention brats2023; later data are not supported."
        )
    if not found.cases:
        raise ValueError(bad_cases_text(found.problems, len(found.problems)))
    if not labelled:
        raise ValueError(
            f"None of the {len(found.cases)} case(s) in {source} has a segmentation (<case>_seg.nii.gz or "
            f"<case>-seg.nii.gz), so nothing can be trained. Give the folder of the training data."
        )
    return found


def _labelled(found: Discovery) -> list[str]:
    return [case.name for case in found.cases if case.segmentation is not None]


def _default_name(found: Discovery) -> str:
    names = {edition(case.name) for case in found.cases}
    return names.pop() if len(names) == 1 else "BraTS"


def _missing_by_rate(
    found: Discovery, split: Split | None, rates: Mapping[str, float], seed: int
) -> dict[str, tuple[str, ...]]:
    """Return case -> modalities that it has and is to lack, where there are rates for it."""
    if not rates:
        return {}
    if split is None:
        raise ValueError("--missing_rate is for the training part of a split; give --split or --split_files too.")
    training = set(split.train)
    available = {case.name: case.images for case in found.cases if case.name in training}
    return draw_missing(available, rates, seed, available)


def _channels(request: ConversionRequest) -> tuple[str, ...]:
    """Return the modalities to write, in channel order."""
    if request.subset_of is None:
        return BRATS_CHANNELS
    if request.missing_rates:
        raise ValueError("Give either --subset_of or --missing_rate: its rates are of all four modalities.")
    subset = subset_from_present(request.subset_of, BRATS_CHANNELS, "BraTS")
    return tuple(name for name, taken in zip(BRATS_CHANNELS, subset, strict=True) if taken)


def _job(
    case: Case,
    folder: Path,
    held_out: bool,
    taken: Sequence[str],
    channels: tuple[str, ...],
    request: ConversionRequest,
) -> Job:
    part = "Ts" if held_out or case.segmentation is None else "Tr"
    labels = None if case.segmentation is None else folder / f"labels{part}"
    stated = request.label_convention != "auto"
    left = {name: file for name, file in case.images.items() if name not in taken}
    case = dataclasses.replace(case, images=left)
    return Job(case, folder / f"images{part}", labels, request.link, request.missing_ok, stated, channels, tuple(taken))


def _summary(
    target: Path,
    good: Converted,
    bad: dict[str, list[str]],
    held_out: set[str],
    split: Split | None,
    left_out: tuple[str, ...],
    notes: list[str],
) -> ConversionSummary:
    unlabelled = sum(case.segmentation is None for case, _ in good)
    tested = sum(case.name in held_out for case, _ in good)
    if len(good) == unlabelled + tested:
        raise ValueError(f"No training case is left. {bad_cases_text(bad, len(bad))}")
    conventions = Counter(case.convention for case, _ in good)
    if len(conventions) > 1:
        notes = [
            *notes,
            "two label conventions in one folder; each case was read by its own. BraTS 2023 holds the "
            "patients of 2021 under new numbers: make sure that none is in twice",
        ]
    return ConversionSummary(
        folder=target,
        editions=dict(sorted(Counter(edition(case.name) for case, _ in good).items())),
        conventions=dict(sorted(conventions.items())),
        labels=tuple(sorted({label for _, result in good for label in result.labels})),
        num_training=len(good) - unlabelled - tested,
        num_held_out=tested,
        num_unlabelled=unlabelled,
        missing={result.name: result.missing for _, result in good if result.missing},
        skipped=bad,
        split=split,
        splits_file=None,
        left_out=left_out,
        notes=tuple(notes),
        seconds=0.0,
    )


def _notes(folder_name: str, splits_file: Path | None) -> list[str]:
    if not os.environ.get(PREPROCESSED):
        return []
    return notes_on_preprocessed(nnunet_folder(PREPROCESSED) / folder_name, splits_file is not None)
