"""Tables in the layout of the paper's Table 3, as Markdown and LaTeX.

One column per subset in the paper's order under a head of ticks, an average column at the end, one line per region and
method. Beyond 15 subsets (more than four modalities) the table is turned: one line per subset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_mgml.io.files import write_text
from nnunetv2_mgml.modalities import channel_index, parse_subset, table_rows
from nnunetv2_mgml.scoring.derived import ALL, Inversions, has_volume_bias, inversions, name_of_all, volume_bias
from nnunetv2_mgml.scoring.metrics import Metric, get_metric
from nnunetv2_mgml.scoring.policy import get_policy
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation, common_subsets, spread
from nnunetv2_mgml.scoring.statistics import BOOTSTRAP_DRAWS, CONFIDENCE, compare_inversions

_MAX_COLUMNS = 15
_DISPLAY_NAMES = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
_NO_VALUE = "-"
INVERSIONS_NOTE = (
    "Inversions: share of cases, regions and pairs of nested subsets in which the larger subset scores lower by more "
    "than 1 Dice point."
)

Cell = str | bool
"""Text, or a tick (True) or cross (False)."""


@dataclass(frozen=True)
class Grid:
    """A table before it is given a syntax."""

    caption: str
    head: list[list[Cell]]
    body: list[list[Cell]]

    def turned(self) -> Grid:
        """Return the table with rows and columns exchanged (the two label columns become the head)."""
        columns = [list(column) for column in zip(*self.head, *self.body, strict=True)]
        return Grid(self.caption, columns[:2], columns[2:])


def display_name(modality: str) -> str:
    """Return a modality's name as the paper writes it, else in capitals."""
    return _DISPLAY_NAMES.get(modality, modality.upper())


def table_grid(evaluations: Sequence[Evaluation], metric_name: str) -> Grid:
    """Lay out one metric of one or several evaluations (the subsets they share).

    Raises:
        ValueError: see `common_subsets`; or an evaluation lacks the metric.
    """
    evaluations = common_subsets(evaluations)
    first, metric = evaluations[0], get_metric(metric_name)
    names = first.subset_names
    subsets = [parse_subset(name, first.channels) for name in names]
    rows = table_rows(first.channels)
    head: list[list[Cell]] = [
        [
            "",
            display_name(row),
            *(s[channel_index(row, first.channels)] for s in subsets),
            AVERAGE if row == rows[0] else "",
        ]
        for row in rows
    ]
    body: list[list[Cell]] = []
    for region, title in first.region_titles.items():
        for evaluation in evaluations:
            summary = evaluation.summary(metric_name, region)
            body.append([title, evaluation.name, *(_cell(summary[column], metric) for column in (*names, AVERAGE))])
            counts = [int(summary[column]["n"]) for column in (*names, AVERAGE)]
            if any(count != len(evaluation.cases) for count in counts):
                body.append([title, f"{evaluation.name} (n)", *map(str, counts)])
    grid = Grid(_caption(evaluations, metric), head, body)
    return grid if len(names) <= _MAX_COLUMNS else grid.turned()


def overview_grid(evaluations: Sequence[Evaluation]) -> Grid | None:
    """Lay out what follows from the scores of all subsets together: inversions and volume bias by region.

    Returns:
        One line per quantity and evaluation that has it; None where none has any.
    """
    regions = evaluations[0].region_names
    rows: list[list[Cell]] = []
    notes = []
    if any(_has_inversions(e) for e in evaluations):
        notes.append(INVERSIONS_NOTE)
        for evaluation in filter(_has_inversions, evaluations):
            shares = inversions(evaluation)
            cells = [*(_percent(shares[region]) for region in regions), _percent(shares[ALL])]
            rows.append(["inversions (%)", evaluation.name, *cells])
    if any(has_volume_bias(e) for e in evaluations):
        notes.append("Volume bias: prediction minus reference, mean over subsets and cases, ± over cases.")
        for evaluation in filter(has_volume_bias, evaluations):
            spreads = [spread(volume_bias(evaluation, region).mean(axis=1)) for region in regions]
            rows.append(["volume bias (ml)", evaluation.name, *(_mean_and_spread(s, 1.0) for s in spreads), ""])
    if not rows:
        return None
    titles = list(evaluations[0].region_titles.values())
    return Grid(" ".join(notes), [["", "", *titles, name_of_all(titles)]], rows)


