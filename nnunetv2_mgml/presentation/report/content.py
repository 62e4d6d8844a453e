"""What the page says in numbers: summary, findings and tables, as plain data for the template."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from nnunetv2_mgml.modalities import Subset, channel_index, parse_subset, subset_name, table_rows
from nnunetv2_mgml.presentation.tables import INVERSIONS_NOTE, display_name
from nnunetv2_mgml.scoring.derived import ALL, has_volume_bias, inversions, name_of_all, volume_bias
from nnunetv2_mgml.scoring.info import as_json
from nnunetv2_mgml.scoring.metrics import Metric, get_metric
from nnunetv2_mgml.scoring.policy import get_policy
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation, spread
from nnunetv2_mgml.scoring.shapley import ModalityWorth, modality_worth


class Cell(NamedTuple):
    """One table cell: what is read, and what it is sorted by."""

    text: str
    key: float | str
    note: str = ""
    """Small print behind the text, such as a spread."""


class Table(NamedTuple):
    """A table whose rows can be sorted by any column."""

    name: str
    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    foot: list[Cell]
    """Right end of a last line that stays in place; empty for none."""
    foot_label: str = ""
    """What the left end of that line says."""


class Finding(NamedTuple):
    """One number worth reading first."""

    value: str
    label: str
    detail: str


def headline_metric(evaluation: Evaluation) -> Metric:
    """Return the metric the page is about: Dice where it was computed, else the first where more is better.

    Raises:
        ValueError: no such metric in the evaluation.
    """
    for name in ("dice", *evaluation.metrics):
        if name in evaluation.metrics and get_metric(name).higher_is_better:
            return get_metric(name)
    raise ValueError(
        f"The report needs a metric where more is better, such as dice; '{evaluation.name}' has only "
        f"{', '.join(evaluation.metrics)}. Evaluate with --metrics dice ... as well."
    )


def mean_scores(evaluation: Evaluation, metric: Metric) -> npt.NDArray[Any]:
    """Return the mean over cases in display units (per cent, mm, ml), ``(number of subsets, number of regions)``."""
    columns = []
    for region in evaluation.region_names:
        summary = evaluation.summary(metric.name, region)
        columns.append([summary[name]["mean"] * metric.display_factor for name in evaluation.subset_names])
    return np.array(columns, dtype=float).T


def has_all_subsets(evaluation: Evaluation) -> bool:
    """Return whether every non-empty subset was evaluated, so that Shapley values exist."""
    return len(evaluation.subsets) == int(2 ** len(evaluation.channels)) - 1


def paired_values(evaluation: Evaluation, metric: Metric, region: str) -> pd.DataFrame:
    """Return the values of the cases (rows) that have one from every subset (columns), in display units.

    What is compared between subsets rests on these: where incomplete cases are evaluated on the subsets they have, or a
    score has no value in some case, the subsets' means are over other cases each.
    """
    return evaluation.values(metric.name, region).dropna() * metric.display_factor


def paired_cases(evaluation: Evaluation, metric: Metric) -> dict[str, int]:
    """Return region -> number of cases in `paired_values`."""
    return {region: len(paired_values(evaluation, metric, region)) for region in evaluation.region_names}


def paired_note(evaluation: Evaluation, metric: Metric) -> str:
    """Return a sentence about `paired_cases`; empty where these are all cases of the evaluation."""
    counts, total = paired_cases(evaluation, metric), len(evaluation.cases)
    if all(count == total for count in counts.values()):
        return ""
    told = ", ".join(f"{title} {counts[region]}" for region, title in evaluation.region_titles.items())
    return f"Over the cases with a score from every subset, of {total} in all: {told}."


def cases_text(evaluation: Evaluation, metric: Metric) -> str:
    """Return how many cases the means of `mean_scores` are over, such as ``12 cases``, or ``5 to 12 cases``."""
    counts = [
        int(evaluation.summary(metric.name, region)[name]["n"])
        for region in evaluation.region_names
        for name in evaluation.subset_names
    ]
    low, high = min(counts), max(counts)
    if low == high == len(evaluation.cases):
        return f"{high} cases"
    many = str(high) if low == high else f"{low} to {high}"
    return f"{many} cases (every mean over those with a score there, of {len(evaluation.cases)} in all)"


def worth_by_region(evaluation: Evaluation, metric: Metric) -> dict[str, dict[str, ModalityWorth]]:
    """Return region -> modality (display name) -> worth in display units, over `paired_values`.

    Empty without all subsets; a region without such cases is left out.
    """
    if not has_all_subsets(evaluation):
        return {}
    names = [display_name(channel) for channel in evaluation.channels]
    values = {region: paired_values(evaluation, metric, region) for region in evaluation.region_names}
    return {
        region: modality_worth(dict(zip(evaluation.subsets, scores.mean(), strict=True)), names)
        for region, scores in values.items()
        if len(scores)
    }


def subset_title(subset: Subset, channels: tuple[str, ...]) -> str:
    """Return a subset as text for people, in channel order: ``T1 + FLAIR``."""
    return " + ".join(display_name(name) for name, visible in zip(channels, subset, strict=True) if visible)


def facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return what was evaluated and how, as (heading, text)."""
    policy = get_policy(evaluation.policy)
    info = evaluation.info
    listed = [("Cases", str(len(evaluation.cases)))]
    if info.not_evaluated:
        listed.append(
            (
                "Incomplete",
                f"{len(info.not_evaluated)} cases lack modalities and are evaluated on the subsets they have: "
                f"{', '.join(info.not_evaluated)}",
            )
        )
    if info.missing_cases:
        left_out = f"{len(info.missing_cases)} cases without all predictions: {', '.join(info.missing_cases)}"
        listed.append(("Left out", left_out))
    regions = [f"{name} (labels {', '.join(map(str, evaluation.regions[name]))})" for name in evaluation.region_names]
    listed += [
        ("Modalities", ", ".join(display_name(name) for name in evaluation.channels)),
        ("Subsets", f"{len(evaluation.subsets)} of {2 ** len(evaluation.channels) - 1}"),
        ("Regions", "; ".join(regions)),
        ("Empty regions", f"policy '{policy.name}': {policy.summary}"),
        ("Command", shlex.join(info.command)),
        ("Evaluated", info.created),
        ("Versions", ", ".join(f"{name} {version}" for name, version in info.versions.items())),
        ("Min region voxels", _described(info.min_region_voxels)),
        ("Source", _described(as_json(info.source))),
        ("Model", _described(as_json(info.model)) if info.model else ""),
    ]
    return [(heading, text) for heading, text in listed if text]


