"""Writes docs/case-quality.md, and its figure, from what `cubes_case_quality.py` measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nnunetv2_mgml.presentation.figures.style import CYCLE, GREY, new_figure, styled

_NAMES = {"whole_tumor": "whole tumour", "tumor_core": "tumour core", "enhancing_tumor": "enhancing tumour"}
_HEAD = """# How good is this very prediction?

Made by `python benchmarks/ablation/cubes_case_quality.py` from `benchmarks/results/case_quality.json`.

Where the model folder's `subset_report.json` was written from at least five validation cases, `mgml_prediction.json`
has for every case, beside the mean of its subset (`expected_dice`), an estimate of its own per region:
`estimated_dice` with `estimate`, `low` and `high`, and `doubtful_regions`. It rests on the prediction's own
probabilities *p* alone: the expected precision of the mask, the sum of *p* inside it over its voxels, and its
expected sensitivity, the sum inside it over the sum everywhere. (Their harmonic mean is the expected Dice.) Networks
are too sure, so neither is taken at its word: the log-odds of both are compared with those of the validation cases
predicted from the same subset, and move the subset's mean Dice by two weights, fitted per region over all subsets. No
estimate leaves the range of Dice that validation cases had.

With each validation case left out in turn the same fit gives

- the interval `low` to `high`: 90 % of left-out Dice values, per number of modalities;
- the bound below which a region is doubtful: 5 % of the good predictions (Dice of at least 0.5) are below it;
- whether the estimate is given at all: where its error is not below that of the subset's mean, the mean stays alone.

Training's final validation and `mgml evaluate --write_subset_report` fit it; nothing has to be asked for, and it
travels with the model. A region that is predicted empty gets the mean Dice of validation cases in which it was,
without an interval. With a `--remove_small` rule a smaller region counts as empty, in the fit and in the estimate as
in the scores; its voxels are those of the label map, on the image's grid.

## On held-out patients

One model (`{variant}`, with an encoder per modality, full steps only and plain norms, as by default then, {steps}
steps, {device}, {precision}, commit {commit}) was trained on cubes of {train} patients of BraTS 2020. The fit saw the
{validation} validation patients; below are the {test} test patients, {predictions} predictions per region. They were
looked at twice: after the first look, estimates were cut at the range of Dice of the validation cases, because some
were 1.00; nothing else was chosen on them.
"""
_TAIL = """
*Error*: mean absolute difference from the true Dice, in points; in brackets the 95 % interval, over patients, of how
much it is above that of the subset's mean. *Correlation*: Spearman's over all predictions; *within*: the mean of the
subsets' own, where the subset's mean says nothing. *Calibration error*: mean distance of estimate and truth in ten
parts of equal size. *Bad found*: share of the predictions with Dice below 0.5 that are flagged by the bound chosen on
validation patients, and, in the last column, at exactly 5 % false alarms on the test patients.

![Estimated and true Dice of the test predictions](images/case_quality.png)

## Per subset

True mean Dice, Spearman's correlation of estimate and truth, error of the estimate and of the subset's mean (points).

{subsets}

## Agreement of modalities, folds and mirrored copies

Tried as a third sign: how far a prediction agrees with those from one of its modalities less (log-odds of the mean
Dice between the masks). On the left-out validation patients it does not pay for the passes it costs, so it is left out;
the test patients were looked at afterwards. Error in points, for whole tumour, tumour core, enhancing tumour:

| | left-out validation patients | test patients |
|---|---|---|
{agreement}

Folds and mirrored copies were not tried. Validation cases, on which the estimate is fitted, were trained on by every
fold but one, so how far folds agree on them says nothing of a new case. Mirrored copies are averaged patch by patch:
where they disagree the probabilities above are less sure already, and keeping each copy apart takes the memory of
eight predictions.

## What it is not

- One data set, half an hour of training, cubes of 32 voxels: how well it does for your model is in its own
  `subset_report.json`, `case_quality`, `left_out` of each region.
- It knows cases like those of validation. From another scanner, or of another disease, a network may be sure and
  wrong.
- The interval holds on average over cases, not for every kind of case, and few validation cases are behind it.
- Folds, checkpoint and mirroring are those of the evaluation (`expected_dice_from`); an ensemble or a mirrored
  prediction has other probabilities.
