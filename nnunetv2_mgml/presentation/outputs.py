"""Everything that is written of an evaluation and of a comparison: numbers, tables, figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nnunetv2_mgml.io.files import write_json, write_text
from nnunetv2_mgml.presentation.tables import comparison_markdown, write_tables
from nnunetv2_mgml.scoring.derived import ALL, name_of_all
from nnunetv2_mgml.scoring.info import provenance
from nnunetv2_mgml.scoring.results import Evaluation, save_evaluation
from nnunetv2_mgml.scoring.sources import find_files
from nnunetv2_mgml.scoring.statistics import BOOTSTRAP_DRAWS, CONFIDENCE, compare_inversions


def write_evaluation(evaluation: Evaluation, folder: Path, figures: bool = True) -> None:
    """Write ``results.csv``, ``summary.json``, ``table.md``, ``table.tex`` and, where wanted, ``figures/*.png``."""
    save_evaluation(evaluation, folder)
    write_tables([evaluation], folder)
    if figures:
        from nnunetv2_mgml.presentation.figure_files import write_score_figures  # matplotlib is slow to import

        write_score_figures(evaluation, folder / "figures")


def write_comparison(
    table: pd.DataFrame,
    evaluations: Sequence[Evaluation],
    folders: Sequence[Path],
    output: Path,
    metrics: Sequence[str],
    seed: int,
) -> str | None:
    """Write ``comparison.csv``, ``.json`` and ``.md``, the stacked tables, and figures.

    Args:
        table: what `statistics.compare_evaluations` returned.
        evaluations: what it compared, the baseline first.
        folders: where they lie.
        output: where the files go.
        metrics: what was compared.
        seed: of the bootstrap.

    Returns:
        Why there is no figure of predictions side by side; None where there is one.
    """
    from nnunetv2_mgml.presentation.figure_files import (  # matplotlib is slow to import
        write_comparison_sheet,
        write_difference_figures,
    )

    together = name_of_all(evaluations[0].regions, "all")
    inversions = compare_inversions(evaluations, seed).to_dict(orient="records")
    write_text(output / "comparison.csv", table.to_csv(index=False, na_rep="nan", lineterminator="\n"))
    write_json(
        output / "comparison.json",
        {
            "folders": {e.name: str(folder.resolve()) for e, folder in zip(evaluations, folders, strict=True)},
            "policy": evaluations[0].policy,
            "confidence": CONFIDENCE,
            "bootstrap_draws": BOOTSTRAP_DRAWS,
            "seed": seed,
            "test": "Wilcoxon signed-rank, two-sided, zeros after Pratt; Holm within a metric, AVG rows apart",
            **provenance(),
            "rows": table.to_dict(orient="records"),
            "inversions": [
                {**row, "region": together if row["region"] is ALL else row["region"]} for row in inversions
            ],
        },
    )
    write_text(output / "comparison.md", comparison_markdown(table, evaluations, seed))
    write_tables(evaluations, output, metrics)
    write_difference_figures(table, evaluations, output / "figures")
    sheet = output / "figures" / "predictions.png"
    sheet.unlink(missing_ok=True)  # that of an earlier comparison may be of other files
    try:
        files = [find_files(evaluation, folder) for evaluation, folder in zip(evaluations, folders, strict=True)]
        write_comparison_sheet(evaluations, files, sheet)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return None