def _described(value: Any) -> str:
    """Return a JSON value as text for people; a mapping of paths is shortened to the folder they share."""
    if not isinstance(value, dict):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if len(value) > 1 and all(isinstance(v, str) and os.path.isabs(v) for v in value.values()):
        with contextlib.suppress(ValueError):  # on two drives of Windows, which share nothing
            return f"{len(value)} in {os.path.commonpath(value.values())}"
    return "; ".join(
        f"{key.replace('_', ' ')}: {_described(entry)}"
        for key, entry in value.items()
        if entry not in (None, "", [], {}) and "time_ns" not in key
    )


def findings(evaluation: Evaluation, metric: Metric) -> list[Finding]:
    """Return the numbers to read first; those that need a subset that was not evaluated are left out."""
    scores = mean_scores(evaluation, metric)
    titles = evaluation.region_titles
    counts = np.array([sum(subset) for subset in evaluation.subsets])
    counted = cases_text(evaluation, metric)
    differing = "" if counted == f"{len(evaluation.cases)} cases" else f"; over {counted}"
    result = []
    for title, rows in (
        ("with all modalities", counts == len(evaluation.channels)),
        ("with one modality", counts == 1),
        (f"over {len(counts)} subsets", counts > 0),
    ):
        if rows.any() and np.isfinite(scores[rows]).any():
            per_region = [_mean(scores[rows, column]) for column in range(len(titles))]
            detail = ", ".join(
                f"{title} {_number(value)}" for title, value in zip(titles.values(), per_region, strict=True)
            )
            detail += differing
            value = f"{_number(_mean(np.array(per_region)))} {metric.unit}"
            result.append(Finding(value, f"mean {metric.title} {title}", detail))
    worth = worth_by_region(evaluation, metric)
    if worth:
        best = {
            region: max(values, key=lambda name: _low_if_nan(values[name].shapley)) for region, values in worth.items()
        }
        overall = {
            name: _mean(np.array([values[name].shapley for values in worth.values()]))
            for name in next(iter(worth.values()))
        }
        note = paired_note(evaluation, metric)
        top = max(overall, key=lambda name: _low_if_nan(overall[name]))
        result.append(
            Finding(
                top,
                "most valuable modality (Shapley value)",
                ". ".join(filter(None, (", ".join(f"{titles[r]}: {name}" for r, name in best.items()), note))),
            )
        )
    return result


def subset_table(evaluation: Evaluation, metric: Metric) -> Table:
    """Return one line per subset: which modalities, mean and spread per region, mean over the regions."""
    order = table_rows(evaluation.channels)
    regions = evaluation.region_names
    summaries = [evaluation.summary(metric.name, region) for region in regions]
    rows = []
    for subset, name in zip(evaluation.subsets, evaluation.subset_names, strict=True):
        visible = [subset[channel_index(modality, evaluation.channels)] for modality in order]
        rows.append(
            [
                *(Cell("●" if on else "○", float(on)) for on in visible),
                Cell(str(sum(subset)), sum(subset)),
                *_score_cells([summary[name] for summary in summaries], metric, len(evaluation.cases)),
            ]
        )
    foot = _score_cells([summary[AVERAGE] for summary in summaries], metric, len(evaluation.cases))
    direction = {True: "higher is better", False: "lower is better", None: "0 is best"}[metric.higher_is_better]
    heads = [display_name(name) for name in order] + ["modalities"] + [*evaluation.region_titles.values()]
    return Table(
        metric.name,
        f"{metric.title} ({metric.unit}, {direction}) by available modalities: mean ± standard deviation over cases",
        [*heads, "mean"],
        rows,
        foot,
        "mean over subsets",
    )


