"""``mgml report``: one self-contained HTML page about an evaluation, to be opened in any browser, offline."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import write_text
from nnunetv2_mgml.presentation.figures.qualitative import Case
from nnunetv2_mgml.presentation.figures.style import label_colours
from nnunetv2_mgml.presentation.report.cases import ImageSources, load_case, spread_cases
from nnunetv2_mgml.presentation.report.charts import Picture, score_charts, training_chart
from nnunetv2_mgml.presentation.report.content import headline_metric
from nnunetv2_mgml.presentation.report.page import Pictures, Viewer, build_page, viewer_data
from nnunetv2_mgml.presentation.report.sheets import (
    case_sheet,
    label_names,
    overview_row,
    overview_sheet,
    telling_subsets,
)
from nnunetv2_mgml.presentation.report.sprites import MAX_SIDE, MAX_SLICES, viewer_case
from nnunetv2_mgml.scoring.metrics import Metric
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation
from nnunetv2_mgml.scoring.sources import (
    file_ending,
    find_dataset_json,
    load_dataset_json,
    parse_prediction_folders,
)

LOG_NAME = "mgml_training_log.csv"
MEGABYTE = 1_000_000
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml report``."""
    parser.add_argument("evaluation", metavar="EVALDIR", type=Path, help="folder written by `mgml evaluate`")
    parser.add_argument("-o", metavar="FILE", type=Path, help="the page; report.html in EVALDIR by default")
    parser.add_argument("--title", help="heading of the page; the evaluation's name by default")
    parser.add_argument(
        "--training_log",
        metavar="FILE",
        type=Path,
        help="mgml_training_log.csv, for the training curves; by default those of the folds that were evaluated",
    )
    viewer = parser.add_argument_group("slice viewer", "needs images; without them the page has tables and charts")
    viewer.add_argument(
        "-i",
        metavar="IMAGES",
        type=Path,
        help="folder of images (CASE_0000, CASE_0001, ...); by default the one the evaluation used",
    )
    viewer.add_argument("--no_images", action="store_true", help="no viewer: the page then shows no patient")
    viewer.add_argument(
        "-l", metavar="LABELS", type=Path, help="folder of reference label maps; by default the one the evaluation used"
    )
    viewer.add_argument(
        "--predictions",
        nargs="+",
        metavar="SUBSET=FOLDER",
        help="label maps as for `mgml evaluate`: one root whose folders are named by subset, or one "
        "folder per subset; by default those the evaluation wrote or used",
    )
    viewer.add_argument(
        "--dataset_json",
        metavar="FILE",
        type=Path,
        help="dataset.json with the file ending; else searched beside images, labels and predictions",
    )
    viewer.add_argument(
        "--max_cases",
        metavar="N",
        type=int,
        default=4,
        help="cases in the viewer, at evenly spaced ranks from worst to best",
    )
    viewer.add_argument("--cases", nargs="+", metavar="CASE", help="these cases instead")
    viewer.add_argument(
        "--max_megabytes",
        metavar="MB",
        type=float,
        default=15.0,
        help="size of the viewer's data; cases that do not fit are left out, and the page says so",
    )
    inside = parser.add_argument_group(
        "inside the network",
        "predictions of each modality alone, soft label, confidence and features of one case (needs its images)",
    )
    inside.add_argument(
        "--internals",
        metavar="CASE",
        nargs="?",
        const="",
        help="compute them for this case; the first one of the viewer if none is named",
    )
    inside.add_argument(
        "-m",
        metavar="MODEL_FOLDER",
        type=Path,
        help="model folder TRAINER__PLANS__CONFIGURATION; by default the one that was evaluated",
    )
    inside.add_argument(
        "-f",
        metavar="FOLD",
        help="fold; by default the one that predicted the case, else the first one that was evaluated, else 0",
    )
    inside.add_argument("-chk", metavar="FILE", help="checkpoint; by default the one that was evaluated")
    inside.add_argument("-device", default="cpu", choices=("cuda", "cpu", "mps"), help="where the network runs")


def run(args: argparse.Namespace) -> int:
    """Run ``mgml report``; returns the exit code."""
    if args.max_cases < 1:
        raise ValueError(f"--max_cases must be at least 1, got {args.max_cases}. For no viewer use --no_images.")
    evaluation = load_evaluation(args.evaluation)
    metric = headline_metric(evaluation)
    pictures = Pictures(charts=score_charts(evaluation, metric))
    pictures.charts += [training_chart(log, title) for title, log in _training_logs(args, evaluation).items()]
    asked_for = any(
        value is not None for value in (args.i, args.l, args.predictions, args.dataset_json, args.cases, args.internals)
    )
    args.i = _images(args, evaluation)
    if args.internals is not None and args.i is None:
        raise ValueError("--internals needs the images of the case: give their folder with -i, without --no_images.")
    viewer = None
    sources = None if args.i is None else _sources(args, evaluation, asked_for)
    if sources is not None:
        names = _choose_cases(args, evaluation, metric)
        viewer = _build_viewer(args, evaluation, metric, sources, names, pictures)
        if args.internals is not None:
            pictures.internals = _internals(args, evaluation, sources, args.internals or names[0])
    page = build_page(evaluation, args.title or evaluation.name, pictures, viewer)
    output = args.o or args.evaluation / "report.html"
    write_text(output, page)
    print(
        f"report: {output} ({len(page.encode()) / MEGABYTE:.1f} MB"
        f"{', with images of patients' if viewer is not None else ''})"
    )
    return 0