def _has_inversions(evaluation: Evaluation) -> bool:
    return "dice" in evaluation.metrics and inversions(evaluation)[ALL].n > 0


def _percent(found: Inversions) -> str:
    return f"{100 * found.share:.1f}" if found.n else _NO_VALUE


def _cell(entry: dict[str, float], metric: Metric) -> str:
    return _mean_and_spread(entry, metric.display_factor)


def _mean_and_spread(entry: dict[str, float], factor: float) -> str:
    if math.isnan(entry["mean"]):
        return _NO_VALUE
    text = f"{entry['mean'] * factor:.2f}"
    return text if math.isnan(entry["sd"]) else f"{text} ± {entry['sd'] * factor:.2f}"


def _caption(evaluations: Sequence[Evaluation], metric: Metric) -> str:
    cases = " / ".join(dict.fromkeys(str(len(e.cases)) for e in evaluations))
    policy = get_policy(evaluations[0].policy)
    total = 2 ** len(evaluations[0].channels) - 1
    shown = len(evaluations[0].subsets)
    average = "all" if shown == total else f"the {shown} of {total} evaluated"
    removed = "; ".join(
        f"{evaluations[0].region_titles[region]} predicted with fewer than {size} voxels counts as empty"
        for region, size in evaluations[0].info.min_region_voxels.items()
    )
    return (
        f"{metric.title} ({metric.unit}), mean ± standard deviation over {cases} cases; {AVERAGE}: mean over "
        f"{average} modality subsets. Empty-case policy '{policy.name}': {policy.summary}."
        + (f" {removed}." if removed else "")
    )


def _markdown_text(cell: Cell) -> str:
    if isinstance(cell, bool):
        return "✓" if cell else "✗"
    return cell.replace("|", "\\|")


def markdown_table(grid: Grid) -> str:
    """Return a grid as a GitHub-flavoured Markdown table under its caption."""
    lines = [[_markdown_text(cell) for cell in row] for row in (*grid.head, *grid.body)]
    rule = ["---"] * len(lines[0])
    rows = ["| " + " | ".join(row) + " |" for row in (lines[0], rule, *lines[1:])]
    return f"**{grid.caption}**\n\n" + "\n".join(rows) + "\n"


_LATEX_ESCAPES = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def _latex_escape(text: str) -> str:
    return "".join(_LATEX_ESCAPES.get(c, c) for c in text).replace("±", r"$\pm$")


def _latex_text(cell: Cell) -> str:
    if isinstance(cell, bool):
        return r"$\checkmark$" if cell else r"$\times$"
    mean, separator, spread = cell.partition(" ± ")
    return _latex_escape(mean) + (rf"{{\tiny$\,\pm\,${_latex_escape(spread)}}}" if separator else "")


def latex_table(grid: Grid) -> str:
    """Return a grid as a ``table*`` environment (packages amssymb and graphicx)."""
    width = len(grid.body[0])
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_latex_escape(grid.caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{ll*{{{width - 2}}}{{c}}}}",
        r"\hline",
    ]
    previous: Cell = ""
    for number, row in enumerate((*grid.head, *grid.body)):
        if number == len(grid.head) or (number > len(grid.head) and isinstance(row[0], str) and row[0] != previous):
            lines.append(r"\hline")
        repeated = number > len(grid.head) and isinstance(row[0], str) and row[0] == previous
        previous = row[0]
        lines.append(" & ".join(_latex_text(c) for c in (["", *row[1:]] if repeated else row)) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}}", r"\end{table*}"]) + "\n"


def write_tables(evaluations: Sequence[Evaluation], folder: Path, metrics: Sequence[str] | None = None) -> None:
    """Write ``table.md`` and ``table.tex``: one table per metric (default: those every evaluation has), an overview."""
    metrics = metrics or [m for m in evaluations[0].metrics if all(m in e.metrics for e in evaluations)]
    overview = overview_grid(common_subsets(evaluations))
    grids = [*(table_grid(evaluations, metric) for metric in metrics), *([overview] if overview else [])]
    _write(folder / "table.md", "", grids, markdown_table)
    _write(folder / "table.tex", "% needs the packages amssymb and graphicx\n\n", grids, latex_table)


def _write(path: Path, preamble: str, grids: Sequence[Grid], render: Callable[[Grid], str]) -> None:
    write_text(path, preamble + "\n".join(render(grid) for grid in grids))


