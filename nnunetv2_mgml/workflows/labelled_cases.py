"""The cases a model is evaluated on: of a folder, or the validation cases of its folds."""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.dataloading.availability import case_availability
from nnunetv2_mgml.inference.inputs import Case, find_cases
from nnunetv2_mgml.inference.subsets.label_maps import FoldCases
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.cohort import listed_cases, read_missing
from nnunetv2_mgml.plans.folders import PREPROCESSED, RAW, dataset_name, nnunet_folder
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.plans.splits import SPLITS_FILE, TRAINING_CASES, other_cases, read_splits
from nnunetv2_mgml.scoring.info import Source
from nnunetv2_mgml.scoring.sources import file_ending, find_references, load_dataset_json
from nnunetv2_mgml.upstream.checkpoints import load_checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledCases:
    """Images, who predicts them, and the label maps they are scored against."""

    work: tuple[FoldCases, ...]
    references: dict[str, Path]
    """Case -> label map; may hold cases that are not predicted."""
    source: Source
    preprocessed: Path | None = None
    """Folder of nnU-Net's preprocessed data the cases are taken from; None: from their files."""

    @property
    def lasting_source(self) -> Source:
        """What of the source must not change between two runs: a data set known by its name may be moved."""
        if self.source.kind == "validation":
            return dataclasses.replace(self.source, images=None, labels=None)
        return self.source

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        cases = [case for part in self.work for case in part.cases]
        labels = [self.references[case.name] for case in cases]
        return [*labels, *(Path(file) for case in cases for file in case.files.values())]


def folder_cases(
    images: Path, labels: Path, folds: tuple[int | str, ...], dataset_json: dict[str, Any], allow_missing: bool
) -> LabelledCases:
    """Return the cases of a folder that have labels, for an ensemble of folds.

    Args:
        images: folder of ``<case>_XXXX<ending>``.
        labels: folder of ``<case><ending>``.
        folds: the ensemble.
        dataset_json: the model's dataset.json.
        allow_missing: leave out label maps without images instead of refusing.

    Raises:
        FileNotFoundError: no case with a label map, or label maps without images.
    """
    ending = file_ending(dataset_json)
    cases = {case.name: case for case in find_cases(images, ending, channel_names(dataset_json))}
    references = find_references(labels, ending)
    labelled = tuple(case for name, case in cases.items() if name in references)
    _refuse_numbers_of_cases(cases, references, ending)
    if not labelled:
        raise FileNotFoundError(
            f"No case of {images} has a label map in {labels}: found images of "
            f"{', '.join(sorted(cases)[:5])} and labels of {', '.join(sorted(references)[:5])}."
        )
    lonely = sorted(set(references) - set(cases))
    if lonely and not allow_missing:
        raise FileNotFoundError(
            f"{len(lonely)} label maps of {labels} have no images in {images}: "
            f"{', '.join(lonely[:10])}. Add them, or leave these cases out with --allow_missing."
        )
    without = sorted(set(cases) - set(references))
    if without:
        _log.warning("%d cases have no label map and are not evaluated: %s.", len(without), ", ".join(without[:10]))
    source = Source("folder", images=images.resolve(), labels=labels.resolve())
    return LabelledCases((FoldCases(folds, labelled),), references, source)


def _refuse_numbers_of_cases(cases: Mapping[str, Case], references: Mapping[str, Path], ending: str) -> None:
    """Raise a ValueError where images are named as label maps: their numbers are those of cases, not of channels."""
    for case in cases.values():
        for file in case.files.values():
            name = Path(file).name[: -len(ending)]
            if name in references and name not in cases and case.name not in references:
                raise ValueError(
                    f"{file} is named as the label map {references[name]}: its number belongs to the case, not to the "
                    f"channel. Name the image {name}_0000{ending} if it is the model's first modality, _0001 for the "
                    f"second, and so on."
                )


