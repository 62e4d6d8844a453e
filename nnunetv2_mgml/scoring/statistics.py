"""Paired comparison of evaluations: difference, bootstrap confidence interval, Wilcoxon signed-rank test, Holm.

Everything is paired by case: the unit of the statistics is the difference of two methods on the same case. Cases for
which either has no value (policy ``nan``) leave that comparison, and ``n`` says how many are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import rankdata, wilcoxon

from nnunetv2_mgml.scoring.derived import ALL, Over, inversions_of_cases
from nnunetv2_mgml.scoring.results import AVERAGE, Evaluation, common_subsets

BOOTSTRAP_DRAWS = 10_000
CONFIDENCE = 0.95
EXACT_CASES = 200
_DRAWS_AT_ONCE = 2_000_000
COLUMNS = (
    "metric",
    "baseline",
    "method",
    "region",
    "subset",
    "n",
    "baseline_mean",
    "method_mean",
    "difference",
    "ci_low",
    "ci_high",
    "p",
    "p_holm",
)


@dataclass(frozen=True)
class PairedResult:
    """Comparison of two paired samples."""

    n: int
    difference: float
    """Mean of (second - first)."""
    ci_low: float
    ci_high: float
    p: float
    """Two-sided Wilcoxon p value, not adjusted."""


def bootstrap_interval(
    differences: npt.NDArray[Any], draws: int = BOOTSTRAP_DRAWS, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap confidence interval of the mean.

    Args:
        differences: ``(n,)`` float64 without NaN, one per case.
        draws: bootstrap samples; cases are drawn with replacement.
        confidence: share of the draws the interval covers.
        seed: of the random generator; the same input gives the same interval.
    """
    if len(differences) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // len(differences))
    means = np.concatenate(
        [
            differences[rng.integers(len(differences), size=(min(block, draws - start), len(differences)))].mean(axis=1)
            for start in range(0, draws, block)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilcoxon_p(differences: npt.NDArray[Any]) -> float:
    """Return the two-sided p value of the Wilcoxon signed-rank test.

    Zero differences (two perfect answers) are ranked with the others and their ranks dropped (Pratt). The null
    distribution is exact, ties included, up to `EXACT_CASES` cases that differ (scipy's is exact without ties only, or
    takes a second per test); beyond that scipy's normal approximation is used.

    Args:
        differences: ``(n,)`` float64 without NaN.

    Returns:
        The p value; NaN below two cases, 1 when all differences are zero.
    """
    if len(differences) < 2:
        return np.nan
    different = differences != 0
    if not different.any():
        return 1.0
    if np.count_nonzero(different) > EXACT_CASES:
        return float(wilcoxon(differences, zero_method="pratt", method="approx").pvalue)
    ranks = np.rint(2 * rankdata(np.abs(differences))[different]).astype(int)  # doubled: mid-ranks are halves
    observed = ranks[differences[different] > 0].sum()
    chance: npt.NDArray[Any] = np.ones(1)  # of each sum of positive ranks, when every sign is a coin toss
    for rank in ranks:
        chance = (np.pad(chance, (0, rank)) + np.pad(chance, (rank, 0))) / 2
    centre = ranks.sum() / 2
    as_extreme = np.abs(np.arange(len(chance)) - centre) >= abs(observed - centre)
    return float(min(1.0, chance[as_extreme].sum()))


def holm(p_values: Sequence[float] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return p values adjusted for multiple tests (Holm's step-down); NaN stays NaN and is not counted as a test."""
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full_like(p, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def compare_paired(first: npt.NDArray[Any], second: npt.NDArray[Any], seed: int = 0) -> PairedResult:
    """Compare two paired samples ``(n,)``; pairs with a NaN are dropped."""
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    differences = differences[~np.isnan(differences)]
    mean = float(differences.mean()) if len(differences) else np.nan
    return PairedResult(len(differences), mean, *bootstrap_interval(differences, seed=seed), wilcoxon_p(differences))


def compare_evaluations(
    evaluations: Sequence[Evaluation], metrics: Sequence[str], common_cases: bool = False, seed: int = 0
) -> pd.DataFrame:
    """Compare every evaluation with the first, per metric, region and subset.

    Args:
        evaluations: the baseline first, then at least one other; same channels, regions and policy.
        metrics: which metrics to compare.
        common_cases: use the cases all evaluations have instead of refusing other ones.
        seed: of the bootstrap.

    Returns:
        Columns `COLUMNS`. ``difference`` is method - baseline in the metric's own unit (fractions, mm, ml). Rows with
        subset ``AVG`` compare each case's mean over subsets. ``p_holm`` is adjusted within a metric over all regions,
        subsets and methods; the ``AVG`` rows form a family of their own.

    Raises:
        ValueError: fewer than two evaluations, evaluations that cannot be compared, or other cases.
    """
    evaluations = pairable(evaluations, common_cases)
    rows = []
    for metric in metrics:
        for other in evaluations[1:]:
            for region in other.region_names:
                first, second = (e.values(metric, region) for e in (evaluations[0], other))
                defined = first.notna() & second.notna()
                first, second = (v.assign(**{AVERAGE: v.where(defined).mean(axis=1)}) for v in (first, second))
                for subset in first.columns:
                    a, b = first[subset].to_numpy(), second[subset].to_numpy()
                    both = ~np.isnan(a) & ~np.isnan(b)
                    result = compare_paired(a, b, seed)
                    means = (float(v[both].mean()) if both.any() else np.nan for v in (a, b))
                    rows.append(
                        (
                            metric,
                            evaluations[0].name,
                            other.name,
                            region,
                            subset,
                            result.n,
                            *means,
                            result.difference,
                            result.ci_low,
                            result.ci_high,
                            result.p,
                        )
                    )
    table = pd.DataFrame(rows, columns=list(COLUMNS[:-1]))
    families = [table["metric"], table["subset"] == AVERAGE]
    grouped = table.groupby(families, sort=False)["p"]
    return table.assign(p_holm=grouped.transform(lambda p: pd.Series(holm(p.to_numpy()), p.index)))


def compare_inversions(evaluations: Sequence[Evaluation], seed: int = 0) -> pd.DataFrame:
    """Compare each evaluation's inversions of Dice with the first's: the share of every case, paired by case.

    Args:
        evaluations: what `pairable` returned; without Dice in all of them, or nested subsets, there is nothing to say.
        seed: of the bootstrap.

    Returns:
        Columns ``baseline``, ``method``, ``region`` (`derived.ALL` for all regions), ``n``, ``baseline_mean``,
        ``method_mean``, ``difference``, ``ci_low``, ``ci_high``, ``p`` (not adjusted); shares are fractions.
    """
    columns = [c for c in COLUMNS if c not in ("metric", "subset", "p_holm")]
    if not all("dice" in e.metrics for e in evaluations):
        return pd.DataFrame(columns=columns)
    shares = [_shares_of_cases(evaluation) for evaluation in evaluations]
    rows = []
    for other, others in zip(evaluations[1:], shares[1:], strict=True):
        for region in others:
            first, second = shares[0][region].to_numpy(), others[region].to_numpy()
            both = ~np.isnan(first) & ~np.isnan(second)
            if both.any():
                result = compare_paired(first, second, seed)
                means = (float(first[both].mean()), float(second[both].mean()))
                interval = (result.difference, result.ci_low, result.ci_high, result.p)
                rows.append((evaluations[0].name, other.name, region, result.n, *means, *interval))
    return pd.DataFrame(rows, columns=columns)


def _shares_of_cases(evaluation: Evaluation) -> dict[str | Over, pd.Series]:
    """Return the share of inversions of every case by region, and under `ALL`; NaN where there is no pair."""
    counts = inversions_of_cases(evaluation)
    inverted, pairs = (counts.pivot(index="case", columns="region", values=what) for what in ("inverted", "n"))
    shares: dict[str | Over, pd.Series] = {
        region: inverted[region] / pairs[region].where(pairs[region] > 0) for region in evaluation.region_names
    }
    shares[ALL] = inverted.sum(axis=1) / pairs.sum(axis=1).where(pairs.sum(axis=1) > 0)
    return shares


def pairable(evaluations: Sequence[Evaluation], common_cases: bool = False) -> list[Evaluation]:
    """Return the evaluations reduced to what they share.

    Raises:
        ValueError: see `compare_evaluations`.
    """
    if len(evaluations) < 2:
        raise ValueError("A comparison needs at least two evaluations.")
    evaluations = common_subsets(evaluations)
    shared = set.intersection(*(set(e.cases) for e in evaluations))
    lonely = sorted(set.union(*(set(e.cases) for e in evaluations)) - shared)
    if not shared:
        raise ValueError("The evaluations have no case in common, so nothing is paired.")
    if lonely and not common_cases:
        raise ValueError(
            f"The evaluations are not of the same cases: {len(shared)} are shared, {len(lonely)} are not "
            f"({', '.join(lonely[:5])}{', ...' if len(lonely) > 5 else ''}). Use --common_cases to "
            f"compare the shared ones."
        )
    return [e.restricted(cases=sorted(shared)) for e in evaluations]
