"""An evaluation on disk and in memory: the tidy table, its summary, and where they lie.

Folder layout::

    results.csv     one line per case, subset, region and metric (fractions, mm, ml; "nan" where there is no value)
    summary.json    means, spreads, n; inversions, volume bias; versions, command, model, policy
    table.md, table.tex    the paper's Table 3 layout
    figures/        heatmap, score by number of modalities, Shapley values (PNG)
    settings.json   fingerprint: a later run with other settings is refused
    cases/          one JSON per finished case (what a resumed run does not do again)
    predictions/<subset>/  label maps, when the evaluation made them itself
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nnunetv2_mgml.io.files import read_json, write_json, write_text
from nnunetv2_mgml.modalities import Subset, channel_names, parse_subset, subset_name, table_order
from nnunetv2_mgml.scoring.cases import Scores, ScoringSettings
from nnunetv2_mgml.scoring.derived import ALL, MARGIN, has_volume_bias, inversions, name_of_all, volume_bias
from nnunetv2_mgml.scoring.info import EvaluationInfo, provenance
from nnunetv2_mgml.scoring.metrics import get_metric
from nnunetv2_mgml.scoring.policy import get_policy
from nnunetv2_mgml.scoring.regions import short_names, table_region_order

COLUMNS = ("case", "subset", "region", "metric", "value")
AVERAGE = "AVG"
"""Name of the pseudo-subset that is the mean over all subsets."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `mgml evaluate`."""

    name: str
    """What the method is called in tables."""
    table: pd.DataFrame
    """Columns `COLUMNS`; ``value`` float64 with NaN where the policy gives none."""
    channels: tuple[str, ...]
    """Modality names in channel order."""
    regions: dict[str, tuple[int, ...]]
    policy: str
    info: EvaluationInfo = field(default_factory=EvaluationInfo)
    """Everything else of ``summary.json``: versions, command, source, model."""

    @property
    def subsets(self) -> list[Subset]:
        """Subsets that were evaluated, in table order."""
        evaluated = set(self.table["subset"].unique())
        return [s for s in table_order(self.channels) if subset_name(s, self.channels) in evaluated]

    @property
    def subset_names(self) -> list[str]:
        """Names of `subsets`."""
        return [subset_name(s, self.channels) for s in self.subsets]

    @property
    def region_names(self) -> list[str]:
        """Regions in table order."""
        return table_region_order(self.regions)

    @property
    def region_titles(self) -> dict[str, str]:
        """Region -> what it is called in tables and figures (`regions.short_names`), in table order."""
        return short_names(self.region_names)

    @property
    def metrics(self) -> list[str]:
        """Metric names in the order they were computed."""
        return list(dict.fromkeys(self.table["metric"]))

    @property
    def cases(self) -> list[str]:
        """Case names, sorted."""
        return sorted(self.table["case"].unique())

    def restricted(self, subset_names: Sequence[str] | None = None, cases: Sequence[str] | None = None) -> Evaluation:
        """Return the evaluation with only some of its subsets or cases; None keeps all."""
        table = self.table
        if subset_names is not None:
            table = table[table["subset"].isin(subset_names)]
        if cases is not None:
            table = table[table["case"].isin(cases)]
        return dataclasses.replace(self, table=table)

    def values(self, metric: str, region: str) -> pd.DataFrame:
        """Return one value per case (rows) and subset name (columns, table order) of a metric and region.

        Raises:
            ValueError: the evaluation has no such metric or region.
        """
        for what, value, allowed in (("metric", metric, self.metrics), ("region", region, list(self.regions))):
            if value not in allowed:
                raise ValueError(f"Evaluation '{self.name}' has no {what} '{value}'. It has: {', '.join(allowed)}.")
        chosen = self.table[(self.table["metric"] == metric) & (self.table["region"] == region)]
        return chosen.pivot(index="case", columns="subset", values="value").reindex(columns=self.subset_names)

    def summary(self, metric: str, region: str) -> dict[str, dict[str, float]]:
        """Return ``{subset name or AVG: {mean, sd, n}}`` of a metric and region.

        ``mean`` and ``sd`` (n - 1 in the denominator) are over cases with a value, ``n`` is their number. ``AVG`` has
        the mean of the subsets' means, as the paper's tables do, and the spread over cases of a case's mean over
        subsets.
        """
        values = self.values(metric, region)
        result = {name: spread(values[name]) for name in values.columns}
        average = spread(values.mean(axis=1))
        average["mean"] = float(pd.Series([entry["mean"] for entry in result.values()]).mean())
        return {**result, AVERAGE: average}


