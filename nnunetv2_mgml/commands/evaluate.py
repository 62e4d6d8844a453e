"""``mgml evaluate``: score a model, or finished predictions, on every subset of the modalities."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.scoring.evaluate import EvaluationOptions, evaluate_predictions
from nnunetv2_mgml.scoring.metrics import all_metrics, default_metrics
from nnunetv2_mgml.scoring.metrics.lesionwise import require_panoptica
from nnunetv2_mgml.scoring.policy import POLICIES
from nnunetv2_mgml.scoring.regions import label_set, resolve_region
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation
from nnunetv2_mgml.scoring.sources import (
    choose_subsets,
    find_dataset_json,
    load_dataset_json,
    parse_prediction_folders,
)
from nnunetv2_mgml.scoring.subset_report import write_subset_report

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
    source.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerMGML", help="trainer of the model")
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
    scoring.add_argument("--name", help="what the method is called in tables; the folder's name by default")
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
    model.add_argument(
        "--write_subset_report",
        action="store_true",
        help="store mean and spread per subset in the model folder; predictions then say which quality to expect",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``mgml evaluate``; returns the exit code."""
    if args.predictions:
        _refuse_model_options(args)
        evaluation, output = _run_predictions(args)
    else:
        from nnunetv2_mgml.commands.evaluate_model import run_model

        if args.dataset_json is not None:
            raise ValueError(
                "--dataset_json is for finished predictions (--predictions); a model brings its own. Leave it out."
            )
        if args.write_subset_report and args.metrics and "dice" not in args.metrics:
            raise ValueError(
                f"--write_subset_report stores Dice, but --metrics has only {', '.join(args.metrics)}. "
                f"Add dice to --metrics, or leave one of the two out."
            )
        evaluation, output, model_folder = run_model(args)
        if args.write_subset_report:
            print(f"expected quality per subset: {write_subset_report(evaluation, model_folder)}")
    print(summary_text(evaluation))
    print(f"\nresults, tables and summary: {output}")
    return 0


def options_from(args: argparse.Namespace, dataset_json: dict[str, Any]) -> EvaluationOptions:
    """Translate the scoring arguments.

    Raises:
        ValueError: an unknown region, a bad number, or lesion-wise metrics without panoptica.
    """
    metrics = tuple(args.metrics or default_metrics())
    optional = [name for name, metric in all_metrics().items() if metric.optional]
    if args.lesionwise:
        metrics += tuple(name for name in optional if name not in metrics)
    if set(metrics) & set(optional):
        require_panoptica()
    return EvaluationOptions(
        args.policy,
        metrics,
        _sizes(args.remove_small, dataset_json),
        args.np,
        args.name,
        args.overwrite,
        show_progress=not args.disable_progress_bar,
        figures=not args.no_figures,
    )


def _sizes(entries: list[str], dataset_json: dict[str, Any]) -> dict[str, int]:
    regions = list(label_set(dataset_json).regions)
    sizes = {}
    for entry in entries:
        name, separator, number = entry.rpartition("=")
        if not separator or not number.isdigit():
            raise ValueError(f"'{entry}' is not of the form REGION=N, for example ET=500.")
        sizes[resolve_region(name, regions)] = int(number)
    return sizes


def _refuse_model_options(args: argparse.Namespace) -> None:
    """Raise a ValueError naming the options that only a model has a use for and that are not at their default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = [
        option
        for option in _MODEL_OPTIONS
        if getattr(args, option.lstrip("-")) != parser.get_default(option.lstrip("-"))
    ]
    if given:
        raise ValueError(
            f"--predictions takes finished label maps; {', '.join(given)} would predict, or needs a model "
            f"(-m, or -d and -c). Give one or the other."
        )


def _run_predictions(args: argparse.Namespace) -> tuple[Evaluation, Path]:
    for option, value in (("-l LABELS", args.l), ("-o OUT", args.o)):
        if value is None:
            raise ValueError(f"--predictions needs {option}.")
    folders = [Path(entry.partition("=")[2] or entry) for entry in args.predictions]
    candidates = (
        [args.dataset_json]
        if args.dataset_json
        else [
            *folders,
            *(sub for f in folders if f.is_dir() for sub in sorted(f.iterdir()) if sub.is_dir()),
            args.l,
            args.l.parent,
        ]
    )
    dataset_json = load_dataset_json(find_dataset_json(candidates))
    channels = channel_names(dataset_json)
    by_subset = parse_prediction_folders(args.predictions, channels)
    if args.subsets:
        wanted = choose_subsets(args.subsets, channels)
        absent = [name for name in wanted if name not in by_subset]
        if absent:
            raise ValueError(
                f"--subsets asks for {', '.join(absent)}, but --predictions has only {', '.join(by_subset)}."
            )
        by_subset = {name: by_subset[name] for name in wanted}
    evaluation = evaluate_predictions(
        args.l, by_subset, dataset_json, args.o, options_from(args, dataset_json), args.allow_missing
    )
    return evaluation, args.o


def summary_text(evaluation: Evaluation) -> str:
    """Return the mean of the first metric per region and subset, for the terminal."""
    from nnunetv2_mgml.scoring.metrics import get_metric
    from nnunetv2_mgml.scoring.regions import short_name

    metric = get_metric(evaluation.metrics[0])
    rows = [*evaluation.subset_names, AVERAGE]
    width = max(map(len, rows))
    summaries = {r: evaluation.summary(metric.name, r) for r in evaluation.region_names}
    lines = [
        f"{metric.title} ({metric.unit}), mean over {len(evaluation.cases)} cases, policy {evaluation.policy}",
        " " * width + "".join(f"{short_name(r)[:10]:>12}" for r in summaries),
    ]
    for row in rows:
        lines.append(
            f"{row:<{width}}" + "".join(f"{s[row]['mean'] * metric.display_factor:>12.2f}" for s in summaries.values())
        )
    return "\n".join(lines)
