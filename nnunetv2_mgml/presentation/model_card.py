"""``MODEL_CARD.md``: what a receiver of a model has to know before using it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunetv2_mgml.inference.subset_quality import RELIABILITY_BOUND
from nnunetv2_mgml.modalities import channel_names, subset_name, table_order

MODEL_CARD = "MODEL_CARD.md"


def model_card(
    *,
    name: str,
    dataset_json: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    folds: Sequence[int | str],
    report: Mapping[str, Any] | None,
    versions: Mapping[str, str],
    licence: str,
    commands: Sequence[str],
    first_stage: str | None = None,
) -> str:
    """Return the card as Markdown.

    Args:
        name: of the model, ``TRAINER__PLANS__CONFIGURATION`` of a data set.
        dataset_json: of the model folder.
        plans: of the model folder.
        configuration: the one that was trained.
        folds: those that are in the archive.
        report: content of ``subset_report.json``; None where there is none.
        versions: package -> version the archive was made with.
        licence: of the weights; empty: not stated.
        commands: what the receiver types.
        first_stage: of a cascade's second stage, the model whose predictions it needs.
    """
    channels = channel_names(dict(dataset_json))
    labels = {label: value for label, value in dataset_json["labels"].items() if label not in ("background", "ignore")}
    options = plans.get("mgml", {}).get("config", {})
    spacing = _spacing(plans["configurations"], configuration)
    lines = [
        f"# {name}",
        "",
        "Segmentation from any non-empty subset of its modalities, with nnU-Net v2 and nnunetv2_mgml. For research; "
        "not a medical device.",
        "",
        "| | |",
        "|---|---|",
        f"| modalities, in channel order | {', '.join(channels)} |",
        f"| labels | {', '.join(f'{label} = {value}' for label, value in labels.items())} |",
        f"| training data | {dataset_json.get('name') or plans['dataset_name']}, "
        f"{dataset_json.get('numTraining', 'unknown number of')} cases |",
        *_stated("description of the data", dataset_json.get("description")),
        *_stated("reference", dataset_json.get("reference")),
        *_stated("licence of the data", dataset_json.get("licence") or dataset_json.get("license")),
        f"| licence of the weights | {licence or 'not stated: ask who gave it to you'} |",
        f"| folds | {', '.join(map(str, folds))} |",
        *_stated("spacing, mm", " x ".join(f"{value:g}" for value in spacing or ())),
        f"| fusion design | {options.get('fusion', 'none (stock network)')} |",
        f"| made with | {', '.join(f'{package} {version}' for package, version in versions.items())} |",
        "",
        "## Use",
        "",
        "With PyTorch, nnU-Net v2 and nnunetv2_mgml installed, and `nnUNet_results` naming a folder for models "
        "(`export nnUNet_results=/models`):",
        "",
        "```bash",
        *commands,
        "```",
        "",
        *_needed(first_stage),
        f"`IN` holds a file per case and modality, `CASE_0000` to `CASE_{len(channels) - 1:04d}` "
        f"({', '.join(f'{c:04d} {channel}' for c, channel in enumerate(channels))}); leave out what does not exist and "
        f"do not renumber the others. Input has to be prepared as the training data were: the modalities of a case "
        f"registered to each other, on one grid, skull-stripped if the training data were.",
        "",
        "## What to expect",
        "",
        *_expectation(report, channels),
    ]
    return "\n".join(lines) + "\n"


def _spacing(configurations: Mapping[str, Any], name: str | None) -> Any:
    """Return the spacing of a configuration, its own or inherited; None where nothing says it."""
    while name is not None:
        if "spacing" in configurations[name]:
            return configurations[name]["spacing"]
        name = configurations[name].get("inherits_from")
    return None


def _stated(what: str, value: Any) -> list[str]:
    text = " ".join(str(value).split()).replace("|", "\\|")  # a row of a table is one line
    return [f"| {what} | {text} |"] if text and value else []


def _needed(first_stage: str | None) -> list[str]:
    if first_stage is None:
        return []
    return [
        f"This is the second stage of a cascade. It needs the model of the first, `{first_stage}`, which is not in "
        f"this archive: install that one as well, and predict with it first.",
        "",
    ]


def _expectation(report: Mapping[str, Any] | None, channels: Sequence[str]) -> list[str]:
    if report is None:
        return [
            "Not known: the model folder had no subset_report.json. `mgml evaluate --write_subset_report` makes it "
            "from validation cases."
        ]
    names = [subset_name(subset, channels) for subset in table_order(channels)]
    subsets = {name: report["subsets"][name] for name in reversed(names) if name in report["subsets"]}
    volumes = report.get("absolute_volume_error_ml") or {}
    regions = list(next(iter(subsets.values()), {}))
    rows = {
        name: [_cell(entries[region], volumes.get(name, {}).get(region)) for region in regions]
        for name, entries in subsets.items()
    }
    mirroring = "with" if report.get("mirroring") else "without"
    return [
        f"{report['number_of_cases']} validation cases, {mirroring} mirroring, policy `{report['policy']}` where a "
        f"region is empty. Dice in percent (standard deviation over cases)"
        f"{'; absolute volume error in ml' if volumes else ''}.",
        "",
        f"| from | {' | '.join(regions)} |",
        f"|---|{'---|' * len(regions)}",
        *(f"| {name} | {' | '.join(row)} |" for name, row in rows.items()),
        "",
        f"Predictions quote these numbers for the modalities of each case, and call a region with a mean below "
        f"{100 * RELIABILITY_BOUND:.0f} unreliable. They hold for cases like those of the training and validation.",
    ]


def _cell(dice: Mapping[str, Any], volume: Mapping[str, Any] | None) -> str:
    if dice["mean"] is None:
        return "-"
    spread = "" if dice["sd"] is None else f" ({100 * dice['sd']:.1f})"
    error = "" if volume is None or volume["mean"] is None else f"; {volume['mean']:.1f} ml"
    return f"{100 * dice['mean']:.1f}{spread}{error}"
