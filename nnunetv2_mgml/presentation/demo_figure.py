"""The demo's figure: one held-out patient, the sequences, the ground truth, predictions from several subsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_mgml.modalities import canonical_name, channel_names, parse_subset
from nnunetv2_mgml.presentation.figures.qualitative import Case, case_rows
from nnunetv2_mgml.presentation.figures.slices import read_axial, telling_slice
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation

_LABELS = {1: "edema", 2: "necrosis, non-enhancing", 3: "enhancing tumour"}


def draw_demo_figure(
    raw: Path, predictions: Path, evaluation_folder: Path, subsets: Sequence[str], path: Path, rows: int = 2
) -> Path:
    """Draw the held-out cases with the largest enhancing tumour.

    Args:
        raw: nnU-Net raw dataset folder with ``imagesTs`` and ``labelsTs``.
        predictions: folder with one folder of predictions per subset.
        evaluation_folder: of those predictions; gives the Dice in the heading.
        subsets: subset names, in the order to draw them.
        path: the PNG to write.
        rows: number of cases.

    Returns:
        ``path``.
    """
    channels = channel_names(json.loads((raw / "dataset.json").read_text()))
    evaluation = load_evaluation(evaluation_folder)
    sizes = {label: int((read_axial(label)[0] == 3).sum()) for label in sorted((raw / "labelsTs").glob("*.nii.gz"))}
    chosen = sorted(sizes, key=lambda label: sizes[label], reverse=True)[:rows]
    cases = [_case(label, raw, predictions, subsets, channels) for label in chosen]
    figure = case_rows(cases, _LABELS)
    figure.suptitle(
        f"One model, {2 ** len(channels) - 1} subsets; mean whole-tumour Dice of {len(evaluation.cases)} "
        f"held-out patients: {_scores(evaluation, subsets)}",
        fontsize=9,
    )
    return save(figure, path, dpi=130)


def _case(label: Path, raw: Path, predictions: Path, subsets: Sequence[str], channels: Sequence[str]) -> Case:
    name = label.name.removesuffix(".nii.gz")
    reference, spacing = read_axial(label)
    index = telling_slice(reference)
    images = {
        channel: read_axial(raw / "imagesTs" / f"{name}_{c:04d}.nii.gz")[0][index] for c, channel in enumerate(channels)
    }
    shown = {_title(subset, channels): read_axial(predictions / subset / label.name)[0][index] for subset in subsets}
    return Case(images, reference[index], shown, name, background="t1", pixel_aspect=spacing[1] / spacing[2])


def _title(subset: str, channels: Sequence[str]) -> str:
    visible = parse_subset(subset, channels)
    missing = [name for name, shown in zip(channels, visible, strict=True) if not shown]
    if not missing:
        return "from all"
    if len(missing) > len(channels) / 2:
        return "from " + " + ".join(name.upper() for name, shown in zip(channels, visible, strict=True) if shown)
    return "without " + ", ".join(canonical_name(name).upper() for name in missing)


def _scores(evaluation: Evaluation, subsets: Sequence[str]) -> str:
    summary = evaluation.summary("dice", "whole_tumor")
    return ", ".join(f"{_title(subset, evaluation.channels)} {summary[subset]['mean']:.2f}" for subset in subsets)