def spread(values: pd.Series) -> dict[str, float]:
    """Return ``mean``, ``sd`` (n - 1 in the denominator) and ``n`` of the values that are no NaN."""
    values = values.dropna()
    return {
        "mean": float(values.mean()) if len(values) else math.nan,
        "sd": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
        "n": len(values),
    }


def tidy_table(scores: dict[str, Scores], subset_names: Sequence[str]) -> pd.DataFrame:
    """Turn ``{case: {subset: {region: {metric: value}}}}`` into the tidy table, for the named subsets only.

    A case may lack subsets whose modalities it does not have.
    """
    rows = [
        (case, subset, region, metric, float(value))
        for case in sorted(scores)
        for subset in subset_names
        if subset in scores[case]
        for region, metrics in scores[case][subset].items()
        for metric, value in metrics.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": "float64"})


def build_evaluation(
    name: str,
    scores: dict[str, Scores],
    subset_names: Sequence[str],
    channels: Sequence[str],
    settings: ScoringSettings,
    info: EvaluationInfo | None = None,
) -> Evaluation:
    """Assemble an evaluation made now.

    Args:
        name: what the method is called in tables.
        scores: case -> its scores.
        subset_names: the subsets to keep.
        channels: modality names in channel order.
        settings: what was computed and how.
        info: what only the caller knows (source, model, what was left out); the rest is filled in.
    """
    made = provenance()
    return Evaluation(
        name,
        tidy_table(scores, subset_names),
        tuple(channels),
        dict(settings.label_set.regions),
        settings.policy,
        dataclasses.replace(
            info or EvaluationInfo(),
            min_region_voxels=dict(settings.min_region_voxels),
            ignore_label=settings.label_set.ignore_label,
            command=tuple(made["command"]),
            created=made["created"],
            versions=made["versions"],
        ),
    )


def save_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``results.csv`` and ``summary.json``."""
    write_text(folder / "results.csv", evaluation.table.to_csv(index=False, na_rep="nan", lineterminator="\n"))
    means = {
        metric: {region: evaluation.summary(metric, region) for region in evaluation.region_names}
        for metric in evaluation.metrics
    }
    described = {
        name: {
            "title": get_metric(name).title,
            "unit": get_metric(name).unit,
            "higher_is_better": get_metric(name).higher_is_better,
        }
        for name in evaluation.metrics
    }
    write_json(
        folder / "summary.json",
        {
            "name": evaluation.name,
            "channels": list(evaluation.channels),
            "regions": {region: list(labels) for region, labels in evaluation.regions.items()},
            "policy": {"name": evaluation.policy, "meaning": get_policy(evaluation.policy).summary},
            "number_of_cases": len(evaluation.cases),
            "subsets": evaluation.subset_names,
            "metrics": described,
            **evaluation.info.as_dict(),
            "results": means,
            **_derived(evaluation),
        },
    )


def _derived(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "dice" in evaluation.metrics:
        together = name_of_all(evaluation.regions, "all")
        shares = {together if of is ALL else of: entry._asdict() for of, entry in inversions(evaluation).items()}
        found["inversions"] = {"metric": "dice", "margin": MARGIN, "regions": shares}
    if has_volume_bias(evaluation):
        found["volume_bias_ml"] = {
            region: spread(volume_bias(evaluation, region).mean(axis=1)) for region in evaluation.region_names
        }
    return found


def load_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation folder back.

    Raises:
        FileNotFoundError: ``results.csv`` or ``summary.json`` is missing.
        ValueError: a file is damaged or of another kind.
    """
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'summary.json'} does not exist. Give the folder of an evaluation, which 'mgml evaluate' has "
            f"written to its end."
        )
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict):
        raise ValueError(f"{folder / 'summary.json'} must hold an object: it was not written by 'mgml evaluate'.")
    missing = {"name", "channels", "regions", "policy"} - set(summary)
    if missing:
        raise ValueError(
            f"{folder / 'summary.json'} has no {', '.join(sorted(missing))}: it was not written by 'mgml evaluate'."
        )
    file = folder / "results.csv"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; run 'mgml evaluate -o {folder}' again to write it.")
    _check_summary(summary, folder / "summary.json")
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' own derive from ValueError
        reason = (str(error).strip().splitlines() or ["?"])[0]
        raise ValueError(
            f"{file} is no table ({reason}); run 'mgml evaluate -o {folder}' again to write it."
        ) from error
    if tuple(table.columns) != COLUMNS:
        raise ValueError(f"{file} must have the columns {', '.join(COLUMNS)}, found {', '.join(table.columns)}.")
    try:
        table["value"] = [float(text) for text in table["value"]]  # to the last bit, which not every pandas reads
    except ValueError as error:
        raise ValueError(f"{file} has a value that is no number ({error}).") from error
    channels = tuple(summary["channels"])
    for name in table["subset"].unique():
        parse_subset(name, channels)
    try:
        info = EvaluationInfo.from_dict(summary)
    except ValueError as error:
        raise ValueError(f"{folder / 'summary.json'} is damaged or of another version: {error}.") from error
    regions = {region: tuple(labels) for region, labels in summary["regions"].items()}
    _check_rows(table, regions, file)
    return Evaluation(summary["name"], table, channels, regions, summary["policy"]["name"], info)