def _images(args: argparse.Namespace, evaluation: Evaluation) -> Path | None:
    """Return the folder of images: as given, else the evaluation's if it is still there; None for no viewer.

    Raises:
        ValueError: images are both given and not wanted.
    """
    if args.no_images:
        if args.i is not None:
            raise ValueError("-i gives images and --no_images wants none. Leave one of the two out.")
        return None
    stored = (evaluation.info.get("source") or {}).get("images")
    if args.i is not None or stored is None:
        return args.i
    if not Path(stored).is_dir():
        logger.warning(
            "No slice viewer: the images of the evaluation are no longer in %s. Give their folder with -i.", stored
        )
        return None
    return Path(stored)


def _sources(args: argparse.Namespace, evaluation: Evaluation, asked_for: bool) -> ImageSources | None:
    """Return what the viewer is made of; None, with a warning, where files are gone and nobody asked for a viewer."""
    try:
        return find_sources(args, evaluation)
    except FileNotFoundError as error:
        if asked_for:
            raise
        logger.warning("No slice viewer. %s", error)
        return None


def _training_logs(args: argparse.Namespace, evaluation: Evaluation) -> dict[str, Path]:
    """Return title -> training log: the one given, else those there are of the evaluated folds."""
    if args.training_log:
        return {"Training": args.training_log}
    model = evaluation.info.get("model") or {}
    folds = model.get("folds") or []
    logs = {
        f"Training of fold {fold}" if len(folds) > 1 else "Training": Path(model["folder"]) / f"fold_{fold}" / LOG_NAME
        for fold in folds
        if "folder" in model
    }
    return {title: log for title, log in logs.items() if log.is_file()}


def _choose_cases(args: argparse.Namespace, evaluation: Evaluation, metric: Metric) -> list[str]:
    names = args.cases or spread_cases(evaluation, metric, args.max_cases)
    unknown = [name for name in names if name not in evaluation.cases]
    if unknown:
        raise ValueError(
            f"The evaluation has no case {', '.join(unknown)}. It has: {', '.join(evaluation.cases[:20])}"
            f"{', ...' if len(evaluation.cases) > 20 else ''}."
        )
    return names


def _build_viewer(
    args: argparse.Namespace,
    evaluation: Evaluation,
    metric: Metric,
    sources: ImageSources,
    names: Sequence[str],
    pictures: Pictures,
) -> Viewer:
    """Fill the case figures of ``pictures`` and return the viewer."""
    shown = evaluation.restricted(list(sources.predictions))
    labels = label_names(evaluation)
    colours = label_colours(list(labels))
    entries: list[dict[str, Any]] = []
    rows: list[Case] = []
    used = 0
    for name in names:
        case = load_case(name, evaluation.channels, sources, evaluation.info.get("ignore_label"))
        entry = viewer_case(case, sorted(labels))
        size = sum(len(uri) for uri in (*entry["images"].values(), *entry["predictions"].values(), entry["reference"]))
        if used + size > args.max_megabytes * MEGABYTE:
            logger.warning(
                "Case %s is not in the viewer: with it the data would exceed %g MB (--max_megabytes).",
                name,
                args.max_megabytes,
            )
            continue
        used += size
        entries.append(entry)
        rows.append(overview_row(shown, case))
        pictures.sheets.append(case_sheet(shown, metric, case, colours))
    if not entries:
        raise ValueError(
            f"Not even one case fits into --max_megabytes {args.max_megabytes:g}; one needs about "
            f"{size / MEGABYTE:.1f}."
        )
    overview = overview_sheet(shown, rows, colours)
    if overview:
        pictures.sheets.insert(0, overview)
    data = viewer_data(shown, metric, entries, labels, colours)
    return Viewer(data, _note(args, evaluation, entries, len(names)))


