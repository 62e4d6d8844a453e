"""Choose a model and its post-processing over all subsets; nnU-Net chooses both on complete cases.

Candidates are evaluation folders of the same cases: of configurations, trainers or folds, or of predictions that
``nnUNetv2_ensemble`` merged. Post-processing is nnU-Net's own (largest components), decided by nnU-Net's own function
on the label maps of all subsets together.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json, scratch, write_json
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation, load_evaluation
from nnunetv2_mgml.scoring.sources import find_files
from nnunetv2_mgml.scoring.statistics import pairable

POSTPROCESSING = "postprocessing.pkl"
"""What ``nnUNetv2_apply_postprocessing -pp_pkl_file`` takes."""
CHOICE = "find_best.json"
_SEPARATOR = "__"


@dataclass(frozen=True, kw_only=True)
class BestRequest:
    """Among what to choose, and where the choice is written."""

    folders: Sequence[Path]
    """Folders that `evaluate` wrote, with Dice and all subsets."""
    output: Path
    """Takes `CHOICE` and `POSTPROCESSING`."""
    common_cases: bool = False
    """Compare the shared cases where they differ, instead of refusing."""
    postprocessing: bool = True
    """Also decide on post-processing; needs the label maps and the plans of the model."""
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
    """The evaluation with the highest mean Dice over subsets, regions and cases."""
    means: dict[str, dict[str, float]]
    """Folder -> ``all`` (mean over subsets), ``complete`` and ``single`` (one modality), Dice as a fraction, over
    regions."""
    steps: list[str] = field(default_factory=list)
    """What post-processing keeps the largest component of: ``foreground``, or labels of a region."""
    before: float | None = None
    """Mean Dice over all label maps of all subsets, by nnU-Net's rule for empty regions; None: not decided."""
    after: float | None = None
    by_subset: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Subset -> that mean before and after."""

    @property
    def worse(self) -> dict[str, float]:
        """Subset -> by how much post-processing lowers its mean, of the subsets where it does."""
        return {name: before - after for name, (before, after) in self.by_subset.items() if after < before}

    @property
    def best_when_complete(self) -> Path:
        """The evaluation that complete cases alone would choose."""
        return Path(max(self.means, key=lambda name: self.means[name]["complete"]))


def find_best(request: BestRequest) -> Best:
    """Choose, and write the choice.

    Raises:
        FileNotFoundError: a folder is no evaluation, or its label maps are gone.
        ValueError: evaluations of other cases, channels or rules, without Dice or without all subsets.
    """
    evaluations = [load_evaluation(Path(folder)) for folder in request.folders]
    if len(evaluations) > 1:
        evaluations = pairable(evaluations, request.common_cases)
    means = {}
    for folder, evaluation in zip(request.folders, evaluations, strict=True):
        _check(evaluation, folder)
        means[str(folder)] = _means(evaluation)
    folder = Path(max(means, key=lambda name: means[name]["all"]))
    best = Best(folder, means)
    request.output.mkdir(parents=True, exist_ok=True)
    if request.postprocessing:
        best = _with_postprocessing(best, load_evaluation(folder), request)
    if not best.steps:  # of an earlier choice
        (request.output / POSTPROCESSING).unlink(missing_ok=True)
    write_json(
        request.output / CHOICE,
        {
            "best": str(best.folder),
            "best_by_complete_cases": str(best.best_when_complete),
            "dice": best.means,
            "postprocessing": None
            if best.before is None
            else {
                "keep_largest_component_of": best.steps,
                "dice_before": best.before,
                "dice_after": best.after,
                "by_subset": {name: {"before": b, "after": a} for name, (b, a) in best.by_subset.items()},
            },
        },
    )
    return best


def _check(evaluation: Evaluation, folder: Path) -> None:
    if "dice" not in evaluation.metrics:
        raise ValueError(f"{folder} has no Dice; evaluate with --metrics dice (or the default).")
    wanted = 2 ** len(evaluation.channels) - 1
    if len(evaluation.subset_names) < wanted:
        raise ValueError(
            f"{folder} shares {len(evaluation.subset_names)} of {wanted} subsets with the others; a choice over all "
            f"subsets needs all of them."
        )


def _means(evaluation: Evaluation) -> dict[str, float]:
    summaries = [evaluation.summary("dice", region) for region in evaluation.region_names]
    names = evaluation.subset_names
    chosen = {
        "all": [AVERAGE],
        "complete": [name for name in names if len(name.split("+")) == len(evaluation.channels)],
        "single": [name for name in names if "+" not in name],
    }
    return {
        what: sum(summary[name]["mean"] for summary in summaries for name in subsets) / (len(summaries) * len(subsets))
        for what, subsets in chosen.items()
    }


def _with_postprocessing(best: Best, evaluation: Evaluation, request: BestRequest) -> Best:
    """Let nnU-Net decide on the label maps of all subsets together, as if each were a case.

    Raises:
        ValueError: the evaluation does not know its model.
    """
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing  # slow to import

    model = evaluation.info.model
    if model is None or model.folder is None or not (model.folder / "plans.json").is_file():
        raise ValueError(
            f"{best.folder} is not of a model on this machine, so its plans are not known. Choose without "
            f"post-processing (--no_postprocessing)."
        )
    files = find_files(evaluation, best.folder, images=best.folder)  # images are not looked at
    with scratch(request.output) as folder:
        for name in ("predicted", "reference"):
            (folder / name).mkdir()
        cases = set(evaluation.cases)
        for subset, predictions in files.predictions.items():
            for path in sorted(predictions.glob(f"*{files.file_ending}")):
                case = path.name[: -len(files.file_ending)]
                if case in cases:
                    os.symlink(path.resolve(), folder / "predicted" / f"{subset}{_SEPARATOR}{path.name}")
                    os.symlink(
                        (files.labels / path.name).resolve(), folder / "reference" / f"{subset}{_SEPARATOR}{path.name}"
                    )
        with contextlib.redirect_stdout(io.StringIO()):  # what it says is said by the command
            _, arguments = determine_postprocessing(
                str(folder / "predicted"),
                str(folder / "reference"),
                str(model.folder / "plans.json"),
                str(model.folder / "dataset.json"),
                request.num_processes,
                keep_postprocessed_files=True,
            )
        decided = read_json(folder / "predicted" / "postprocessing.json")
        before, after = (
            _by_subset(read_json(place / "summary.json"))
            for place in (folder / "predicted", folder / "predicted" / "postprocessed")
        )
        if arguments:
            os.replace(folder / "predicted" / POSTPROCESSING, request.output / POSTPROCESSING)
    return Best(
        best.folder,
        best.means,
        _steps(arguments, read_json(model.folder / "dataset.json")["labels"]),
        decided["input_folder"]["foreground_mean"]["Dice"],
        decided["postprocessed"]["foreground_mean"]["Dice"],
        {name: (before[name], after[name]) for name in files.predictions if name in before},
    )


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


def commands(best: Best, output: Path) -> list[str]:
    """Return what a user types after a prediction to apply the post-processing; empty where there is none."""
    if not best.steps:
        return []
    return [
        f"nnUNetv2_apply_postprocessing -i OUT -o OUT_PP -pp_pkl_file {output / POSTPROCESSING} "
        f"-plans_json OUT/plans.json -dataset_json OUT/dataset.json"
    ]
