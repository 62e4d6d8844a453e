"""``mgml evaluate``: score a model, or finished predictions, on every subset of the modalities."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from nnunetv2_mgml.commands import TRAINER
from nnunetv2_mgml.commands.arguments import (
    add_trust,
    changed_options,
    parse_predictions,
    refuse_names_beside_folder,
)
from nnunetv2_mgml.plans.folders import RESULTS, dataset_folder
from nnunetv2_mgml.presentation.tables import summary_text
from nnunetv2_mgml.scoring.metrics import all_metrics, default_metrics
from nnunetv2_mgml.scoring.policy import POLICIES
from nnunetv2_mgml.workflows.evaluate import ModelRequest, PredictionsRequest, evaluate_model, evaluate_predictions

_MODEL_OPTIONS = (
    "-d",
    "-c",
    "-f",
    "-tr",
    "-p",
    "-m",
    "-i",
    "-chk",
    "-device",
    "-step_size",
    "--disable_tta",
    "--cpu_bfloat16",
    "--shared_preprocessing",
    "-npp",
    "-nps",
    "--trust_checkpoint",
    "--write_subset_report",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml evaluate``."""
    source = parser.add_argument_group(
        "what to evaluate",
        "a trained model on its validation cases (-d -c -f), a model on a folder with labels "
        "(-i -l with -m or -d -c), or finished predictions (--predictions -l)",
    )
    source.add_argument("-d", metavar="DATASET", help="data set name or id of the trained model")
    source.add_argument("-c", metavar="CONFIGURATION", help="nnU-Net configuration, for example 3d_fullres")
    source.add_argument(
        "-f",
        metavar="FOLD",
        nargs="+",
        default=["0"],
        help="folds. Validation cases: each fold's cases by its own model; with -i: one ensemble",
    )
    source.add_argument("-tr", metavar="TRAINER", default=TRAINER, help="trainer of the model")
    source.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier")
    source.add_argument("-m", metavar="MODEL_FOLDER", type=Path, help="model folder TRAINER__PLANS__CONFIGURATION")
    source.add_argument("-i", metavar="IMAGES", type=Path, help="folder of images (CASE_0000, CASE_0001, ...)")
    source.add_argument("-l", metavar="LABELS", type=Path, help="folder of reference label maps (CASE)")
    source.add_argument(
        "--predictions",
        nargs="+",
        metavar="SUBSET=FOLDER",
        help="finished predictions, one folder per subset (all=A t1+flair=B ...), or one root whose "
        "folders are named by subset",
    )
    source.add_argument(
        "--dataset_json",
        type=Path,
        metavar="FILE",
        help="dataset.json of the predictions; else searched beside predictions and labels",
    )
    source.add_argument("--subsets", nargs="+", metavar="SUBSET", help="only these, for example all t1+flair t2")
    source.add_argument(
        "--allow_missing",
        action="store_true",
        help="leave out what is not there instead of refusing: cases without a prediction in every "
        "folder; with a model, subsets whose modalities a case does not have",
    )
    _add_scoring_arguments(parser)
    _add_model_arguments(parser)


