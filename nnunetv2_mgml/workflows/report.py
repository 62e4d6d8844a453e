"""Make one self-contained HTML page about an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import write_text
from nnunetv2_mgml.io.names import some
from nnunetv2_mgml.presentation.figures.qualitative import Case
from nnunetv2_mgml.presentation.figures.style import label_colours
from nnunetv2_mgml.presentation.report.cases import image_files, load_case, spread_cases
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
from nnunetv2_mgml.scoring.info import EvaluatedModel
from nnunetv2_mgml.scoring.metrics import Metric
from nnunetv2_mgml.scoring.output import PAGE, is_page
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation
from nnunetv2_mgml.scoring.sources import EvaluationFiles, PredictionFolders, find_files

_log = logging.getLogger(__name__)
_TRAINING_LOG = "mgml_training_log.csv"
_ENDINGS = (".html", ".htm")
_MEGABYTE = 1_000_000
_ADVICE = (
    "Name the folders with -i, -l, --predictions and --dataset_json, or ask for a page without images with --no_images."
)

_INTERNALS_NEED_IMAGES = "--internals needs the images of the case: give their folder with -i, without --no_images."


@dataclass(frozen=True)
class InternalsRequest:
    """Look inside the network for one case (needs its images)."""

    case: str | None = None
    """None for the first one of the viewer."""
    model_folder: Path | None = None
    """None for the model that was evaluated."""
    fold: str | None = None
    """None for the one that predicted the case, else the first that was evaluated, else 0."""
    checkpoint: str | None = None
    """None for the one that was evaluated."""
    device: str = "cpu"
    trust_checkpoint: bool = False
    """Let the model folder run code; see `inference.predictor.MGMLPredictor`."""


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """What the page is made from and what it shows."""

    evaluation: Path
    """Folder that `evaluate` wrote."""
    output: Path | None = None
    """The page, ``.html`` or ``.htm``, or a folder for a ``report.html``; None for the evaluation's folder."""
    title: str | None = None
    """None for the evaluation's name."""
    training_log: Path | None = None
    """``mgml_training_log.csv``; None for those there are of the evaluated folds."""
    show_cases: bool = True
    """Have a slice viewer where there are images; without, the page shows no patient."""
    images: Path | None = None
    """Folder of images, or a sheet; this and the next three: None for what the evaluation used."""
    labels: Path | None = None
    predictions: PredictionFolders | None = None
    dataset_json: Path | None = None
    cases: Sequence[str] | None = None
    """Cases in the viewer; None for `max_cases` at evenly spaced ranks from worst to best."""
    max_cases: int = 4
    max_megabytes: float = 15.0
    """Size of the viewer's data; cases that do not fit are left out, and the page says so."""
    internals: InternalsRequest | None = None

    def __post_init__(self) -> None:
        if self.max_cases < 1:
            raise ValueError(f"--max_cases must be at least 1, got {self.max_cases}. For no viewer use --no_images.")
        if self.internals is not None and not self.show_cases:
            raise ValueError(_INTERNALS_NEED_IMAGES)

    @property
    def names_files(self) -> bool:
        """Whether something was asked for that only a viewer has a use for."""
        given = (self.images, self.labels, self.predictions, self.dataset_json, self.cases, self.internals)
        return any(value is not None for value in given)


@dataclass(frozen=True)
class Report:
    """The page that was written."""

    path: Path
    megabytes: float
    shows_patients: bool


def make_report(request: ReportRequest) -> Report:
    """Write the page.

    Raises:
        FileNotFoundError: no evaluation, or files that were named do not exist.
        FileExistsError: the output is there and is no page of ours.
        ValueError: an evaluation or files that do not fit, a page that would be too large, or an output that is none.
    """
    output = _output(request)
    evaluation = load_evaluation(request.evaluation)
    _refuse_unknown_cases(request, evaluation)
    metric = headline_metric(evaluation)
    pictures = Pictures(charts=score_charts(evaluation, metric))
    pictures.charts += [training_chart(log, title) for title, log in _training_logs(request, evaluation).items()]
    viewer = None
    files = _files(request, evaluation)
    if files is not None:
        names = list(request.cases or spread_cases(evaluation, metric, request.max_cases))
        viewer = _build_viewer(request, evaluation, metric, files, names, pictures)
        if request.internals is not None:
            pictures.internals = _internals(request.internals, evaluation, files, request.internals.case or names[0])
    page = build_page(evaluation, request.title or evaluation.name, pictures, viewer)
    write_text(output, page)
    return Report(output, len(page.encode()) / _MEGABYTE, viewer is not None)


