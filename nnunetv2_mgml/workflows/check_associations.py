"""Whether what is missing goes with something else: a label, the volume of the labels, the site.

A model could then learn the one from the other. Tests by Fisher, Mann and Whitney, chi-squared; p adjusted after Holm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.workflows.check_case import CaseCheck

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Association:
    """Whether a modality is missing goes with something else."""

    modality: str
    variable: str
    """``site``, ``volume`` (of all labels) or ``label 2``."""
    p: float
    """By the test of Fisher (labels), chi-squared (sites) or Mann and Whitney (volume), adjusted after Holm."""
    text: str
    """What it looks like."""


def associations_of(
    checks: Sequence[CaseCheck],
    subsets: Mapping[str, Subset],
    channels: Sequence[str],
    sites: Mapping[str, str],
    ignore_label: int | None = None,
) -> tuple[Association, ...]:
    """Return what missing modalities significantly go with: labels, the volume of the labels, sites.

    Args:
        checks: of the training cases; those without a label map that can be read do not count.
        subsets: case -> modalities it has.
        channels: modality names in channel order.
        sites: case -> site, of those whose site is known.
        ignore_label: a value that says that nobody looked there, which is no tissue.
    """
    measured = {check.name: check.label_ml for check in checks if check.label_ml is not None}
    labelled = {
        case: {value: ml for value, ml in volumes.items() if value != ignore_label}
        for case, volumes in measured.items()
    }
    labels = sorted({value for volumes in labelled.values() for value in volumes})
    found: list[Association] = []
    for c, name in enumerate(channels):
        has = np.array([subsets[case][c] for case in labelled], dtype=bool)
        if has.all() or not has.any():
            continue
        for value in labels:
            tumour = np.array([value in volumes for volumes in labelled.values()])
            if not tumour.all():
                found.append(_by_label(name, has, tumour, value))
        found.append(_by_volume(name, has, np.array([sum(volumes.values()) for volumes in labelled.values()])))
        where = [sites.get(case) for case in labelled]
        if len(set(where) - {None}) > 1:
            found.append(_by_site(name, has, where))
    return tuple(a for a in _holm(found) if a.p < SIGNIFICANT)


def _by_label(name: str, has: NDArray[np.bool_], tumour: NDArray[np.bool_], value: int) -> Association:
    from scipy.stats import fisher_exact

    table = [[int(np.sum(has & tumour)), int(np.sum(has & ~tumour))]]
    table.append([int(np.sum(~has & tumour)), int(np.sum(~has & ~tumour))])
    shares = [row[0] / sum(row) for row in table]
    text = f"label {value} is in {shares[0]:.0%} of the cases with {name} and in {shares[1]:.0%} of those without"
    return Association(name, f"label {value}", float(fisher_exact(np.array(table))[1]), text)


def _by_volume(name: str, has: NDArray[np.bool_], volumes: NDArray[np.float64]) -> Association:
    from scipy.stats import mannwhitneyu

    p = float(mannwhitneyu(volumes[has], volumes[~has]).pvalue)
    text = (
        f"the labels measure {np.median(volumes[has]):.3g} ml (median) in the cases with {name} and "
        f"{np.median(volumes[~has]):.3g} ml in those without"
    )
    return Association(name, "volume", p, text)


def _by_site(name: str, has: NDArray[np.bool_], where: Sequence[str | None]) -> Association:
    from scipy.stats import chi2_contingency

    names = sorted({site for site in where if site is not None})
    rows = np.array([[sum(h == there and s == site for h, s in zip(has, where, strict=True)) for site in names]
                     for there in (True, False)])  # fmt: skip
    p = float(chi2_contingency(rows)[1]) if rows.sum(axis=1).all() else 1.0
    shares = ", ".join(f"{site} {rows[0, i] / rows[:, i].sum():.0%}" for i, site in enumerate(names))
    return Association(name, "site", p, f"how often {name} is there differs by site: {shares}")


def _holm(found: Iterable[Association]) -> list[Association]:
    ordered = sorted(found, key=lambda association: association.p)
    adjusted, highest = [], 0.0
    for rank, association in enumerate(ordered):
        highest = max(highest, min(1.0, association.p * (len(ordered) - rank)))
        adjusted.append(dataclasses.replace(association, p=highest))
    return adjusted
