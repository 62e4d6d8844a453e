"""Evaluate a model, or finished predictions, on every subset of the modalities.

A model's label maps are predicted first (`inference.subsets`); from there on both are the same: scored
(`scoring`), written as tables and figures (`presentation`). Both resume where they stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_mgml.inference.subset_quality import REPORT_NAME
from nnunetv2_mgml.io.cpus import usable_cpus
from nnunetv2_mgml.io.progress import Log, progress_bar
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.regions import check_scored_regions
from nnunetv2_mgml.presentation.outputs import write_evaluation
from nnunetv2_mgml.scoring.cases import CasePool, CaseTask, Scores, ScoringSettings, collect
from nnunetv2_mgml.scoring.info import EvaluatedModel, EvaluationInfo, Source, as_json
from nnunetv2_mgml.scoring.metrics import default_metrics, get_metric
from nnunetv2_mgml.scoring.metrics.lesionwise import require_panoptica
from nnunetv2_mgml.scoring.output import PREVIOUS_STAGE, open_output
from nnunetv2_mgml.scoring.policy import get_policy
from nnunetv2_mgml.scoring.regions import label_set, resolve_region
from nnunetv2_mgml.scoring.results import Evaluation, build_evaluation
from nnunetv2_mgml.scoring.sources import (
    LABELS,
    PREDICTIONS,
    PredictionFolders,
    choose_subsets,
    file_ending,
    find_dataset_json,
    find_references,
    load_dataset_json,
    need_folder,
    pair_cases,
    prediction_folders,
)
from nnunetv2_mgml.scoring.subset_report import write_subset_report

if TYPE_CHECKING:
    from nnunetv2_mgml.inference.subsets.label_maps import SubsetLabelMaps, SubsetSettings
    from nnunetv2_mgml.inference.subsets.predictor import SubsetPredictor
    from nnunetv2_mgml.workflows.labelled_cases import LabelledCases

_VALIDATION_FOLDER = "subset_evaluation"


@dataclass(frozen=True, kw_only=True)
class ScoringRequest:
    """What both kinds of evaluation can be asked for."""

    subsets: Sequence[str] | None = None
    """Modality subsets such as ``t1+flair``, ``all`` or ``full``; None for all."""
    allow_missing: bool = False
    """Leave out what is not there instead of refusing: cases without a prediction in every folder; with a model,
    subsets whose modalities a case does not have."""
    policy: str = "auto"
    """Value where reference or prediction is empty: ``auto`` or one of `scoring.policy.POLICIES`."""
    metrics: Sequence[str] | None = None
    """Names of `scoring.metrics`; None for all but the optional ones."""
    min_region_voxels: Mapping[str, int] = field(default_factory=dict)
    """Region -> N: a predicted region of fewer than N voxels counts as empty."""
    name: str | None = None
    """What the method is called in tables; None for the folder's name or the trainer's."""
    num_processes: int = 2
    """Processes that compute metrics; 0 for none but this one."""
    overwrite: bool = False
    """Start again instead of resuming; where only scoring settings differ, label maps are kept and scored again."""
    restart_if_changed: bool = False
    """``overwrite`` where settings differ, resume where they do not."""
    figures: bool = True
    """Write PNG files to ``figures``."""
    show_progress: bool = True
    """Draw a bar."""
    log: Log | None = None
    """Takes a line per tenth of the work in place of the bar."""

    def __post_init__(self) -> None:
        get_policy(self.policy)
        if any(get_metric(name).optional for name in self.metrics or ()):
            require_panoptica()
        if self.num_processes < 0:
            raise ValueError(f"num_processes (-np) must be 0 or more, got {self.num_processes}.")

    def settings(self, dataset_json: dict[str, Any]) -> ScoringSettings:
        """Return what is computed for a data set.

        Raises:
            ValueError: a region it does not have, or regions that no prediction can get right.
        """
        check_scored_regions(dataset_json)
        labels = label_set(dataset_json)
        sizes = {resolve_region(name, labels.regions): size for name, size in self.min_region_voxels.items()}
        return ScoringSettings(labels, self.policy, tuple(self.metrics or default_metrics()), sizes)


@dataclass(frozen=True, kw_only=True)
class PredictionsRequest(ScoringRequest):
    """Evaluate finished label maps of any origin."""

    predictions: PredictionFolders
    """One root whose folders are named by subset, or subset -> folder of ``<case><ending>``."""
    labels: Path
    """Folder of reference label maps ``<case><ending>``."""
    output: Path
    """The evaluation folder."""
    dataset_json: Path | Mapping[str, Any] | None = None
    """File, or content: labels, channel names and file ending. None: searched beside predictions and labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _as_paths(self, "labels", "output", "predictions", "dataset_json")