def _output(request: ReportRequest) -> Path:
    """Return the file to write, which is none but a page."""
    output = request.output or request.evaluation
    if output.is_dir() or request.output is None:
        output = output / PAGE
    elif output.suffix.lower() not in _ENDINGS:
        raise ValueError(
            f"-o {output} is no name of a page: it must end in {' or '.join(_ENDINGS)}, or be a folder that exists. "
            f"Use -o {output.with_suffix('.html')}."
        )
    if output.exists() and not is_page(output):
        raise FileExistsError(f"{output} exists and was not written by mgml report. Give another name with -o.")
    return output


def _files(request: ReportRequest, evaluation: Evaluation) -> EvaluationFiles | None:
    """Return what the viewer is made of; None for no viewer, with a warning where files are gone."""
    if not request.show_cases:
        return None
    stored = evaluation.info.source.images
    if request.images is None and (stored is None or not stored.exists()):
        if request.internals is not None:
            raise ValueError(_INTERNALS_NEED_IMAGES)
        if request.names_files:
            gone = f"are no longer in {stored}" if stored is not None else "are not known"
            raise FileNotFoundError(f"The images of the evaluation {gone}. {_ADVICE}")
        if stored is not None:
            _log.warning(
                "No slice viewer: the images of the evaluation are no longer in %s. Give their folder with -i.", stored
            )
        return None
    try:
        return find_files(
            evaluation,
            request.evaluation,
            images=request.images,
            labels=request.labels,
            predictions=request.predictions,
            dataset_json=request.dataset_json,
        )
    except FileNotFoundError as error:
        if request.names_files:
            raise FileNotFoundError(f"{error} {_ADVICE}") from error
        _log.warning("No slice viewer. %s %s", error, _ADVICE)
        return None


def _training_logs(request: ReportRequest, evaluation: Evaluation) -> dict[str, Path]:
    """Return title -> training log: the one given, else those there are of the evaluated folds."""
    if request.training_log:
        return {"Training": request.training_log}
    model = evaluation.info.model
    if model is None or model.folder is None:
        return {}
    folds = model.folds or ()
    logs = {
        f"Training of fold {fold}" if len(folds) > 1 else "Training": model.folder / f"fold_{fold}" / _TRAINING_LOG
        for fold in folds
    }
    return {title: log for title, log in logs.items() if log.is_file()}


def _refuse_unknown_cases(request: ReportRequest, evaluation: Evaluation) -> None:
    inside = request.internals.case if request.internals is not None else None
    names = [*(request.cases or ()), *([inside] if inside is not None else [])]
    unknown = [name for name in names if name not in evaluation.cases]
    if unknown:
        raise ValueError(
            f"The evaluation has no case {some(dict.fromkeys(unknown))}. It has: {some(evaluation.cases, 20)}."
        )


def _build_viewer(
    request: ReportRequest,
    evaluation: Evaluation,
    metric: Metric,
    files: EvaluationFiles,
    names: Sequence[str],
    pictures: Pictures,
) -> Viewer | None:
    """Fill the case figures of ``pictures`` and return the viewer; None where no case can be shown.

    A case that cannot be read is left out, with a warning, unless something was asked for that only a viewer uses.
    """
    shown = evaluation.restricted(list(files.predictions))
    labels = label_names(evaluation)
    colours = label_colours(list(labels))
    entries: list[dict[str, Any]] = []
    rows: list[Case] = []
    used = unreadable = 0
    images = image_files(names, evaluation.channels, files)
    for name in names:
        try:
            case = load_case(name, evaluation.channels, files, evaluation.info.ignore_label, images[name])
        except (FileNotFoundError, ValueError) as error:
            if request.names_files:
                raise
            _log.warning("Not in the viewer: %s", error)
            unreadable += 1
            continue
        entry = viewer_case(case, sorted(labels))
        size = sum(len(uri) for uri in (*entry["images"].values(), *entry["predictions"].values(), entry["reference"]))
        if used + size > request.max_megabytes * _MEGABYTE:
            _log.warning(
                "Case %s is not in the viewer: with it the data would exceed %g MB (--max_megabytes).",
                name,
                request.max_megabytes,
            )
            continue
        used += size
        entries.append(entry)
        rows.append(overview_row(shown, case))
        pictures.sheets.append(case_sheet(shown, metric, case, colours))
    if unreadable == len(names):
        _log.warning("No slice viewer: no case can be shown. %s", _ADVICE)
        return None
    if not entries:
        raise ValueError(
            f"Not even one case fits into --max_megabytes {request.max_megabytes:g}; one needs about "
            f"{size / _MEGABYTE:.1f}."
        )
    overview = overview_sheet(shown, rows, colours)
    if overview:
        pictures.sheets.insert(0, overview)
    data = viewer_data(shown, metric, entries, labels, colours)
    return Viewer(data, _note(request, evaluation, entries, len(names) - unreadable))