- No doubt is no reason not to look.
"""


def page(content: dict[str, Any]) -> str:
    """Return the page."""
    training, patients = content["training"], content["patients"]
    head = _HEAD.format(
        **{part: patients[part] for part in ("train", "validation", "test")},
        **{name: training[name] for name in ("steps", "device", "precision")},
        commit=training["commit"][:7],
        variant=content["variant"],
        predictions=patients["test"] * len(content["subsets"]),
    )
    return (
        head
        + _table(content)
        + _verdict(content)
        + _TAIL.format(subsets=_subsets(content), agreement=_agreement(content))
    )


def _table(content: dict[str, Any]) -> str:
    lines = [
        "",
        "| region | | error | correlation | within | calibration error | bad found (false alarms) | at 5 % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for region, entry in content["regions"].items():
        test = entry["test"]
        low, high = (100 * value for value in test["difference_of_errors"])
        for name, title in (("estimate", "this case"), ("subset_mean", "subset's mean")):
            row = test[name]
            ours = name == "estimate"
            cells = [
                _NAMES[region] if ours else "",
                title,
                f"{100 * row['mean_absolute_error']:.1f}{f' ({low:+.1f} to {high:+.1f})' if ours else ''}",
                _number(row["rank_correlation"]),
                _number(test["correlation_within_subset"]) if ours else "-",
                f"{100 * row['calibration_error']:.1f}",
                f"{row['bad_found']:.0%} ({row['false_alarms']:.0%})",
                f"{row['bad_found_at_5_percent']:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdict(content: dict[str, Any]) -> str:
    lines = []
    for region, entry in content["regions"].items():
        test = entry["test"]
        high = test["difference_of_errors"][1]
        said = "beats" if high < 0 else "does not clearly beat"
        lines.append(
            f"- {_NAMES[region]}: {test['bad']:.0%} of the predictions are bad. The estimate {said} the subset's mean. "
            f"{test['inside_interval']:.0%} of the\n  true values are in the 90 % interval, which is "
            f"{100 * test['width_of_interval']:.0f} points wide on average."
        )
    return "\n" + "\n".join(lines) + "\n"


def _subsets(content: dict[str, Any]) -> str:
    lines = [f"| subset | {' | '.join(_NAMES[region] for region in content['regions'])} |", "|---|---|---|---|"]
    for name in content["subsets"]:
        cells = []
        for entry in content["regions"].values():
            row = entry["subsets"][name]
            cells.append(
                f"{100 * row['dice']:.0f}; {_number(row['rank_correlation'])}; {100 * row['error']:.1f}, "
                f"{100 * row['error_of_subset_mean']:.1f}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreement(content: dict[str, Any]) -> str:
    columns: dict[str, tuple[list[str], list[str]]] = {}
    for entry in content["regions"].values():
        more = entry["with_agreement_of_modalities"]
        errors = {
            "as it is": (
                entry["validation_left_out"]["mean_absolute_error"],
                entry["test"]["estimate"]["mean_absolute_error"],
            ),
            "with agreement of modalities": (more["validation_left_out"], more["test"]),
        }
        for name, pair in errors.items():
            for cells, error in zip(columns.setdefault(name, ([], [])), pair, strict=True):
                cells.append(f"{100 * error:.1f}")
    return "\n".join(f"| {name} | {' | '.join(', '.join(cells) for cells in pair)} |" for name, pair in columns.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@styled
def scatter(content: dict[str, Any]) -> Figure:
    """Draw the true Dice of every test prediction against its estimate, by number of modalities, a panel per region."""
    counts = np.array([name.count("+") + 1 for name in content["subsets"]])
    figure = new_figure(9.6, 3.5)
    panels = figure.subplots(1, len(content["regions"]), sharex=True, sharey=True)
    for panel, (region, points) in zip(panels, content["test_predictions"].items(), strict=True):
        estimated, dice = np.array(points["estimate"]), np.array(points["dice"])
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, zorder=1)
        for number in sorted(set(counts)):
            chosen = counts == number
            panel.scatter(
                estimated[:, chosen].ravel(),
                dice[:, chosen].ravel(),
                s=7,
                alpha=0.55,
                linewidths=0,
                color=CYCLE[number - 1],
                label=f"{number} of 4 modalities",
                zorder=2,
            )
        correlation = content["regions"][region]["test"]["estimate"]["rank_correlation"]
        panel.set_title(f"{_NAMES[region]} (correlation {correlation:.2f})")
        panel.set_xlabel("estimated Dice")
        panel.set_xlim(-0.02, 1.02)
        panel.set_ylim(-0.02, 1.02)
        panel.set_aspect("equal")
    panels[0].set_ylabel("true Dice")
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=4, markerscale=2)
    return figure