def _note(args: argparse.Namespace, evaluation: Evaluation, entries: list[dict[str, Any]], asked: int) -> str:
    choice = "as asked for" if args.cases else "at evenly spaced ranks of the mean score, from worst to best"
    steps = {entry["name"]: entry["slices"][1] - entry["slices"][0] for entry in entries if len(entry["slices"]) > 1}
    thinned = [f"{name}: 1 slice in {step}" for name, step in steps.items() if step > 1]
    reduced = [f"{entry['name']} by {entry['factor']}" for entry in entries if entry["factor"] > 1]
    parts = [
        f"The viewer holds {len(entries)} of {len(evaluation.cases)} cases, {choice}.",
        f"{asked - len(entries)} did not fit into {args.max_megabytes:g} MB." if asked > len(entries) else "",
        "It shows axial slices around the labelled ones, cropped to the content, as 8-bit JPEG images scaled "
        "between the 0.5th and 99.5th percentile; label maps are exact.",
        f"At most {MAX_SLICES} slices per case, evenly thinned ({'; '.join(thinned)})." if thinned else "",
        f"Slices are reduced to at most {MAX_SIDE} pixels ({', '.join(reduced)})." if reduced else "",
    ]
    return " ".join(part for part in parts if part)


def _internals(args: argparse.Namespace, evaluation: Evaluation, sources: ImageSources, case: str) -> list[Picture]:
    """Run the model on one case and draw what it holds inside."""
    evaluated = evaluation.info.get("model") or {}
    folder = args.m or (Path(evaluated["folder"]) if "folder" in evaluated else None)
    if folder is None:
        raise ValueError(
            "The evaluation was made from finished predictions and names no model; give its folder with -m."
        )
    # only this part needs torch
    from nnunetv2_mgml.inference.inputs import Case as CaseFiles
    from nnunetv2_mgml.presentation.internals import compute_internals, load_model
    from nnunetv2_mgml.presentation.report.inside import inside_pictures

    fold = args.f or fold_of_case(evaluation, case)
    model = load_model(folder, fold, args.chk or evaluated.get("checkpoint", "checkpoint_final.pth"), args.device)
    if model.predictor.channels != evaluation.channels:
        raise ValueError(
            f"The model in {folder} has channels {', '.join(model.predictor.channels)}, the evaluation "
            f"{', '.join(evaluation.channels)}. Give the model that was evaluated with -m."
        )
    files = {
        channel: str(path)
        for channel in range(len(evaluation.channels))
        if (path := sources.images / f"{case}_{channel:04d}{sources.file_ending}").is_file()
    }
    internals = compute_internals(
        model,
        CaseFiles(case, files),
        sources.labels / f"{case}{sources.file_ending}",
        telling_subsets(evaluation, most=len(evaluation.channels) + 1),
    )
    return inside_pictures(evaluation, case, internals, label_colours(list(label_names(evaluation))))


def fold_of_case(evaluation: Evaluation, case: str) -> str:
    """Return the (first) fold that predicted a case; where that is not stored the first that was evaluated, else 0."""
    folds = (evaluation.info.get("folds_of_cases") or {}).get(case)
    return (folds or (evaluation.info.get("model") or {}).get("folds") or ["0"])[0]


def find_sources(args: argparse.Namespace, evaluation: Evaluation) -> ImageSources:
    """Find images, labels and predictions: as given, else where the evaluation wrote or read them.

    Raises:
        FileNotFoundError: a folder does not exist, or none is known.
        ValueError: predictions are named wrongly, or of no subset of the evaluation.
    """
    source = evaluation.info.get("source") or {}
    labels = args.l or (Path(source["labels"]) if source.get("labels") else None)
    if labels is None:
        raise FileNotFoundError("The evaluation does not say where its label maps are; give the folder with -l.")
    own = args.evaluation / "predictions"
    if args.predictions:
        folders = parse_prediction_folders(args.predictions, evaluation.channels)
    elif own.is_dir():
        folders = parse_prediction_folders([str(own)], evaluation.channels)
    elif source.get("folders"):
        folders = {name: Path(folder) for name, folder in source["folders"].items()}
    else:
        raise FileNotFoundError(
            f"No predictions: {own} does not exist. Give their folder with --predictions, or ask "
            f"for a page without images with --no_images."
        )
    for option, folder in (("-i", args.i), ("-l", labels)):
        if not folder.is_dir():
            raise FileNotFoundError(f"The folder {folder} does not exist; give another with {option}.")
    folders = {name: folder for name, folder in folders.items() if name in evaluation.subset_names}
    if not folders:
        raise ValueError(f"The predictions are of none of the evaluated subsets: {', '.join(evaluation.subset_names)}.")
    candidates = (
        [args.dataset_json]
        if args.dataset_json
        else [
            args.i,
            args.i.parent,
            labels,
            labels.parent,
            *folders.values(),
            own,
            *([Path(model)] if (model := (evaluation.info.get("model") or {}).get("folder")) else []),
        ]
    )
    ending = file_ending(load_dataset_json(find_dataset_json(candidates)))
    return ImageSources(args.i, labels, folders, ending)