def _note(request: ReportRequest, evaluation: Evaluation, entries: list[dict[str, Any]], asked: int) -> str:
    choice = "as asked for" if request.cases else "at evenly spaced ranks of the mean score, from worst to best"
    steps = {entry["name"]: entry["slices"][1] - entry["slices"][0] for entry in entries if len(entry["slices"]) > 1}
    thinned = [f"{name}: 1 slice in {step}" for name, step in steps.items() if step > 1]
    reduced = [f"{entry['name']} by {entry['factor']}" for entry in entries if entry["factor"] > 1]
    parts = [
        f"The viewer holds {len(entries)} of {len(evaluation.cases)} cases, {choice}.",
        f"{asked - len(entries)} did not fit into {request.max_megabytes:g} MB." if asked > len(entries) else "",
        "It shows axial slices around the labelled ones, cropped to the content, as 8-bit JPEG images scaled "
        "between the 0.5th and 99.5th percentile; label maps are exact.",
        f"At most {MAX_SLICES} slices per case, evenly thinned ({'; '.join(thinned)})." if thinned else "",
        f"Slices are reduced to at most {MAX_SIDE} pixels ({', '.join(reduced)})." if reduced else "",
    ]
    return " ".join(part for part in parts if part)


def _internals(request: InternalsRequest, evaluation: Evaluation, files: EvaluationFiles, case: str) -> list[Picture]:
    """Run the model on one case and draw what it holds inside."""
    evaluated = evaluation.info.model or EvaluatedModel()
    folder = request.model_folder or evaluated.folder
    if folder is None:
        raise ValueError(
            "The evaluation was made from finished predictions and names no model; give its folder with -m."
        )
    # only this part needs torch
    from nnunetv2_mgml.inference.inputs import Case as CaseFiles
    from nnunetv2_mgml.presentation.internals import compute_internals, load_model
    from nnunetv2_mgml.presentation.report.inside import inside_pictures

    fold = request.fold or fold_of_case(evaluation, case)
    checkpoint = request.checkpoint or evaluated.checkpoint or "checkpoint_final.pth"
    model = load_model(folder, fold, checkpoint, request.device, request.trust_checkpoint)
    if model.predictor.channels != evaluation.channels:
        raise ValueError(
            f"The model in {folder} has channels {', '.join(model.predictor.channels)}, the evaluation "
            f"{', '.join(evaluation.channels)}. Give the model that was evaluated with -m."
        )
    images = {channel: str(path) for channel, path in image_files([case], evaluation.channels, files)[case].items()}
    if not images:
        raise FileNotFoundError(f"--internals: {files.images} has no image of case {case}. Name another case, or -i.")
    internals = compute_internals(
        model,
        CaseFiles(case, images),
        files.labels / f"{case}{files.file_ending}",
        telling_subsets(evaluation, most=len(evaluation.channels) + 1),
    )
    return inside_pictures(evaluation, case, internals, label_colours(list(label_names(evaluation))))


def fold_of_case(evaluation: Evaluation, case: str) -> str:
    """Return the (first) fold that predicted a case; where that is not stored the first that was evaluated, else 0."""
    evaluated = evaluation.info.model or EvaluatedModel()
    folds = evaluation.info.folds_of_cases.get(case) or evaluated.folds or ("0",)
    return folds[0]
