"""The part of ``mgml evaluate`` that needs a trained model: which cases, which folds, which predictor."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunetv2_mgml.commands.evaluate import options_from
from nnunetv2_mgml.inference.arguments import check_device, check_step_size
from nnunetv2_mgml.inference.inputs import Case, find_cases
from nnunetv2_mgml.inference.model_check import check_model_folder
from nnunetv2_mgml.inference.subsets.predictor import SubsetPredictor
from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.scoring.model_evaluation import FoldCases, LabelledCase, PredictionOptions, evaluate_model
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.scoring.sources import choose_subsets, file_ending, find_references, load_dataset_json

_log = logging.getLogger(__name__)
_DEFAULT_FOLDER = "subset_evaluation"


def run_model(args: argparse.Namespace, **changes: Any) -> tuple[Evaluation, Path, Path]:
    """Evaluate a model on its validation cases, or on a folder; returns the evaluation, its folder, the model's.

    Args:
        args: arguments of ``mgml evaluate``.
        **changes: fields of `EvaluationOptions` that no argument sets.

    Raises:
        ValueError, FileNotFoundError: arguments that do not fit together, no model, no cases.
    """
    model_folder = _model_folder(args)
    folds = tuple(check_model_folder(model_folder, args.f, args.chk))
    dataset_json = load_dataset_json(model_folder / "dataset.json")
    channels = channel_names(dataset_json)
    subsets = choose_subsets(args.subsets, channels)
    if args.write_subset_report and len(subsets) < 2 ** len(channels) - 1:
        raise ValueError(
            f"--write_subset_report replaces what the model folder says of all {2 ** len(channels) - 1} "
            f"subsets, but --subsets evaluates only {', '.join(subsets)}. Leave one of the two out."
        )
    if args.i is not None or args.l is not None:
        work, source, output = _folder_cases(args, folds, dataset_json)
    else:
        work, source, output = _validation_cases(args, model_folder, folds, dataset_json)
    prediction = PredictionOptions(
        model_folder, args.chk, args.shared_preprocessing, args.allow_missing, args.npp, args.nps
    )
    options = dataclasses.replace(options_from(args, dataset_json), **changes)
    evaluation = evaluate_model(_predictor(args), work, subsets, output, prediction, options, source)
    return evaluation, output, model_folder


def _model_folder(args: argparse.Namespace) -> Path:
    if args.m is not None:
        return args.m
    absent = [option for option, value in (("-d", args.d), ("-c", args.c)) if value is None]
    if absent:
        raise ValueError(
            f"Name the model with -d, -c and -f (missing: {', '.join(absent)}) or with -m, or give "
            f"finished predictions with --predictions."
        )
    if not os.environ.get("nnUNet_results"):
        raise ValueError(
            "-d needs nnUNet's folders: set nnUNet_results (and nnUNet_raw, nnUNet_preprocessed), or name "
            "the model with -m."
        )
    return Path(get_output_folder(_dataset_name(args.d), args.tr, args.p, args.c))


def _dataset_name(text: str) -> str:
    try:
        return maybe_convert_to_dataset_name(int(text) if text.isdigit() else text)
    except RuntimeError as error:
        raise ValueError(f"There is no data set '{text}': {error}") from error


def _folder_cases(
    args: argparse.Namespace, folds: tuple[int | str, ...], dataset_json: dict[str, Any]
) -> tuple[list[FoldCases], dict[str, Any], Path]:
    for option, value in (("-i IMAGES", args.i), ("-l LABELS", args.l), ("-o OUT", args.o)):
        if value is None:
            raise ValueError(f"Evaluating a model on a folder needs -i, -l and -o; {option} is missing.")
    ending = file_ending(dataset_json)
    cases = {case.name: case for case in find_cases(args.i, ending, channel_names(dataset_json))}
    references = find_references(args.l, ending)
    labelled = [LabelledCase(case, references[name]) for name, case in cases.items() if name in references]
    without = sorted(set(cases) - set(references))
    if not labelled:
        raise FileNotFoundError(
            f"No case of {args.i} has a label map in {args.l}: found images of "
            f"{', '.join(sorted(cases)[:5])} and labels of {', '.join(sorted(references)[:5])}."
        )
    lonely = sorted(set(references) - set(cases))
    if lonely and not args.allow_missing:
        raise FileNotFoundError(
            f"{len(lonely)} label maps of {args.l} have no images in {args.i}: "
            f"{', '.join(lonely[:10])}. Add them, or leave these cases out with --allow_missing."
        )
    if without:
        _log.warning("%d cases have no label map and are not evaluated: %s.", len(without), ", ".join(without[:10]))
    source = {"kind": "folder", "images": str(args.i.resolve()), "labels": str(args.l.resolve())}
    return [FoldCases(folds, labelled)], source, args.o


def _validation_cases(
    args: argparse.Namespace, model_folder: Path, folds: tuple[int | str, ...], dataset_json: dict[str, Any]
) -> tuple[list[FoldCases], dict[str, Any], Path]:
    if "all" in folds:
        raise ValueError(
            "Fold 'all' trained on every case, so it has no validation cases. Evaluate it on other ones with -i and -l."
        )
    dataset = _dataset_name(args.d) if args.d is not None else model_folder.resolve().parent.name
    for variable, value in (("nnUNet_raw", nnUNet_raw), ("nnUNet_preprocessed", nnUNet_preprocessed)):
        if not value:
            raise ValueError(
                f"Validation cases are found through {variable}, which is not set. Set it, or evaluate a "
                f"folder with -i and -l."
            )
    file = Path(nnUNet_preprocessed) / dataset / "splits_final.json"
    splits = read_json(file)
    known = _raw_cases(Path(nnUNet_raw) / dataset, dataset_json)
    work = []
    for fold in folds:
        if int(fold) >= len(splits):
            raise ValueError(f"{file} has folds 0 to {len(splits) - 1}, not {fold}.")
        names = sorted(splits[int(fold)]["val"])
        absent = [name for name in names if name not in known]
        if absent:
            raise FileNotFoundError(
                f"{len(absent)} validation cases of fold {fold} are not in "
                f"{Path(nnUNet_raw) / dataset}: {', '.join(absent[:10])}."
            )
        work.append(FoldCases((fold,), [known[name] for name in names]))
    name = f"{_DEFAULT_FOLDER}{'_no_mirroring' if args.disable_tta else ''}"
    output = args.o or (
        model_folder / f"fold_{folds[0]}" / name
        if len(folds) == 1
        else model_folder / f"{name}_folds_{'_'.join(map(str, folds))}"
    )
    return (
        work,
        {
            "kind": "validation",
            "dataset": dataset,
            "folds": [str(fold) for fold in folds],
            **_raw_folders(Path(nnUNet_raw) / dataset),
        },
        output,
    )


def _raw_folders(folder: Path) -> dict[str, str]:
    """Return where images and labels lie, for `mgml report`; nothing where dataset.json lists files one by one."""
    if "dataset" in load_dataset_json(folder / "dataset.json"):
        return {}
    return {"images": str((folder / "imagesTr").resolve()), "labels": str((folder / "labelsTr").resolve())}


def _raw_cases(folder: Path, dataset_json: dict[str, Any]) -> dict[str, LabelledCase]:
    """Return all labelled training cases of a raw data set, whichever of nnU-Net's two layouts it has."""
    raw_json = load_dataset_json(folder / "dataset.json")
    ending = file_ending(dataset_json)
    if "dataset" not in raw_json:
        return {
            case.name: LabelledCase(case, folder / "labelsTr" / f"{case.name}{ending}")
            for case in find_cases(folder / "imagesTr", ending, channel_names(dataset_json))
        }

    def absolute(path: str) -> str:
        return str((folder / os.path.expandvars(path)).resolve())

    return {
        name: LabelledCase(
            Case(name, {c: absolute(path) for c, path in enumerate(entry["images"])}), Path(absolute(entry["label"]))
        )
        for name, entry in raw_json["dataset"].items()
    }


def _predictor(args: argparse.Namespace) -> SubsetPredictor:
    check_step_size(args.step_size)
    check_device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    return SubsetPredictor(
        tile_step_size=args.step_size,
        use_gaussian=True,
        use_mirroring=not args.disable_tta,
        perform_everything_on_device=True,
        device=torch.device(args.device),
        allow_tqdm=False,
        cpu_bfloat16=args.cpu_bfloat16,
    )
