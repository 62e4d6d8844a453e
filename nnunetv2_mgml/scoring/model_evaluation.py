"""Evaluate a trained model: predict every subset of every case, then score the files as `evaluate` does.

Memory for a case with S subsets, R heads and V voxels after cropping and resampling, beside the network: ``4 M V``
bytes of input per case (of two or three at a time) and ``2 S R V`` bytes of logits (of two while one is exported). For
BraTS (S 15, R 3) that is 0.3 GB of logits per case cropped to the brain (about 140 x 175 x 140) and 0.8 GB if a
240 x 240 x 155 volume were not cropped at all.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_mgml.inference.inputs import Case
from nnunetv2_mgml.inference.model_check import check_supported
from nnunetv2_mgml.inference.preprocessing import Item, Job, iterate_items
from nnunetv2_mgml.inference.subsets.groups import prepare_subset_groups
from nnunetv2_mgml.inference.subsets.predictor import SubsetPredictor
from nnunetv2_mgml.io.progress import progress_bar
from nnunetv2_mgml.io.workers import Task, WorkerPool
from nnunetv2_mgml.modalities import Subset, parse_subset, subset_name
from nnunetv2_mgml.scoring.cases import CasePool, CaseTask, ScoringSettings, collect
from nnunetv2_mgml.scoring.evaluate import EvaluationOptions, finish
from nnunetv2_mgml.scoring.output import drop_outdated, open_output
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.upstream.export import export_case

_log = logging.getLogger(__name__)
_PLACES = ("images", "labels")
"""Of a data set known by its name these may change: it may be moved between two runs."""


@dataclass(frozen=True)
class LabelledCase:
    """A case to evaluate a model on."""

    case: Case
    reference: Path


@dataclass(frozen=True)
class FoldCases:
    """Cases and the weights that predict them."""

    folds: tuple[int | str, ...]
    """Folds whose logits are averaged; for validation cases the one that did not train on them."""
    cases: list[LabelledCase]


@dataclass(frozen=True)
class PredictionOptions:
    """How a model predicts; what else counts (mirroring, step size, device) is set on the predictor."""

    model_folder: Path
    checkpoint: str = "checkpoint_final.pth"
    shared_preprocessing: bool = False
    """Crop and normalise once from all modalities instead of exactly as prediction from a subset does."""
    allow_missing: bool = False
    """Evaluate a case only on the subsets whose modalities it has, instead of refusing it."""
    num_processes_preprocessing: int = 1
    num_processes_export: int = 2


def evaluate_model(
    predictor: SubsetPredictor,
    work: Sequence[FoldCases],
    subsets: Sequence[str],
    output: Path,
    prediction: PredictionOptions,
    options: EvaluationOptions,
    source: dict[str, Any],
) -> Evaluation:
    """Predict and score every case on every subset.

    Args:
        predictor: the folds of ``work`` are loaded into it one after the other.
        work: which folds predict which cases.
        subsets: subset names, in table order.
        output: the evaluation folder; label maps are kept in its ``predictions``.
        prediction: model and preprocessing.
        options: scoring.
        source: JSON-ready description of the cases, for the fingerprint and ``summary.json``.

    Raises:
        ValueError, FileNotFoundError: a model that does not support missing modalities, or cases that failed. What is
            finished is kept and not done again.
    """
    _load(predictor, prediction, work[0].folds)
    settings = options.scoring(predictor.dataset_json)
    model = _describe(predictor, prediction, work)
    run = _Run(
        predictor, [parse_subset(name, predictor.channels) for name in subsets], output, prediction, settings, options
    )
    if not prediction.allow_missing:
        run.refuse_incomplete(work)
    inputs = [
        Path(file)
        for part in work
        for labelled in part.cases
        for file in (labelled.reference, *labelled.case.files.values())
    ]
    fixed = {key: value for key, value in source.items() if source["kind"] != "validation" or key not in _PLACES}
    open_output(
        output,
        {"scoring": settings.as_dict(), "channels": list(predictor.channels), "source": fixed, "model": model},
        options.overwrite,
        subsets,
        inputs,
        options.restart_if_changed,
    )
    total = sum(len(part.cases) for part in work)
    with run.scoring, run.exporting:
        with progress_bar(None, total, options.show_progress, "Predicting", options.log) as bar:
            for number, part in enumerate(work):
                if number:
                    _load(predictor, prediction, part.folds)
                run.predict(part.cases, bar)
        scored = progress_bar(run.scoring.results(), total - len(run.failures), options.show_progress, log=options.log)
        scores = collect(scored, run.failures)
    if not scores:
        raise ValueError(f"No case has the modalities of any of {', '.join(subsets)}. Choose other --subsets.")
    info = {
        "source": source,
        "model": model,
        "not_evaluated": run.lacking,
        "folds_of_cases": {
            labelled.case.name: [str(fold) for fold in part.folds] for part in work for labelled in part.cases
        },
    }
    return finish(output, scores, subsets, predictor.dataset_json, settings, options, predictor.trainer_name, info)


def _load(predictor: SubsetPredictor, prediction: PredictionOptions, folds: Sequence[int | str]) -> None:
    predictor.initialize_from_trained_model_folder(str(prediction.model_folder), list(folds), prediction.checkpoint)
    check_supported(predictor.network, predictor.trainer_name)
    previous = predictor.configuration_manager.previous_stage_name
    if previous is not None:
        raise ValueError(
            f"This model is the second stage of a cascade and needs predictions of {previous} for every "
            f"subset. Predict with nnUNetv2_predict -prev_stage_predictions, one folder per subset, and "
            f"evaluate those with --predictions."
        )


def _describe(predictor: SubsetPredictor, prediction: PredictionOptions, work: Sequence[FoldCases]) -> dict[str, Any]:
    folds = [str(fold) for part in work for fold in part.folds]
    checkpoints = [prediction.model_folder / f"fold_{fold}" / prediction.checkpoint for fold in folds]
    return {
        "folder": str(prediction.model_folder.resolve()),
        "folds": folds,
        "checkpoint": prediction.checkpoint,
        "checkpoint_size_and_time_ns": [[p.stat().st_size, p.stat().st_mtime_ns] for p in checkpoints],
        "trainer": predictor.trainer_name,
        "mirroring": predictor.use_mirroring,
        "tile_step_size": predictor.tile_step_size,
        "cpu_bfloat16": predictor.cpu_bfloat16,
        "shared_preprocessing": prediction.shared_preprocessing,
    }


class _Run:
    """Carries one evaluation from cases to scoring; `failures` and `lacking` tell what did not work."""

    def __init__(
        self,
        predictor: SubsetPredictor,
        subsets: list[Subset],
        output: Path,
        prediction: PredictionOptions,
        settings: ScoringSettings,
        options: EvaluationOptions,
    ) -> None:
        self.predictor = predictor
        self.subsets = subsets
        self.output = output
        self.prediction = prediction
        self.ending = predictor.dataset_json["file_ending"]
        self.scoring = CasePool(settings, output / "cases", options.num_processes)
        self.exporting = WorkerPool(prediction.num_processes_export)
        self.failures: dict[str, Exception] = {}
        self.lacking: dict[str, list[str]] = {}
        self._waiting: deque[tuple[CaseTask, list[Task]]] = deque()

    def refuse_incomplete(self, work: Sequence[FoldCases]) -> None:
        """Raise a ValueError naming the cases that lack a modality some subset needs, before any work."""
        channels = self.predictor.channels
        needed = [c for c in range(len(channels)) if any(s[c] for s in self.subsets)]
        incomplete = {
            labelled.case.name: [channels[c] for c in needed if c not in labelled.case.files]
            for part in work
            for labelled in part.cases
        }
        named = [f"{case} ({', '.join(absent)})" for case, absent in incomplete.items() if absent]
        if named:
            raise ValueError(
                f"{len(named)} cases lack a modality: {', '.join(named[:10])}"
                f"{', ...' if len(named) > 10 else ''}. {_ALLOW}"
            )

    def predict(self, cases: Sequence[LabelledCase], bar: tqdm) -> None:
        """Predict what is not there yet, and hand complete cases to scoring."""
        jobs, references = [], {}
        for labelled in cases:
            drop_outdated(self.output, labelled.case.name, self.ending, labelled.case.files)
            todo = [s for s in self.subsets if not self._file(s, labelled.case.name).is_file()]
            if not todo:
                self._submit(labelled.case.name, labelled.reference, self.subsets)
                bar.update()
                continue
            references[labelled.case.name] = labelled.reference
            jobs.append(
                Job(
                    labelled.case.name,
                    None,
                    partial(
                        prepare_subset_groups,
                        labelled.case,
                        todo,
                        self.predictor.model,
                        self.prediction.shared_preprocessing,
                    ),
                )
            )
        for item in iterate_items(jobs, self.prediction.num_processes_preprocessing):
            try:
                self._predict_item(item, references[item["case"]])
            except Exception as error:  # out of memory, a full disk: the next case may still work
                _log.exception("Case %s failed", item["case"])
                self.failures[item["case"]] = ValueError(f"Case {item['case']}: {type(error).__name__}: {error}")
            bar.update()
        while self._waiting:
            self._finish_export()

    def _predict_item(self, item: Item, reference: Path) -> None:
        case, predictor = item["case"], self.predictor
        names = [subset_name(s, predictor.channels) for s in item.get("lacking", [])]
        if "error" in item:
            self.failures[case] = ValueError(item["error"])
            return
        if names and not self.prediction.allow_missing:
            self.failures[case] = ValueError(
                f"Case {case}: a modality is empty, so it cannot be evaluated on {', '.join(names)}. {_ALLOW}"
            )
            return
        if names:
            self.lacking[case] = names
        exports = []
        for group in item["groups"]:
            logits = predictor.predict_subsets(group.full_data(len(predictor.channels)), group.subsets)
            for subset, own in zip(group.subsets, logits, strict=True):
                ofile = str(self._file(subset, case))[: -len(self.ending)]
                exports.append(
                    self.exporting.submit(
                        export_case,
                        own,
                        group.properties,
                        predictor.configuration_manager,
                        predictor.plans_manager,
                        predictor.dataset_json,
                        ofile,
                        False,
                    )
                )
        task = self._task(case, reference, [s for s in self.subsets if s not in item["lacking"]])
        self._waiting.append((task, exports))
        while len(self._waiting) > 1:
            self._finish_export()

    def _finish_export(self) -> None:
        task, exports = self._waiting.popleft()
        try:
            for export in exports:
                self.exporting.result(export)
        except Exception as error:  # the others are still exported
            _log.exception("Export of case %s failed", task.case)
            self.failures[task.case] = ValueError(f"Case {task.case}: export failed ({type(error).__name__}: {error})")
            return
        if task.predictions:
            self.scoring.submit(task)

    def _file(self, subset: Subset, case: str) -> Path:
        return self.output / "predictions" / subset_name(subset, self.predictor.channels) / f"{case}{self.ending}"

    def _task(self, case: str, reference: Path, subsets: Sequence[Subset]) -> CaseTask:
        return CaseTask(
            case, reference, {subset_name(s, self.predictor.channels): self._file(s, case) for s in subsets}
        )

    def _submit(self, case: str, reference: Path, subsets: Sequence[Subset]) -> None:
        self.scoring.submit(self._task(case, reference, subsets))


_ALLOW = "With --allow_missing every subset is evaluated on the cases that have its modalities."