def validation_cases(model_folder: Path, dataset: str, folds: Sequence[int | str]) -> LabelledCases:
    """Return the validation cases of folds, each for its own model, from nnU-Net's folders.

    Where the raw data set is not on this machine they are taken as they were preprocessed for the training.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        dataset: name or number of the data set.
        folds: numbers of folds.

    Raises:
        FileNotFoundError: no such data set, no splits, or images that are not there.
        ValueError: nnU-Net's folders are not set, or a fold that does not exist.
    """
    if not os.environ.get(PREPROCESSED):
        raise ValueError(
            "Validation cases are found through nnUNet_preprocessed, which is not set. Set it, or evaluate a folder "
            "with -i and -l."
        )
    dataset = dataset_name(dataset, (RAW, PREPROCESSED))
    dataset_json = load_dataset_json(model_folder / "dataset.json")
    file = nnunet_folder(PREPROCESSED) / dataset / SPLITS_FILE
    splits = read_splits(file.parent)
    if splits is None:
        raise FileNotFoundError(f"{file} does not exist: the folds are those of nnUNetv2_train, which writes it.")
    for fold in folds:
        if int(fold) >= len(splits):
            raise ValueError(f"{file} has folds 0 to {len(splits) - 1}, not {fold}.")
        if not splits[int(fold)]["val"]:
            raise ValueError(f"Fold {fold} of {file} has no validation cases. Evaluate a folder with -i and -l.")
    _refuse_shared_cases(file, splits, folds)
    names = {fold: sorted(splits[int(fold)]["val"]) for fold in folds}
    raw = nnunet_folder(RAW) / dataset if os.environ.get(RAW) else None
    if raw is None or not (raw / "dataset.json").is_file():
        return _preprocessed_cases(model_folder, dataset, names, dataset_json)
    known = _raw_cases(raw, dataset_json)
    work = []
    for fold, wanted in names.items():
        absent = [name for name in wanted if name not in known]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} validation cases of fold {fold} are not in {raw}: {', '.join(absent[:10])}."
            )
        work.append(FoldCases((fold,), tuple(known[name][0] for name in wanted)))
    source = Source("validation", dataset, tuple(map(str, folds)), *_raw_folders(raw))
    return LabelledCases(tuple(work), {name: reference for name, (_, reference) in known.items()}, source)


def _refuse_shared_cases(file: Path, splits: Sequence[Mapping[str, Any]], folds: Sequence[int | str]) -> None:
    """Raise a ValueError where a case would be predicted by two folds, each under its own name."""
    folds_of: dict[str, list[str]] = {}
    for fold in folds:
        for case in splits[int(fold)]["val"]:
            folds_of.setdefault(case, []).append(str(fold))
    shared = {case: found for case, found in folds_of.items() if len(found) > 1}
    if shared:
        case, found = next(iter(sorted(shared.items())))
        raise ValueError(
            f"{len(shared)} validation cases belong to more than one of folds {', '.join(map(str, folds))} of {file}, "
            f"such as {case} (folds {' and '.join(found)}). Evaluate these folds one by one, each with its own -o."
        )


def warn_of_other_training_cases(
    model_folder: Path, dataset: str, folds: Sequence[int | str], checkpoint: str, trust: bool
) -> None:
    """Log a warning for every fold whose split has changed since: its validation cases may have been trained on.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        dataset: see `validation_cases`, which has found the split.
        folds: numbers of folds.
        checkpoint: name of the file in each.
        trust: see `upstream.checkpoints.loading`.
    """
    splits = read_splits(nnunet_folder(PREPROCESSED) / dataset_name(dataset, (RAW, PREPROCESSED))) or []
    for fold in folds:
        content = load_checkpoint(model_folder / f"fold_{fold}" / checkpoint, trust, mmap=True)
        stored = content.get("init_args", {}).get("plans", {}).get(PLANS_KEY, {}).get(TRAINING_CASES)
        if changed := other_cases(fold, stored, splits[int(fold)]["train"]):
            _log.warning("%s These scores may be too good.", changed)


