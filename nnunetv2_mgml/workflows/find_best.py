"""Choose a model and its post-processing over all subsets; nnU-Net chooses both on complete cases.

Candidates are evaluation folders of the same cases: of configurations, trainers or folds, or of predictions that
``nnUNetv2_ensemble`` merged. Post-processing is nnU-Net's own (largest components), decided by nnU-Net's own function
on the label maps of all subsets together. The plans it needs, for the reader of images and the labels, are those of
the model, or, of merged predictions, those beside them or of a member among the candidates.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import link_or_copy, read_json, scratch, write_json, write_text
from nnunetv2_mgml.plans.model_files import previous_stage
from nnunetv2_mgml.scoring.averages import dice_means
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation
from nnunetv2_mgml.scoring.sources import find_files
from nnunetv2_mgml.scoring.statistics import pairable

POSTPROCESSING = "postprocessing.pkl"
"""What ``nnUNetv2_apply_postprocessing -pp_pkl_file`` takes."""
CHOICE = "find_best.json"
INSTRUCTIONS = "inference_instructions.txt"
"""The commands that predict with what was chosen, named as nnU-Net names its own."""
PLANS, DATASET = "plans.json", "dataset.json"
_SEPARATOR = "__"
_ADVICE = (
    " Post-processing needs both files, of an ensemble those of any member: --plans MODEL_FOLDER. Or choose without "
    "post-processing (--no_postprocessing)."
)


@dataclass(frozen=True, kw_only=True)
class BestRequest:
    """Among what to choose, and where the choice is written."""

    folders: Sequence[Path]
    """Folders that `evaluate` wrote, with Dice and all subsets."""
    output: Path
    """Takes `CHOICE`, `INSTRUCTIONS`, `POSTPROCESSING`, and the plans and ``dataset.json`` that applying it needs."""
    common_cases: bool = False
    """Compare the shared cases where they differ, instead of refusing."""
    postprocessing: bool = True
    """Also decide on post-processing; needs the label maps, and plans."""
    plans: Path | None = None
    """``plans.json``, or a folder with it (a model of the ensemble): needed where none is found beside the predictions
    or by another candidate."""
    num_processes: int = 2

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("mgml find-best needs at least one evaluation folder.")
        if self.num_processes < 1:
            raise ValueError(f"num_processes (-np) must be 1 or more, got {self.num_processes}.")


@dataclass(frozen=True)
class Best:
    """What was chosen."""

    folder: Path
    """The evaluation with the highest mean Dice over subsets, regions and cases, of those where all have a value."""
    means: dict[str, dict[str, float]]
    """Folder -> ``all`` (mean over subsets), ``complete`` and ``single`` (one modality), Dice as a fraction, over
    regions; NaN where no subset and region of the kind has a value in every candidate."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Region -> subsets in which a candidate has no value, as of a label that no case has: they are in no mean."""
    steps: list[str] = field(default_factory=list)
    """What post-processing keeps the largest component of: ``foreground``, or labels of a region."""
    before: float | None = None
    """Mean Dice over all label maps of all subsets, by nnU-Net's rule for empty regions; None: not decided."""
    after: float | None = None
    by_subset: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Subset -> that mean before and after."""
    plans: Path | None = None
    """The plans that post-processing was decided with; None: not decided."""
    commands: list[str] = field(default_factory=list)
    """What a user types to predict with the choice, from a folder ``IN`` to ``OUT``, and to post-process that."""

    @property
    def worse(self) -> dict[str, float]:
        """Subset -> by how much post-processing lowers its mean, of the subsets where it does."""
        return {name: before - after for name, (before, after) in self.by_subset.items() if after < before}

    @property
    def best_when_complete(self) -> Path:
        """The evaluation that complete cases alone would choose."""
        complete = {name: means["complete"] for name, means in self.means.items() if not math.isnan(means["complete"])}
        return Path(max(complete, key=lambda name: complete[name])) if complete else self.folder


def find_best(request: BestRequest) -> Best:
    """Choose, and write the choice.

    Raises:
        FileNotFoundError: a folder is no evaluation, or its label maps are gone.
        ValueError: evaluations of other cases, channels or rules, without Dice, without all subsets or without a value
            that all have; or an output with files of these names that are of no earlier choice.
    """
    _refuse_foreign(request.output)
    evaluations = [load_evaluation(Path(folder)) for folder in request.folders]
    if len(evaluations) > 1:
        evaluations = pairable(evaluations, request.common_cases)
    candidates = {str(folder): evaluation for folder, evaluation in zip(request.folders, evaluations, strict=True)}
    for name, candidate in candidates.items():
        _check(candidate, name)
    means, left_out = dice_means(candidates)
    folder = Path(max(means, key=lambda name: means[name]["all"]))
    best, evaluation = Best(folder, means, left_out), load_evaluation(folder)
    request.output.mkdir(parents=True, exist_ok=True)
    if request.postprocessing:
        best = _with_postprocessing(best, evaluation, evaluations, request)
    if not best.steps:  # of an earlier choice
        for name in (POSTPROCESSING, PLANS, DATASET):
            (request.output / name).unlink(missing_ok=True)
    best = replace(best, commands=_commands(best, evaluation, request.output))
    write_text(request.output / INSTRUCTIONS, "\n".join(best.commands) + "\n")
    write_json(
        request.output / CHOICE,
        {
            "best": str(best.folder),
            "best_by_complete_cases": str(best.best_when_complete),
            "dice": best.means,
            "left_out": best.left_out,
            "postprocessing": None
            if best.before is None
            else {
                "keep_largest_component_of": best.steps,
                "dice_before": best.before,
                "dice_after": best.after,
                "by_subset": {name: {"before": b, "after": a} for name, (b, a) in best.by_subset.items()},
                "plans": str(best.plans),
            },
            "commands": best.commands,
        },
    )
    return best


def _refuse_foreign(output: Path) -> None:
    """Raise a ValueError where files of a model or a data set would be replaced, or taken for an earlier choice's."""
    names = [name for name in (INSTRUCTIONS, PLANS, DATASET) if (output / name).exists()]
    if names and not (output / CHOICE).is_file():
        raise ValueError(
            f"{output} holds {', '.join(names)}, but no earlier choice ({CHOICE}), and is left as it is. Use another "
            f"-o."
        )