def case_table(evaluation: Evaluation, metric: Metric) -> Table:
    """Return one line per case: score with all modalities per region, mean over all subsets, and the worst subset."""
    full = subset_name((True,) * len(evaluation.channels), evaluation.channels)
    regions = evaluation.region_names
    values = {region: evaluation.values(metric.name, region) * metric.display_factor for region in regions}
    per_subset = case_scores(evaluation, metric)
    rows = []
    for case in evaluation.cases:
        line = [Cell(case, case)]
        for region in regions:
            line.append(_cell(float(values[region].loc[case].get(full, math.nan))))
        scored = {str(name): float(value) for name, value in per_subset.loc[case].dropna().items()}
        line.append(_cell(_mean(np.array(list(scored.values())))))
        lowest = min(scored, key=lambda name: scored[name]) if scored else None
        worst = "" if lowest is None else subset_title(parse_subset(lowest, evaluation.channels), evaluation.channels)
        line.append(Cell(worst, worst, "" if lowest is None else f" {_number(scored[lowest])}"))
        rows.append(line)
    heads = [
        "case",
        *(f"{title}, all modalities" for title in evaluation.region_titles.values()),
        "mean over subsets",
        "worst subset",
    ]
    return Table("cases", f"{metric.title} ({metric.unit}) of each case", heads, rows, [])


def case_scores(evaluation: Evaluation, metric: Metric) -> pd.DataFrame:
    """Return the mean over regions per case (rows) and subset name (columns), in display units."""
    frames = [evaluation.values(metric.name, region) for region in evaluation.region_names]
    stacked = pd.concat(frames, keys=range(len(frames)))
    return stacked.groupby(level=1).mean().reindex(columns=evaluation.subset_names) * metric.display_factor


def worth_table(evaluation: Evaluation, metric: Metric) -> Table | None:
    """Return one line per modality and region: Shapley value, score alone, loss when dropped; None without them."""
    worth = worth_by_region(evaluation, metric)
    if not worth:
        return None
    note, titles = paired_note(evaluation, metric), evaluation.region_titles
    rows = [
        [
            Cell(titles[region], titles[region]),
            Cell(name, name),
            _cell(value.shapley),
            _cell(value.alone),
            _cell(value.if_dropped),
        ]
        for region, values in worth.items()
        for name, value in values.items()
    ]
    return Table(
        "worth",
        ". ".join(filter(None, (f"What each modality is worth in {metric.title} ({metric.unit})", note))),
        ["region", "modality", "Shapley value", "alone", "lost if only it is missing"],
        rows,
        [],
    )


def inversions_table(evaluation: Evaluation) -> Table | None:
    """Return one line per region: how often more modalities made Dice worse; None without Dice or nested subsets."""
    if "dice" not in evaluation.metrics:
        return None
    shares = inversions(evaluation)
    if not shares[ALL].n:
        return None
    rows = []
    titles = evaluation.region_titles
    for region, title in titles.items():
        cells = [_cell(100 * shares[region].share), Cell(str(shares[region].n), shares[region].n)]
        if has_volume_bias(evaluation):
            bias = spread(volume_bias(evaluation, region).mean(axis=1))
            cells.append(_cell(bias["mean"], "" if math.isnan(bias["sd"]) else f" ± {_number(bias['sd'])}"))
        rows.append([Cell(title, title), *cells])
    heads = ["region", "inversions (%)", "compared"]
    note = "Volume bias: prediction minus reference." if has_volume_bias(evaluation) else ""
    together = name_of_all(titles.values())
    foot = [_cell(100 * shares[ALL].share), Cell(str(shares[ALL].n), shares[ALL].n)]
    if note:
        heads.append("volume bias (ml)")
        foot.append(Cell("", ""))
    return Table("inversions", f"{INVERSIONS_NOTE} {note}".strip(), heads, rows, foot, together)


def _score_cells(entries: list[dict[str, float]], metric: Metric, cases: int) -> list[Cell]:
    factor = metric.display_factor
    cells = []
    for entry in entries:
        note = "" if math.isnan(entry["sd"]) else f" ± {_number(entry['sd'] * factor)}"
        counted = "" if entry["n"] == cases else f" (n {entry['n']:.0f})"
        cells.append(_cell(entry["mean"] * factor, note + counted))
    return [*cells, _cell(_mean(np.array([entry["mean"] for entry in entries])) * factor)]


def _cell(value: float, note: str = "") -> Cell:
    value = float(value)
    return Cell("n/a", "") if math.isnan(value) else Cell(_number(value), value, note)


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def _mean(values: npt.NDArray[Any]) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan


def _low_if_nan(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def scores_for_viewer(evaluation: Evaluation, metric: Metric, case: str) -> dict[str, dict[str, Any]]:
    """Return subset name -> region -> score text of one case."""
    values = {
        region: evaluation.values(metric.name, region).loc[case] * metric.display_factor
        for region in evaluation.region_names
    }
    return {
        name: {region: _number(float(series[name])) for region, series in values.items()}
        for name in evaluation.subset_names
    }