@dataclass(frozen=True, kw_only=True)
class ModelRequest(ScoringRequest):
    """Evaluate a trained model on its validation cases, or on a folder of images with labels."""

    model_folder: Path
    """``TRAINER__PLANS__CONFIGURATION``."""
    folds: Sequence[int | str] = (0,)
    """Validation cases: each fold's cases by its own model. A folder: one ensemble of all of them."""
    checkpoint: str = "checkpoint_final.pth"
    dataset: str | None = None
    """Name or number of the data set whose validation cases are meant; None: the one the model folder lies in."""
    images: Path | None = None
    """Folder of images ``<case>_XXXX<ending>``; None for validation cases."""
    labels: Path | None = None
    """Folder of reference label maps ``<case><ending>``; goes with ``images``."""
    output: Path | None = None
    """The evaluation folder; validation cases have a default, see `output_folder`."""
    device: str = "cuda"
    """``cuda``, ``cpu`` or ``mps``."""
    tile_step_size: float = 0.5
    """Step of the sliding window, as a share of the patch."""
    mirroring: bool = True
    cpu_bfloat16: bool = False
    """bfloat16 on a CPU that has it."""
    shared_preprocessing: bool = False
    """Crop and normalise once from all modalities instead of exactly as prediction from a subset does."""
    num_processes_preprocessing: int = 1
    num_processes_export: int = 2
    trust_checkpoint: bool = False
    """Let the model folder run code; see `inference.predictor.MGMLPredictor`."""
    write_subset_report: bool = False
    """Store the quality per subset in the model folder, for predictions to quote."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _as_paths(self, "model_folder", "images", "labels", "output")
        if self.images is not None or self.labels is not None:
            for option, value in (("-i IMAGES", self.images), ("-l LABELS", self.labels), ("-o OUT", self.output)):
                if value is None:
                    raise ValueError(f"Evaluating a model on a folder needs -i, -l and -o; {option} is missing.")
        elif "all" in self.folds:
            raise ValueError(
                "Fold 'all' trained on every case, so it has no validation cases. Evaluate it on other ones with -i "
                "and -l."
            )
        if self.write_subset_report and self.metrics and "dice" not in self.metrics:
            raise ValueError(
                f"--write_subset_report stores Dice, but --metrics has only {', '.join(self.metrics)}. "
                f"Add dice to --metrics, or leave one of the two out."
            )

    @property
    def output_folder(self) -> Path:
        """The evaluation folder: ``output``, else ``subset_evaluation[_no_mirroring]`` in the fold's folder, or with
        ``_folds_0_1`` at the end in the model's."""
        if self.output is not None:
            return self.output
        name = f"{_VALIDATION_FOLDER}{'' if self.mirroring else '_no_mirroring'}"
        if len(self.folds) == 1:
            return self.model_folder / f"fold_{self.folds[0]}" / name
        return self.model_folder / f"{name}_folds_{'_'.join(map(str, self.folds))}"

    @property
    def subset_report(self) -> Path:
        """Where ``write_subset_report`` writes."""
        return self.model_folder / REPORT_NAME


def _as_paths(request: ScoringRequest, *names: str) -> None:
    """Turn fields that were given as text into paths."""
    for name in names:
        value = getattr(request, name)
        if isinstance(value, str):
            object.__setattr__(request, name, Path(value))


def evaluate_predictions(request: PredictionsRequest) -> Evaluation:
    """Evaluate finished predictions.

    Returns:
        The evaluation, as written to the output folder.

    Raises:
        ValueError, FileNotFoundError: wrong input, naming the case and the fix. Finished cases are kept.
    """
    dataset_json = _dataset_json(request)
    channels, ending = channel_names(dataset_json), file_ending(dataset_json)
    folders = prediction_folders(request.predictions, channels)
    if request.subsets:
        wanted = choose_subsets(request.subsets, channels)
        absent = [name for name in wanted if name not in folders]
        if absent:
            raise ValueError(
                f"--subsets asks for {', '.join(absent)}, but --predictions has only {', '.join(folders)}."
            )
        folders = {name: folders[name] for name in wanted}
    settings = request.settings(dataset_json)
    found = pair_cases(find_references(request.labels, ending), folders, ending, request.allow_missing)
    labels = request.labels.resolve()
    open_output(
        request.output,
        {
            "scoring": settings.as_dict(),
            "channels": list(channels),
            "source": as_json(Source("predictions", labels=labels)),
        },
        request.overwrite,
        list(folders),
        [request.labels, *folders.values(), *([request.predictions] if isinstance(request.predictions, Path) else [])],
        request.restart_if_changed,
    )
    with CasePool(settings, request.output / "cases", request.num_processes) as pool:
        for task in found.tasks:
            pool.submit(task)
        scores = _scores(pool, request, len(found.tasks), {})
    source = Source("predictions", labels=labels, folders={name: folder.resolve() for name, folder in folders.items()})
    evaluation = build_evaluation(
        request.name or request.output.resolve().name,
        scores,
        list(folders),
        channels,
        settings,
        EvaluationInfo(source=source, missing_cases=tuple(found.missing)),
    )
    write_evaluation(evaluation, request.output, request.figures)
    return evaluation


