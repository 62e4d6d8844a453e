"""Compare evaluations, paired by case, with the first of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunetv2_mgml.io.targets import is_same
from nnunetv2_mgml.presentation.outputs import write_comparison
from nnunetv2_mgml.scoring.metrics import get_metric
from nnunetv2_mgml.scoring.output import holds_evaluation
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation
from nnunetv2_mgml.scoring.statistics import compare_evaluations, pairable


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """Which evaluations to compare, and how."""

    folders: Sequence[Path]
    """Folders that `evaluate` wrote, the baseline first."""
    names: Sequence[str] | None = None
    """What they are called in tables; None for the names they have, or their folders' where two have the same."""
    metrics: Sequence[str] = ("dice",)
    common_cases: bool = False
    """Compare the shared cases where they differ, instead of refusing."""
    seed: int = 0
    """Of the bootstrap."""
    output: Path | None = None
    """Where tables and figures go; None writes nothing."""

    def __post_init__(self) -> None:
        if len(self.folders) < 2:
            raise ValueError("mgml compare needs at least two evaluation folders.")
        if self.names and len(self.names) != len(self.folders):
            raise ValueError(f"--names has {len(self.names)} names for {len(self.folders)} folders.")
        for name in self.metrics:
            get_metric(name)
        if self.seed < 0:
            raise ValueError(f"--seed must be a whole number of at least 0, got {self.seed}.")


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    table: pd.DataFrame
    """See `statistics.compare_evaluations`."""
    evaluations: list[Evaluation]
    """Reduced to the cases and subsets they share."""
    no_sheet: str | None = None
    """Why there is no figure of predictions side by side, where files were written."""


def compare_folders(request: ComparisonRequest) -> Comparison:
    """Compare evaluation folders and, with ``output``, write tables and figures.

    Raises:
        FileNotFoundError: a folder is no evaluation.
        ValueError: evaluations that cannot be compared, or two of one name in folders of one name, or an output that
            holds an evaluation.
    """
    if request.output is not None:
        _refuse_evaluation(request.output, request.folders)
    evaluations = pairable(_named(request), request.common_cases)
    table = compare_evaluations(evaluations, request.metrics, seed=request.seed)
    if request.output is None:
        return Comparison(table, evaluations)
    no_sheet = write_comparison(table, evaluations, request.folders, request.output, request.metrics, request.seed)
    return Comparison(table, evaluations, no_sheet)


def _refuse_evaluation(output: Path, folders: Sequence[Path]) -> None:
    """Raise a ValueError where the stacked tables would replace those of an evaluation."""
    compared = any(is_same(output, folder) for folder in folders)
    if compared or holds_evaluation(output):
        raise ValueError(
            f"-o {output} {'is one of the compared evaluations' if compared else 'holds an evaluation'}, whose "
            f"table.md and table.tex would be replaced. Use another folder, such as {output / 'comparison'}."
        )


def _named(request: ComparisonRequest) -> list[Evaluation]:
    """Read the evaluations; those of one name, as two plans of one trainer have, are called as their folders are."""
    evaluations = [load_evaluation(Path(folder)) for folder in request.folders]
    names = list(request.names or [e.name for e in evaluations])
    if not request.names:
        shared = _doubles(names)
        names = [
            Path(folder).resolve().name if name in shared else name
            for name, folder in zip(names, request.folders, strict=True)
        ]
    if doubles := _doubles(names):
        raise ValueError(f"Two evaluations are called {', '.join(doubles)}; tell them apart with --names.")
    return [dataclasses.replace(e, name=name) for e, name in zip(evaluations, names, strict=True)]


def _doubles(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
