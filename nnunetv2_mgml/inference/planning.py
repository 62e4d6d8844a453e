"""Which cases a call predicts, from where, and to which files."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mgml.inference.arguments import check_part
from nnunetv2_mgml.inference.inputs import Case, cases_from_lists, check_source, find_cases
from nnunetv2_mgml.io.case_files import ending_in_name
from nnunetv2_mgml.io.names import some
from nnunetv2_mgml.io.targets import is_same
from nnunetv2_mgml.io.volumes import not_finished, not_finished_archive
from nnunetv2_mgml.plans.cohort import channel_of
from nnunetv2_mgml.upstream.plain_errors import PlainError

_log = logging.getLogger(__name__)


class PlannedCase(NamedTuple):
    """One case, its output file without ending (None: return it) and its previous-stage segmentation."""

    case: Case
    ofile: str | None
    previous_stage: str | None


class Plan(NamedTuple):
    """The work of one call."""

    todo: list[PlannedCase]
    done: list[PlannedCase]
    """Skipped: their output is there and must not be overwritten."""


def plan_cases(
    source: str | Path | Sequence[Sequence[str | Path | None]],
    target: str | Path | list[str] | None,
    previous_stage: str | None,
    file_ending: str,
    channels: Sequence[str],
    *,
    overwrite: bool,
    part_id: int,
    num_parts: int,
    save_probabilities: bool,
    again: Collection[str] = (),
) -> Plan:
    """Work out what to predict; the parameters are those of ``nnUNetPredictor.predict_from_files``.

    Of its own is ``again``: names of cases whose output counts as absent.

    Raises:
        FileNotFoundError: no input folder.
        ValueError: no case, a wrong part, outputs that do not match the inputs, two cases with one output, or an output
            that is one of the images.
    """
    check_part(part_id, num_parts)
    find: Any = find_cases if isinstance(source, (str, Path)) else cases_from_lists
    cases: list[Case] = find(source, file_ending, channels)
    names = [case.name for case in cases]
    planned = []
    for number, (case, ofile) in enumerate(zip(cases, _outputs(names, target), strict=True)):
        segmentation = os.path.join(previous_stage, case.name + file_ending) if previous_stage else None
        if names.count(case.name) > 1:
            case = replace(case, name=f"{case.name} [{number}]")
        planned.append(PlannedCase(case, ofile, segmentation))
    _refuse_images(planned, file_ending)
    _refuse_endings(planned)
    mine = planned[part_id::num_parts]
    kept = [] if overwrite else [p for p in mine if p.case.name not in again]
    done = [p for p in kept if _is_finished(p, file_ending, save_probabilities)]
    return Plan([p for p in mine if p not in done], done)


def check_places(source: Any, target: Any, previous_stage: str | Path | None = None) -> None:
    """Raise, before anything is written, where a call reads and writes one folder, or there is none to read.

    The parameters are those of ``nnUNetPredictor.predict_from_files``.

    Raises:
        FileNotFoundError: no input folder.
        ValueError: the output folder is the input folder, or that of a cascade's previous stage.
    """
    if isinstance(source, (str, Path)):
        check_source(source)
    if not isinstance(target, (str, Path)):
        return
    if isinstance(source, (str, Path)) and is_same(source, target):
        raise ValueError(
            f"The output folder {target} is the input folder; a later run would take segmentations for images. Choose "
            f"another output folder (-o)."
        )
    if previous_stage is not None and is_same(previous_stage, target):
        raise ValueError(
            f"The output folder {target} is that of the previous stage's predictions, which would be replaced. Choose "
            f"another output folder (-o)."
        )


def _refuse_images(planned: Sequence[PlannedCase], file_ending: str) -> None:
    """Raise a ValueError where a segmentation would replace an image: of a sheet, say, that names CASE.nii.gz."""
    images = {os.path.realpath(file) for one in planned for file in one.case.files.values()}
    for one in planned:
        if one.ofile is not None and os.path.realpath(one.ofile + file_ending) in images:
            raise ValueError(
                f"The segmentation of case {one.case.name} would replace an image, {one.ofile + file_ending}. Choose "
                f"another output folder (-o)."
            )


def refuse_without_cases(source: str | Path, file_ending: str, channels: Sequence[str]) -> None:
    """Raise where nnU-Net's own prediction would find no case in an input and end, or stop at the name of a file.

    Args:
        source: folder, or a sheet, which it does not read.
        file_ending: of the model.
        channels: the model's modality names in channel order.

    Raises:
        PlainError: says what is there and what is read.
    """
    if os.path.isdir(source):
        files = sorted(entry.name for entry in os.scandir(source) if entry.is_file())
        ending = [name for name in files if name.endswith(file_ending)]
        unnamed = [name for name in ending if channel_of(name, file_ending) is None]
        if ending and not unnamed:
            return
        what = f"has no channel number in {some(unnamed)}" if ending else f"holds no file that ends in {file_ending}"
    else:
        what = "is no folder"
    raise PlainError(
        f"{source} {what}. Nothing has been predicted. nnU-Net's own prediction reads one folder of files "
        f"CASE_0000{file_ending} ({channels[0]}) to CASE_{len(channels) - 1:04d}{file_ending} ({channels[-1]}); "
        f"--missing_modalities auto also takes file names of BraTS at any depth, a sheet, and cases that lack some."
    )


def refuse_incomplete(cases: Sequence[Sequence[str]], file_ending: str, channels: Sequence[str]) -> None:
    """Raise where nnU-Net's own prediction would stop at a case, after others: one that lacks a modality's file.

    Args:
        cases: files of each case, as nnU-Net lists them. Cases of one file each are let pass: it may hold all channels.
        file_ending: of the model.
        channels: the model's modality names in channel order.

    Raises:
        PlainError: names the first cases and what they lack.
    """
    if all(len(files) == 1 for files in cases):
        return
    lacking = []
    for files in cases:
        there = [channel_of(file, file_ending) for file in files]
        if None in there:  # lists of files may have any names; nnU-Net takes them in their order
            absent = list(channels[len(files) :])
        else:
            absent = [name for channel, name in enumerate(channels) if channel not in there]
        if absent:
            case = os.path.basename(files[0]).removesuffix(file_ending).removesuffix(f"_{there[0] or 0:04d}")
            lacking.append(f"{case} ({', '.join(absent)})")
    if lacking:
        raise PlainError(
            f"{len(lacking)} of {len(cases)} case(s) lack modalities: {some(lacking)}. Nothing has been predicted. "
            f"--missing_modalities auto goes by the files that exist (missing_modalities of MGMLPredictor)."
        )


def _is_finished(planned: PlannedCase, file_ending: str, with_probabilities: bool) -> bool:
    """Whether the output of an earlier run is there, whole and of the size of the images; says so where it is not."""
    if not planned.ofile:
        return False
    segmentation, probabilities = planned.ofile + file_ending, planned.ofile + ".npz"
    if not os.path.isfile(segmentation) or (with_probabilities and not os.path.isfile(probabilities)):
        return False
    wrong = not_finished(segmentation, next(iter(planned.case.files.values()), None))
    if not wrong and with_probabilities:
        wrong = not_finished_archive(probabilities)
    if wrong:
        _log.warning("%s The case is predicted again.", wrong)
    return not wrong


def output_folder(target: str | Path | list[str] | None) -> str | None:
    """Return the folder predictions go to, or None if they are returned."""
    if not target:
        return None
    return str(target) if isinstance(target, (str, Path)) else os.path.dirname(target[0]) or os.curdir


def _refuse_endings(planned: Sequence[PlannedCase]) -> None:
    """Raise a ValueError where an output's name, to which the ending is added, has one already."""
    for each in planned:
        text = "" if each.ofile is None else ending_in_name(os.path.basename(each.ofile))
        if text:
            raise ValueError(f"{each.ofile} cannot be written: {text}.")


def _outputs(names: list[str], target: str | Path | list[str] | None) -> Sequence[str | None]:
    if target is None:
        return [None] * len(names)
    if not isinstance(target, (str, Path)):
        if len(target) != len(names):
            raise ValueError(f"{len(names)} cases but {len(target)} output files.")
        return target
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(
            f"Two cases are named {some(doubles)}; in one output folder every case needs a name of its own."
        )
    return [os.path.join(target, name) for name in names]
