"""``mgml compare A B ...``: paired comparison of evaluation folders."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from nnunetv2_mgml.io.files import write_json, write_text
from nnunetv2_mgml.presentation.tables import write_tables
from nnunetv2_mgml.scoring.metrics import all_metrics, get_metric
from nnunetv2_mgml.scoring.policy import get_policy
from nnunetv2_mgml.scoring.regions import short_name
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation, load_evaluation, provenance
from nnunetv2_mgml.scoring.statistics import BOOTSTRAP_DRAWS, CONFIDENCE, compare_evaluations, pairable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mgml compare``."""
    parser.add_argument(
        "evaluations",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="folders written by 'mgml evaluate'; the first is the baseline",
    )
    parser.add_argument(
        "-o",
        type=Path,
        metavar="OUT",
        help="folder for comparison.md, .csv, .json, the stacked table.md, table.tex and figures; "
        "without it the table is only printed",
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names in tables, in the order of the folders")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=["dice"],
        choices=tuple(all_metrics()),
        metavar="METRIC",
        help=f"what to compare, of {', '.join(all_metrics())}",
    )
    parser.add_argument("--common_cases", action="store_true", help="compare the shared cases when they differ")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def run(args: argparse.Namespace) -> int:
    """Run ``mgml compare``; returns the exit code."""
    evaluations = pairable(named_evaluations(args.evaluations, args.names), args.common_cases)
    table = compare_evaluations(evaluations, args.metrics, seed=args.seed)
    markdown = comparison_markdown(table, evaluations)
    print(markdown)
    if args.o is None:
        return 0
    write_text(args.o / "comparison.csv", table.to_csv(index=False, na_rep="nan", lineterminator="\n"))
    write_json(
        args.o / "comparison.json",
        {
            "folders": {e.name: str(folder.resolve()) for e, folder in zip(evaluations, args.evaluations, strict=True)},
            "policy": evaluations[0].policy,
            "confidence": CONFIDENCE,
            "bootstrap_draws": BOOTSTRAP_DRAWS,
            "seed": args.seed,
            "test": "Wilcoxon signed-rank, two-sided, zeros after Pratt; Holm within a metric, AVG rows apart",
            **provenance(),
            "rows": table.to_dict(orient="records"),
        },
    )
    write_text(args.o / "comparison.md", markdown)
    write_tables(evaluations, args.o, args.metrics)
    _write_figures(table, evaluations, args.evaluations, args.o / "figures")
    print(f"written to {args.o}")
    return 0


def _write_figures(
    table: pd.DataFrame, evaluations: Sequence[Evaluation], folders: Sequence[Path], target: Path
) -> None:
    """Draw the differences, and predictions side by side where every evaluation still has its files."""
    # matplotlib is slow to import
    from nnunetv2_mgml.presentation.figure_files import write_comparison_sheet, write_difference_figures
    from nnunetv2_mgml.presentation.report.cases import stored_sources

    write_difference_figures(table, evaluations, target)
    (target / "predictions.png").unlink(missing_ok=True)  # that of an earlier comparison may be of other files
    try:
        sources = [stored_sources(evaluation, folder) for evaluation, folder in zip(evaluations, folders, strict=True)]
        write_comparison_sheet(evaluations, sources, target / "predictions.png")
    except (FileNotFoundError, ValueError) as error:
        print(f"no figure of predictions side by side: {error}")


def named_evaluations(folders: Sequence[Path], names: Sequence[str] | None) -> list[Evaluation]:
    """Load evaluations under names that differ.

    Raises:
        ValueError: fewer than two folders, a wrong number of names, or two equal names.
    """
    if len(folders) < 2:
        raise ValueError("mgml compare needs at least two evaluation folders.")
    if names and len(names) != len(folders):
        raise ValueError(f"--names has {len(names)} names for {len(folders)} folders.")
    evaluations = [load_evaluation(folder) for folder in folders]
    names = names or [e.name for e in evaluations]
    doubles = sorted({name for name in names if list(names).count(name) > 1})
    if doubles:
        raise ValueError(f"Two evaluations are called {', '.join(doubles)}; tell them apart with --names.")
    return [dataclasses.replace(e, name=name) for e, name in zip(evaluations, names, strict=True)]


def comparison_markdown(table: pd.DataFrame, evaluations: Sequence[Evaluation]) -> str:
    """Return the comparison as Markdown: one table per metric and method, one line per region and subset."""
    policy = get_policy(evaluations[0].policy)
    interval = f"{CONFIDENCE:.0%} interval"
    parts = [
        f"# Comparison with {evaluations[0].name}",
        "",
        f"Paired by case. Difference: method - baseline, mean over cases, with its {interval} (percentile "
        f"bootstrap, {BOOTSTRAP_DRAWS} draws). p: Wilcoxon signed-rank test, two-sided; p (Holm): adjusted over "
        f"all regions, subsets and methods of a metric ({AVERAGE} lines are a family of their own). * below 0.05. "
        f"Empty-case policy '{policy.name}': {policy.summary}.",
        "",
    ]
    for (metric_name, method), rows in table.groupby(["metric", "method"], sort=False):
        metric = get_metric(str(metric_name))
        better = {True: "higher is better", False: "lower is better", None: "0 is best"}[metric.higher_is_better]
        head = ["region", "subset", "n", evaluations[0].name, method, "difference", interval, "p", "p (Holm)", ""]
        parts += [
            f"## {metric.title} ({metric.unit}, {better}): {method}",
            "",
            f"| {' | '.join(map(str, head))} |",
            "|---" * len(head) + "|",
        ]
        parts += [_line(row, metric.display_factor) for row in rows.to_dict(orient="records")]
        parts.append("")
    return "\n".join(parts)


def _line(row: dict, factor: float) -> str:
    def number(key: str, sign: str = "") -> str:
        return "-" if math.isnan(row[key]) else f"{row[key] * factor:{sign}.2f}"

    def probability(key: str) -> str:
        return "-" if math.isnan(row[key]) else f"{row[key]:.2g}"

    interval = f"{number('ci_low', '+')} to {number('ci_high', '+')}" if not math.isnan(row["ci_low"]) else "-"
    cells = [
        short_name(row["region"]),
        row["subset"],
        str(row["n"]),
        number("baseline_mean"),
        number("method_mean"),
        number("difference", "+"),
        interval,
        probability("p"),
        probability("p_holm"),
        "*" if row["p_holm"] < 0.05 else "",
    ]
    return "| " + " | ".join(cells) + " |"