def summary_text(evaluation: Evaluation) -> str:
    """Return the mean of the first metric per region and subset, for terminals and logs."""
    metric = get_metric(evaluation.metrics[0])
    rows = [*evaluation.subset_names, AVERAGE]
    width = max(map(len, rows))
    summaries = {region: evaluation.summary(metric.name, region) for region in evaluation.region_names}
    titles = evaluation.region_titles
    cut = 10 if len({title[:10] for title in titles.values()}) == len(titles) else max(map(len, titles.values()))
    lines = [
        f"{metric.title} ({metric.unit}), mean over {len(evaluation.cases)} cases, policy {evaluation.policy}",
        " " * width + "".join(f"{title[:cut]:>{cut + 2}}" for title in titles.values()),
    ]
    counted = any(s[row]["n"] != len(evaluation.cases) for s in summaries.values() for row in rows)
    for row in rows:
        cells = [f"{s[row]['mean'] * metric.display_factor:.2f}" for s in summaries.values()]
        counts = [f" ({s[row]['n']:.0f})" if counted else "" for s in summaries.values()]
        lines.append(f"{row:<{width}}" + "".join(f"{c + n:>{cut + 2}}" for c, n in zip(cells, counts, strict=True)))
    if counted:
        lines.append("In brackets: cases with a value.")
    if _has_inversions(evaluation):
        shares = inversions(evaluation)
        found = ", ".join(f"{title} {_percent(shares[region])}" for region, title in titles.items())
        lines.append(f"inversions: {_percent(shares[ALL])} % ({found}): a larger subset more than 1 Dice point lower")
    return "\n".join(lines)


def comparison_markdown(table: pd.DataFrame, evaluations: Sequence[Evaluation], seed: int = 0) -> str:
    """Return the comparison as Markdown: a table per metric and method, a line per region and subset; inversions."""
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
        direction = {True: "higher is better", False: "lower is better", None: "0 is best"}[metric.higher_is_better]
        head = ["region", "subset", "n", evaluations[0].name, method, "difference", interval, "p", "p (Holm)", ""]
        parts += [
            f"## {metric.title} ({metric.unit}, {direction}): {method}",
            "",
            f"| {' | '.join(map(str, head))} |",
            "|---" * len(head) + "|",
        ]
        titles = evaluations[0].region_titles
        parts += [_line(row, titles[row["region"]], metric.display_factor) for row in rows.to_dict(orient="records")]
        parts.append("")
    if "dice" in set(table["metric"]):
        parts.append(_inversions_markdown(compare_inversions(evaluations, seed), evaluations[0]))
    return "\n".join(parts)


def _inversions_markdown(table: pd.DataFrame, baseline: Evaluation) -> str:
    """Return a comparison of inversions (`statistics.compare_inversions`) as Markdown; empty where there are none."""
    if table.empty:
        return ""
    head = [
        "region",
        "method",
        "n",
        f"{baseline.name} (%)",
        "method (%)",
        "difference",
        f"{CONFIDENCE:.0%} interval",
        "p",
    ]
    titles: dict[Any, str] = dict(baseline.region_titles)
    together = name_of_all(titles.values())
    lines = ["## Inversions", "", f"{INVERSIONS_NOTE} Mean over cases of each case's share; paired by case.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in table.to_dict(orient="records"):
        interval = "-" if math.isnan(row["ci_low"]) else f"{100 * row['ci_low']:+.2f} to {100 * row['ci_high']:+.2f}"
        cells = [
            titles.get(row["region"], together),
            row["method"],
            str(row["n"]),
            *(f"{100 * row[key]:.2f}" for key in ("baseline_mean", "method_mean")),
            f"{100 * row['difference']:+.2f}",
            interval,
            "-" if math.isnan(row["p"]) else f"{row['p']:.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _line(row: dict[Hashable, Any], region: str, factor: float) -> str:
    def number(key: str, sign: str = "") -> str:
        return "-" if math.isnan(row[key]) else f"{row[key] * factor:{sign}.2f}"

    def probability(key: str) -> str:
        return "-" if math.isnan(row[key]) else f"{row[key]:.2g}"

    interval = f"{number('ci_low', '+')} to {number('ci_high', '+')}" if not math.isnan(row["ci_low"]) else "-"
    cells = [
        region,
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