def _check_summary(summary: dict[str, Any], file: Path) -> None:
    """Raise a ValueError unless what is needed to read scores is of the right kind."""
    channels, regions, policy = summary["channels"], summary["regions"], summary["policy"]
    for entry, holds in (
        ("name", isinstance(summary["name"], str)),
        ("channels", isinstance(channels, list) and bool(channels) and all(isinstance(c, str) and c for c in channels)),
        (
            "regions",
            isinstance(regions, dict)
            and bool(regions)
            and all(isinstance(v, list) and v and all(type(label) is int for label in v) for v in regions.values()),
        ),
        ("policy", isinstance(policy, dict) and isinstance(policy.get("name"), str)),
    ):
        if not holds:
            raise ValueError(f"{file} is damaged: '{entry}' is not what 'mgml evaluate' writes.")
    channel_names({"channel_names": dict(enumerate(channels))})
    get_policy(policy["name"])


def _check_rows(table: pd.DataFrame, regions: dict[str, Any], file: Path) -> None:
    """Raise a ValueError for rows of unknown regions or metrics, and for two of one kind."""
    unknown = sorted(set(table["region"]) - set(regions))
    if unknown:
        raise ValueError(f"{file} has the region {unknown[0]}, which summary.json does not know.")
    for name in table["metric"].unique():
        get_metric(name)
    double = table.duplicated(subset=list(COLUMNS[:-1]))
    if double.any():
        row = table[double].iloc[0]
        raise ValueError(f"{file} has two values for {', '.join(map(str, row.iloc[:-1]))}.")


def common_subsets(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations reduced to the subsets they share.

    Raises:
        ValueError: none given, no shared subset, or different channels, regions, empty-case policies, region size
            rules or ignore labels.
    """
    if not evaluations:
        raise ValueError("At least one evaluation is needed.")
    first = evaluations[0]
    for other in evaluations[1:]:
        theirs = _comparable(other)
        for what, ours in _comparable(first).items():
            if ours != theirs[what]:
                raise ValueError(
                    f"'{first.name}' and '{other.name}' differ in {what} ({ours} and {theirs[what]}) and "
                    f"cannot be put side by side. Evaluate both with the same dataset.json, --policy and "
                    f"--remove_small."
                )
    names = [n for n in first.subset_names if all(n in e.subset_names for e in evaluations[1:])]
    if not names:
        raise ValueError(f"{', '.join(e.name for e in evaluations)} have no modality subset in common.")
    return [e.restricted(names) for e in evaluations]


def _comparable(evaluation: Evaluation) -> dict[str, Any]:
    """Return what must agree between evaluations in one table."""
    return {
        "channels": evaluation.channels,
        "regions": evaluation.regions,
        "policy": evaluation.policy,
        "min_region_voxels": evaluation.info.min_region_voxels,
        "ignore_label": evaluation.info.ignore_label,
    }