def _preprocessed_cases(
    model_folder: Path, dataset: str, names: dict[int | str, list[str]], dataset_json: dict[str, Any]
) -> LabelledCases:
    """Return validation cases as they were preprocessed, with the label maps nnU-Net's own validation scores against.

    Args:
        model_folder: its name and plans tell which data it was trained on.
        dataset: name of the data set.
        names: fold -> cases.
        dataset_json: the model's.

    Raises:
        FileNotFoundError: no such data, or no label maps.
        ValueError: a cascade, of which nothing but raw images can be used.
    """
    folder = nnunet_folder(PREPROCESSED) / dataset
    plans = PlansManager(str(model_folder / "plans.json"))
    name = model_folder.resolve().name.split("__")[-1]
    where = f"{dataset} is not in nnUNet_raw ({os.environ.get(RAW) or 'not set'})"
    if name not in plans.available_configurations:
        raise FileNotFoundError(f"{where}, and the name of {model_folder} names no configuration of its plans.")
    configuration = plans.get_configuration(name)
    if configuration.previous_stage_name is not None:
        raise ValueError(
            f"{where}; of a cascade's second stage validation cases can be evaluated from raw images only."
        )
    data, labels, ending = (
        folder / configuration.data_identifier,
        folder / "gt_segmentations",
        file_ending(dataset_json),
    )
    if not data.is_dir() or not labels.is_dir():
        raise FileNotFoundError(f"{where}, and there is no {data if not data.is_dir() else labels}.")
    channels = channel_names(dataset_json)
    cases = infer_dataset_class(str(data))(str(data))
    there = case_availability(cases, sorted({case for of_fold in names.values() for case in of_fold}), len(channels))
    # which file of a case counts for whether it has changed
    files = {case: next(iter(sorted(data.glob(f"{glob.escape(case)}.*")))) for case in there}
    found = {
        case: Case(case, {c: str(files[case]) for c, present in enumerate(has) if present})
        for case, has in there.items()
    }
    _log.warning(
        "%s: its validation cases are taken from %s, cropped and normalised from all their modalities "
        "(as with --shared_preprocessing).",
        where,
        data,
    )
    source = Source("validation", dataset, tuple(map(str, names)), None, labels.resolve())
    work = tuple(FoldCases((fold,), tuple(found[case] for case in cases)) for fold, cases in names.items())
    return LabelledCases(work, find_references(labels, ending), source, data)


def _raw_folders(folder: Path) -> tuple[Path | None, Path | None]:
    """Return where images and labels lie, for `report`; None where dataset.json lists files one by one."""
    if "dataset" in load_dataset_json(folder / "dataset.json"):
        return None, None
    return (folder / "imagesTr").resolve(), (folder / "labelsTr").resolve()


def _raw_cases(folder: Path, dataset_json: dict[str, Any]) -> dict[str, tuple[Case, Path]]:
    """Return case name -> (case, label map) of a raw data set, whichever of nnU-Net's two layouts it has.

    Modalities recorded as missing are left out of a case, whether there are files for them or not; so are listed files
    that do not exist.
    """
    recorded = read_missing(folder, channels := channel_names(dataset_json))
    return {
        name: (dataclasses.replace(case, files={c: f for c, f in case.files.items() if channels[c] not in gone}), label)
        for name, (case, label) in _listed_cases(folder, dataset_json).items()
        for gone in (recorded.get(name, ()),)
    }


def _listed_cases(folder: Path, dataset_json: dict[str, Any]) -> dict[str, tuple[Case, Path]]:
    raw_json = load_dataset_json(folder / "dataset.json")
    ending = file_ending(dataset_json)
    if "dataset" not in raw_json:
        cases = find_cases(folder / "imagesTr", ending, channel_names(dataset_json))
        return {case.name: (case, folder / "labelsTr" / f"{case.name}{ending}") for case in cases}
    return {
        name: (Case(name, {c: str(path.resolve()) for c, path in files.items()}), label.resolve())
        for name, (files, label) in listed_cases(folder, raw_json).items()
    }