def _add_scoring_arguments(parser: argparse.ArgumentParser) -> None:
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "-o",
        metavar="OUT",
        type=Path,
        help="evaluation folder; for validation cases by default "
        "subset_evaluation[_no_mirroring] in the fold's folder, "
        "of several folds ..._folds_0_1 in the model's",
    )
    scoring.add_argument(
        "--policy",
        choices=("auto", *POLICIES),
        default="auto",
        help="value where reference or prediction is empty. auto: brats for regions WT, TC and ET, "
        "else nan. " + "; ".join(f"{p.name}: {p.summary}" for p in POLICIES.values()),
    )
    scoring.add_argument(
        "--metrics",
        nargs="+",
        choices=tuple(all_metrics()),
        metavar="METRIC",
        help=f"of {', '.join(all_metrics())}; all but the lesion-wise ones by default",
    )
    scoring.add_argument(
        "--lesionwise",
        action="store_true",
        help="add lesion-wise Dice and HD95 by the rules of BraTS 2023 (needs panoptica)",
    )
    scoring.add_argument(
        "--remove_small",
        nargs="+",
        metavar="REGION=N",
        default=[],
        help="a predicted region of fewer than N voxels counts as empty (RFNet and others: ET=500)",
    )
    scoring.add_argument(
        "--name",
        help="what the method is called in tables; by default the trainer of a model, the folder of predictions",
    )
    scoring.add_argument(
        "-np",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that compute metrics, each below 0.5 GB for a BraTS case; 0: only this one",
    )
    scoring.add_argument(
        "--overwrite",
        action="store_true",
        help="start again instead of resuming; where only scoring settings differ, predictions are "
        "kept and scored again",
    )
    scoring.add_argument("--no_figures", action="store_true", help="write no figures, only tables")
    scoring.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("prediction (with a model)")
    model.add_argument("-chk", default="checkpoint_final.pth", metavar="FILE", help="checkpoint")
    model.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="where the network runs")
    model.add_argument("-step_size", type=float, default=0.5, help="sliding window step, as a share of the patch")
    model.add_argument("--disable_tta", action="store_true", help="no mirroring (up to 8 times faster)")
    model.add_argument("--cpu_bfloat16", action="store_true", help="with -device cpu: bfloat16 where the CPU has it")
    model.add_argument(
        "--shared_preprocessing",
        action="store_true",
        help="crop and normalise once from all modalities; faster where every modality has zeros of its "
        "own, but no longer what prediction from a subset gives (docs/evaluation.md)",
    )
    model.add_argument("-npp", type=int, default=1, metavar="N", help="processes that preprocess; 0: only this one")
    model.add_argument("-nps", type=int, default=2, metavar="N", help="processes that write label maps; 0: this one")
    add_trust(model)
    model.add_argument(
        "--write_subset_report",
        action="store_true",
        help="store mean and spread per subset in the model folder; predictions then say which quality to expect",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``mgml evaluate``; returns the exit code."""
    if args.predictions:
        request = _predictions_request(args)
        evaluation, output = evaluate_predictions(request), request.output
    else:
        model = _model_request(args)
        evaluation, output = evaluate_model(model), model.output_folder
        if model.write_subset_report:
            print(f"expected quality per subset: {model.subset_report}")
    print(summary_text(evaluation))
    print(f"\nresults, tables and summary: {output}")
    return 0


def _predictions_request(args: argparse.Namespace) -> PredictionsRequest:
    _refuse_model_options(args)
    for option, value in (("-l LABELS", args.l), ("-o OUT", args.o)):
        if value is None:
            raise ValueError(f"--predictions needs {option}.")
    return PredictionsRequest(
        predictions=parse_predictions(args.predictions),
        labels=args.l,
        output=args.o,
        dataset_json=args.dataset_json,
        **_scoring(args),
    )


def _model_request(args: argparse.Namespace) -> ModelRequest:
    if args.dataset_json is not None:
        raise ValueError(
            "--dataset_json is for finished predictions (--predictions); a model brings its own. Leave it out."
        )
    return ModelRequest(
        model_folder=_model_folder(args),
        folds=args.f,
        checkpoint=args.chk,
        dataset=args.d,
        images=args.i,
        labels=args.l,
        output=args.o,
        device=args.device,
        tile_step_size=args.step_size,
        mirroring=not args.disable_tta,
        cpu_bfloat16=args.cpu_bfloat16,
        shared_preprocessing=args.shared_preprocessing,
        num_processes_preprocessing=args.npp,
        num_processes_export=args.nps,
        write_subset_report=args.write_subset_report,
        trust_checkpoint=args.trust_checkpoint,
        **_scoring(args),
    )


def _scoring(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that both kinds of request have."""
    metrics = tuple(args.metrics or default_metrics())
    if args.lesionwise:
        metrics += tuple(name for name, metric in all_metrics().items() if metric.optional and name not in metrics)
    return {
        "subsets": args.subsets,
        "allow_missing": args.allow_missing,
        "policy": args.policy,
        "metrics": metrics,
        "min_region_voxels": dict(map(_size, args.remove_small)),
        "name": args.name,
        "num_processes": args.np,
        "overwrite": args.overwrite,
        "figures": not args.no_figures,
        "show_progress": not args.disable_progress_bar,
    }


def _size(entry: str) -> tuple[str, int]:
    name, separator, number = entry.rpartition("=")
    if not separator or not number.isdigit():
        raise ValueError(f"'{entry}' is not of the form REGION=N, for example ET=500.")
    return name, int(number)


def _refuse_model_options(args: argparse.Namespace) -> None:
    """Raise a ValueError naming the options that only a model has a use for and that are not at their default."""
    if given := changed_options(args, add_arguments, _MODEL_OPTIONS):
        raise ValueError(
            f"--predictions takes finished label maps; {', '.join(given)} would predict, or needs a model "
            f"(-m, or -d and -c). Give one or the other."
        )


def _model_folder(args: argparse.Namespace) -> Path:
    refuse_names_beside_folder(args, add_arguments)
    if args.m is not None:
        return Path(args.m)
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
    return dataset_folder(args.d, RESULTS) / f"{args.tr}__{args.p}__{args.c}"