def _dataset_json(request: PredictionsRequest) -> dict[str, Any]:
    if isinstance(request.dataset_json, Mapping):
        return dict(request.dataset_json)
    given = request.predictions
    folders = [need_folder(folder, PREDICTIONS) for folder in ([given] if isinstance(given, Path) else given.values())]
    labels = need_folder(request.labels, LABELS)
    inside = [sub for folder in folders for sub in sorted(folder.iterdir()) if sub.is_dir()]
    return load_dataset_json(find_dataset_json([*folders, *inside, labels, labels.parent], request.dataset_json))


def evaluate_model(request: ModelRequest) -> Evaluation:
    """Predict and score every case on every subset; label maps are kept in ``predictions`` of the output folder.

    Returns:
        The evaluation, as written to ``request.output_folder``.

    Raises:
        ValueError, FileNotFoundError: a request that does not fit the model or its cases, a model that does not
            support missing modalities, or cases that failed. What is finished is kept and not done again.
    """
    from nnunetv2_mgml.inference.model_check import check_model_folder  # torch is slow to import
    from nnunetv2_mgml.inference.subsets.label_maps import SubsetLabelMaps, SubsetSettings
    from nnunetv2_mgml.workflows.labelled_cases import folder_cases, validation_cases, warn_of_other_training_cases

    folds = tuple(check_model_folder(request.model_folder, list(map(str, request.folds)), request.checkpoint))
    dataset_json = load_dataset_json(request.model_folder / "dataset.json")
    channels = channel_names(dataset_json)
    subsets = choose_subsets(request.subsets, channels)
    scoring = request.settings(dataset_json)
    if request.write_subset_report and len(subsets) < 2 ** len(channels) - 1:
        raise ValueError(
            f"--write_subset_report replaces what the model folder says of all {2 ** len(channels) - 1} "
            f"subsets, but --subsets evaluates only {', '.join(subsets)}. Leave one of the two out."
        )
    if request.images is not None and request.labels is not None:
        cases = folder_cases(request.images, request.labels, folds, dataset_json, request.allow_missing)
    else:
        dataset = request.dataset or request.model_folder.resolve().parent.name
        cases = validation_cases(request.model_folder, dataset, folds)
        warn_of_other_training_cases(request.model_folder, dataset, folds, request.checkpoint, request.trust_checkpoint)
    output = request.output_folder
    first = _first_stage(request, folds, cases, subsets)
    settings = SubsetSettings(
        request.model_folder,
        request.checkpoint,
        request.shared_preprocessing or cases.preprocessed is not None,
        request.allow_missing,
        cases.preprocessed,
        None if first is None else first.folder,
        request.num_processes_preprocessing,
        request.num_processes_export,
    )
    label_maps = SubsetLabelMaps(_predictor(request), cases.work, subsets, output / "predictions", settings)
    label_maps.refuse_incomplete()
    evaluation = _evaluate_label_maps(request, label_maps, cases, subsets, scoring, first)
    if request.write_subset_report:
        write_subset_report(evaluation, request.model_folder, label_maps.folder)
    return evaluation