def _check(evaluation: Evaluation, folder: str) -> None:
    if "dice" not in evaluation.metrics:
        raise ValueError(f"{folder} has no Dice; evaluate with --metrics dice (or the default).")
    wanted = 2 ** len(evaluation.channels) - 1
    if len(evaluation.subset_names) < wanted:
        raise ValueError(
            f"{folder} shares {len(evaluation.subset_names)} of {wanted} subsets with the others; a choice over all "
            f"subsets needs all of them."
        )


def _with_postprocessing(
    best: Best, evaluation: Evaluation, candidates: Sequence[Evaluation], request: BestRequest
) -> Best:
    """Let nnU-Net decide on the label maps of all subsets together, as if each were a case.

    Raises:
        FileNotFoundError: no label maps, ``dataset.json`` or plans.
        ValueError: plans of other labels.
    """
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing  # slow to import

    plans, dataset = _plans_and_dataset(best.folder, evaluation, candidates, request.plans)
    files = find_files(evaluation, best.folder, images=best.folder, dataset_json=dataset)  # images are not looked at
    with scratch(request.output) as folder:
        for name in ("predicted", "reference"):
            (folder / name).mkdir()
        cases = set(evaluation.cases)
        for subset, predictions in files.predictions.items():
            for path in sorted(predictions.glob(f"*{files.file_ending}")):
                case = path.name[: -len(files.file_ending)]
                if case in cases:
                    for source, place in ((path, "predicted"), (files.labels / path.name, "reference")):
                        link_or_copy(source, folder / place / f"{subset}{_SEPARATOR}{path.name}")
        with contextlib.redirect_stdout(io.StringIO()):  # what it says is said by the command
            _, arguments = determine_postprocessing(
                str(folder / "predicted"),
                str(folder / "reference"),
                str(plans),
                str(dataset),
                request.num_processes,
                keep_postprocessed_files=True,
            )
        decided = read_json(folder / "predicted" / "postprocessing.json")
        before, after = (
            _by_subset(read_json(place / "summary.json"))
            for place in (folder / "predicted", folder / "predicted" / "postprocessed")
        )
        if arguments:
            for name, file in ((PLANS, plans), (DATASET, dataset)):
                shutil.copyfile(file, folder / name)
                os.replace(folder / name, request.output / name)
            os.replace(folder / "predicted" / POSTPROCESSING, request.output / POSTPROCESSING)
    return replace(
        best,
        steps=_steps(arguments, read_json(dataset)["labels"]),
        before=decided["input_folder"]["foreground_mean"]["Dice"],
        after=decided["postprocessed"]["foreground_mean"]["Dice"],
        by_subset={name: (before[name], after[name]) for name in files.predictions if name in before},
        plans=plans,
    )


