"""Run an evaluation from prediction folders, and what every evaluation shares; `model_evaluation` starts from a model.

Both resume where they stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.progress import Log, progress_bar
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.presentation.tables import write_tables
from nnunetv2_mgml.scoring.cases import CasePool, Scores, ScoringSettings, collect
from nnunetv2_mgml.scoring.output import open_output
from nnunetv2_mgml.scoring.regions import label_set
from nnunetv2_mgml.scoring.results import Evaluation, build_evaluation, save_evaluation
from nnunetv2_mgml.scoring.sources import file_ending, find_references, pair_cases


@dataclass(frozen=True)
class EvaluationOptions:
    """Options every kind of evaluation shares; see `ScoringSettings` for the first four."""

    policy: str = "auto"
    metrics: tuple[str, ...] | None = None
    min_region_voxels: dict[str, int] | None = None
    num_processes: int = 2
    name: str | None = None
    overwrite: bool = False
    restart_if_changed: bool = False
    """See `output.open_output`."""
    show_progress: bool = True
    figures: bool = True
    """Write PNG files to ``figures``."""
    log: Log | None = None
    """Takes a line per tenth of the work in place of the bar."""

    def scoring(self, dataset_json: dict[str, Any]) -> ScoringSettings:
        """Return the scoring settings for a data set."""
        chosen = {} if self.metrics is None else {"metrics": self.metrics}
        return ScoringSettings(
            label_set(dataset_json), self.policy, min_region_voxels=self.min_region_voxels or {}, **chosen
        )


def finish(
    folder: Path,
    scores: dict[str, Scores],
    subset_names: Sequence[str],
    dataset_json: dict[str, Any],
    settings: ScoringSettings,
    options: EvaluationOptions,
    name: str,
    info: dict[str, Any],
) -> Evaluation:
    """Write the results of a complete evaluation and return them; ``name`` is for where the options have none."""
    evaluation = build_evaluation(
        options.name or name, scores, subset_names, channel_names(dataset_json), settings, info
    )
    save_evaluation(evaluation, folder)
    write_tables([evaluation], folder)
    if options.figures:
        from nnunetv2_mgml.presentation.figure_files import write_score_figures  # matplotlib is slow to import

        write_score_figures(evaluation, folder / "figures")
    return evaluation


def evaluate_predictions(
    labels: Path,
    folders: dict[str, Path],
    dataset_json: dict[str, Any],
    output: Path,
    options: EvaluationOptions | None = None,
    allow_missing: bool = False,
) -> Evaluation:
    """Evaluate finished prediction folders of any origin.

    Args:
        labels: folder of reference label maps ``<case><file_ending>``.
        folders: subset name -> folder of predictions with the same file names (`sources.parse_prediction_folders`).
        dataset_json: content of dataset.json: channel names, labels, file ending.
        output: the evaluation folder.
        options: see `EvaluationOptions`.
        allow_missing: score the cases that every folder has; the others are listed in ``summary.json``.

    Returns:
        The evaluation, as written to ``output``.

    Raises:
        ValueError, FileNotFoundError: wrong input, naming the case and the fix. Finished cases are kept.
    """
    options = options or EvaluationOptions()
    settings = options.scoring(dataset_json)
    ending = file_ending(dataset_json)
    found = pair_cases(find_references(labels, ending), folders, ending, allow_missing)
    open_output(
        output,
        {
            "scoring": settings.as_dict(),
            "channels": list(channel_names(dataset_json)),
            "source": {"kind": "predictions", "labels": str(labels.resolve())},
        },
        options.overwrite,
        list(folders),
        [labels, *folders.values()],
    )
    with CasePool(settings, output / "cases", options.num_processes) as pool:
        for task in found.tasks:
            pool.submit(task)
        scores = collect(progress_bar(pool.results(), len(found.tasks), options.show_progress, log=options.log))
    info = {
        "source": {
            "kind": "predictions",
            "labels": str(labels.resolve()),
            "folders": {name: str(folder.resolve()) for name, folder in folders.items()},
        },
        "missing_cases": found.missing,
    }
    return finish(output, scores, list(folders), dataset_json, settings, options, output.resolve().name, info)