def _first_stage(
    request: ModelRequest, folds: tuple[int | str, ...], cases: LabelledCases, subsets: Sequence[str]
) -> SubsetLabelMaps | None:
    """Return what predicts the first stage of a cascade from every subset, by the model beside; None for other models.

    Raises:
        FileNotFoundError: that model, or a fold of it, is not there.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_mgml.inference.model_check import check_model_folder
    from nnunetv2_mgml.inference.subsets.label_maps import SubsetLabelMaps, SubsetSettings

    head, _, configuration = request.model_folder.resolve().name.rpartition("__")
    plans = PlansManager(str(request.model_folder / "plans.json"))
    if configuration not in plans.available_configurations:
        return None
    stage = plans.get_configuration(configuration).previous_stage_name
    if stage is None:
        return None
    folder = request.model_folder.resolve().parent / f"{head}__{stage}"
    try:
        check_model_folder(folder, folds, request.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"{request.model_folder} is the second stage of a cascade; every subset is first predicted by {folder}. "
            f"{error} Or predict with nnUNetv2_predict -prev_stage_predictions, one folder per subset, and evaluate "
            f"those with --predictions."
        ) from error
    settings = SubsetSettings(
        folder,
        request.checkpoint,
        request.shared_preprocessing,
        request.allow_missing,
        num_processes_preprocessing=request.num_processes_preprocessing,
        num_processes_export=request.num_processes_export,
    )
    return SubsetLabelMaps(_predictor(request), cases.work, subsets, request.output_folder / PREVIOUS_STAGE, settings)


def _evaluate_label_maps(
    request: ModelRequest,
    label_maps: SubsetLabelMaps,
    cases: LabelledCases,
    subsets: Sequence[str],
    scoring: ScoringSettings,
    first: SubsetLabelMaps | None,
) -> Evaluation:
    """Score every case as soon as its label maps are there; of a cascade, ``first`` predicts the first stage."""
    predictor, output = label_maps.predictor, request.output_folder
    model = _describe(predictor, label_maps.settings, cases)
    previous = {} if first is None else {"previous_stage": as_json(_describe(first.predictor, first.settings, cases))}
    open_output(
        output,
        {
            "scoring": scoring.as_dict(),
            "channels": list(predictor.channels),
            "source": as_json(cases.lasting_source),
            "model": as_json(model),
            **previous,
        },
        request.overwrite,
        subsets,
        [request.model_folder, *cases.files],
        request.restart_if_changed,
    )
    failures: dict[str, Exception] = {}
    lacking: dict[str, tuple[str, ...]] = {}
    total = sum(len(part.cases) for part in cases.work)
    if first is not None:
        title = f"Predicting {predictor.configuration_manager.previous_stage_name}"
        with (
            progress_bar(None, total, request.show_progress, title, request.log) as bar,
            contextlib.closing(first.predict()) as predicted,
        ):
            for _ in predicted:  # a case that fails here fails again below, for want of its file
                bar.update()
    with CasePool(scoring, output / "cases", request.num_processes) as pool:
        with (
            progress_bar(None, total, request.show_progress, "Predicting", request.log) as bar,
            contextlib.closing(label_maps.predict()) as predicted,
        ):
            for maps in predicted:
                if maps.error is not None:
                    failures[maps.case] = maps.error
                if maps.lacking:
                    lacking[maps.case] = maps.lacking
                if maps.files:
                    pool.submit(CaseTask(maps.case, cases.references[maps.case], maps.files))
                bar.update()
        scores = _scores(pool, request, total - len(failures), failures)
    if not scores:
        raise ValueError(f"No case has the modalities of any of {', '.join(subsets)}. Choose other --subsets.")
    folds = {case.name: tuple(map(str, part.folds)) for part in cases.work for case in part.cases}
    info = EvaluationInfo(source=cases.source, model=model, not_evaluated=lacking, folds_of_cases=folds)
    evaluation = build_evaluation(
        request.name or predictor.trainer_name, scores, subsets, predictor.channels, scoring, info
    )
    write_evaluation(evaluation, output, request.figures)
    return evaluation


def _scores(pool: CasePool, request: ScoringRequest, total: int, failures: dict[str, Exception]) -> dict[str, Scores]:
    return collect(progress_bar(pool.results(), total, request.show_progress, log=request.log), failures)


def _describe(predictor: SubsetPredictor, settings: SubsetSettings, cases: LabelledCases) -> EvaluatedModel:
    folds = tuple(str(fold) for part in cases.work for fold in part.folds)
    status = [(settings.model_folder / f"fold_{fold}" / settings.checkpoint).stat() for fold in folds]
    return EvaluatedModel(
        settings.model_folder.resolve(),
        folds,
        settings.checkpoint,
        tuple((s.st_size, s.st_mtime_ns) for s in status),
        predictor.trainer_name,
        predictor.use_mirroring,
        predictor.tile_step_size,
        predictor.cpu_bfloat16,
        settings.shared_preprocessing,
    )


def _predictor(request: ModelRequest) -> SubsetPredictor:
    import torch

    from nnunetv2_mgml.inference.arguments import check_device, check_step_size
    from nnunetv2_mgml.inference.subsets.predictor import SubsetPredictor

    check_step_size(request.tile_step_size)
    check_device(request.device)
    if request.device == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    return SubsetPredictor(
        tile_step_size=request.tile_step_size,
        use_gaussian=True,
        use_mirroring=request.mirroring,
        perform_everything_on_device=True,
        device=torch.device(request.device),
        allow_tqdm=False,
        cpu_bfloat16=request.cpu_bfloat16,
        trust_checkpoint=request.trust_checkpoint,
    )