def _plans_and_dataset(
    folder: Path, evaluation: Evaluation, candidates: Sequence[Evaluation], given: Path | None
) -> tuple[Path, Path]:
    """Return ``plans.json`` and ``dataset.json`` that fit an evaluation's label maps.

    Plans are those given, else of the model, beside the label maps, or of another candidate's model; its labels must
    be the same.

    Raises:
        FileNotFoundError: there is none; the message names ``--plans``.
        ValueError: plans that were given are of other labels.
    """
    source, own = evaluation.info.source, _model_folders([evaluation])
    predicted = [place for path in (source.folders or {}).values() for place in (path, path.parent)]
    beside = [] if source.labels is None else [source.labels, source.labels.parent]
    members = _model_folders(candidates)
    places = [*own, *predicted, *beside, *([] if given is None else [given if given.is_dir() else given.parent])]
    dataset = next((place / DATASET for place in places if (place / DATASET).is_file()), None)
    if dataset is None:
        raise FileNotFoundError(f"{folder}: no {DATASET} beside its label maps.{_ADVICE}")
    if given is not None:
        plans = given if given.is_file() else given / PLANS
        if not plans.is_file():
            raise FileNotFoundError(f"--plans {given} is neither {PLANS} nor a folder with it.")
        if not _same_labels(plans, dataset):
            raise ValueError(
                f"--plans {given} is of a model with other labels, or another file ending, than {dataset}."
            )
        return plans, dataset
    for place in (*own, *predicted, *members):
        if (place / PLANS).is_file() and _same_labels(place / PLANS, dataset):
            return place / PLANS, dataset
    raise FileNotFoundError(
        f"{folder} is not of a model on this machine, and no {PLANS} for its labels lies beside its label maps or in "
        f"the model of another candidate.{_ADVICE}"
    )


def _model_folders(evaluations: Sequence[Evaluation]) -> list[Path]:
    models = [evaluation.info.model for evaluation in evaluations]
    return [model.folder for model in models if model is not None and model.folder is not None]


def _same_labels(plans: Path, dataset: Path) -> bool:
    """Return whether the ``dataset.json`` beside plans, if there is one, has the labels and the file ending wanted."""
    own, wanted = plans.parent / DATASET, read_json(dataset)
    if not own.is_file():
        return True
    content = read_json(own)
    return all(content.get(key) == wanted.get(key) for key in ("labels", "file_ending"))


def _by_subset(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return subset -> mean over regions of the mean Dice over cases, from nnU-Net's ``summary.json``."""
    found: dict[str, dict[str, list[float]]] = {}
    for entry in summary["metric_per_case"]:
        subset = Path(entry["prediction_file"]).name.partition(_SEPARATOR)[0]
        for region, values in entry["metrics"].items():
            found.setdefault(subset, {}).setdefault(region, []).append(values["Dice"])
    means = {}
    for subset, regions in found.items():
        defined = [[value for value in values if value == value] for values in regions.values()]
        each = [sum(values) / len(values) for values in defined if values]
        if each:
            means[subset] = sum(each) / len(each)
    return means


def _steps(arguments: Sequence[Mapping[str, Any]], labels: Mapping[str, Any]) -> list[str]:
    """Name what the steps keep the largest component of."""
    names = {tuple(v) if isinstance(v, list) else (v,): str(name) for name, v in labels.items()}
    steps = []
    for entry in arguments:
        kept = entry["labels_or_regions"]
        values = tuple(kept) if isinstance(kept, (list, tuple)) else (kept,)
        steps.append("foreground" if isinstance(kept, list) else names.get(values, ", ".join(map(str, values))))
    return steps


def _commands(best: Best, evaluation: Evaluation, output: Path) -> list[str]:
    """Return what a user types: prediction where the model is known, and post-processing where some helps."""
    lines = []
    model = evaluation.info.model
    if model is not None and model.folder is not None:
        options = ["-f", *dict.fromkeys(model.folds or ("0",))]
        options += [] if model.checkpoint in (None, "checkpoint_final.pth") else ["-chk", str(model.checkpoint)]
        options += [] if model.tile_step_size in (None, 0.5) else ["-step_size", f"{model.tile_step_size:g}"]
        options += ["--disable_tta"] if model.mirroring is False else []
        stage = previous_stage(model.folder)
        steps: list[tuple[str, Path, list[str]]] = [("OUT", model.folder, [])]
        if stage is not None:
            lower = f"OUT_{stage.name.rpartition('__')[2]}"
            steps = [(lower, stage, []), ("OUT", model.folder, ["-prev_stage_predictions", lower])]
        lines += [
            f"nnUNetv2_predict_from_modelfolder -i IN -o {out} {shlex.join(['-m', str(folder), *options, *more])} "
            f"--missing_modalities auto"
            for out, folder, more in steps
        ]
    if best.steps:
        files = ("-pp_pkl_file", POSTPROCESSING), ("-plans_json", PLANS), ("-dataset_json", DATASET)
        given = [word for option, name in files for word in (option, str((output / name).resolve()))]
        lines.append(f"nnUNetv2_apply_postprocessing -i OUT -o OUT_PP {shlex.join(given)}")
    return lines
