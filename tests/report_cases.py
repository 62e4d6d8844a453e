"""A small evaluation folder with images, labels and predictions, without running a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_mgml.modalities import all_subsets, channel_names, subset_name
from nnunetv2_mgml.scoring.cases import ScoringSettings
from nnunetv2_mgml.scoring.info import EvaluationInfo
from nnunetv2_mgml.scoring.regions import label_set
from nnunetv2_mgml.scoring.results import Evaluation, build_evaluation, load_evaluation, save_evaluation

DATASET: dict[str, Any] = {
    "channel_names": {"0": "DWI", "1": "ADC", "2": "FLAIR"},
    "numTraining": 1,
    "labels": {"background": 0, "lesion": [1, 2], "core": [2]},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}
SHAPE = (12, 20, 24)
"""Voxels, axis order z, y, x."""


def score(case: int, subset: tuple[bool, ...], region: str) -> float:
    """Rises with the number of modalities and the case number; a core is harder."""
    return 0.3 + 0.15 * sum(subset) + 0.02 * case + 0.01 * subset[0] - 0.1 * (region == "core")


def write_evaluation(
    folder: Path,
    cases: list[str],
    dataset: dict[str, Any] = DATASET,
    info: dict[str, Any] | None = None,
    subsets: list[tuple[bool, ...]] | None = None,
) -> Evaluation:
    """Write ``results.csv`` and ``summary.json`` with made-up scores."""
    channels = channel_names(dataset)
    settings = ScoringSettings(label_set(dataset), metrics=("dice", "hd95"))
    subsets = subsets or all_subsets(len(channels))
    names = [subset_name(s, channels) for s in subsets]
    scores = {
        case: {
            name: {
                region: {"dice": score(i, s, region), "hd95": 10 * (1 - score(i, s, region))}
                for region in settings.label_set.regions
            }
            for s, name in zip(subsets, names, strict=True)
        }
        for i, case in enumerate(cases)
    }
    evaluation = build_evaluation("ours", scores, names, channels, settings, EvaluationInfo.from_dict(info or {}))
    save_evaluation(evaluation, folder)
    return load_evaluation(folder)


def write_volumes(root: Path, evaluation_folder: Path, cases: list[str], dataset: dict[str, Any] = DATASET) -> None:
    """Write ``root/imagesTs``, ``root/labelsTs``, ``root/dataset.json`` and the evaluation's ``predictions``."""
    channels = channel_names(dataset)
    (root / "dataset.json").write_text(json.dumps(dataset))
    z, y, x = np.indices(SHAPE) - np.array(SHAPE).reshape(3, 1, 1, 1) / 2
    head = (z / 6) ** 2 + (y / 9) ** 2 + (x / 11) ** 2 < 1
    for number, case in enumerate(cases):
        truth = np.zeros(SHAPE, np.uint8)
        truth[4:8, 6:12, 8 + number : 15 + number] = 1
        truth[5:7, 8:10, 10 + number : 12 + number] = 2
        for channel in range(len(channels)):
            image = head * (200 + 60 * truth + channel * 5 * x)
            write(root / "imagesTs" / f"{case}_{channel:04d}.nii.gz", image.astype(np.int16))
        write(root / "labelsTs" / f"{case}.nii.gz", truth)
        for subset in all_subsets(len(channels)):
            shifted = np.roll(truth, len(channels) - sum(subset), 1)
            write(evaluation_folder / "predictions" / subset_name(subset, channels) / f"{case}.nii.gz", shifted)


def write(path: Path, volume: np.ndarray) -> Path:
    """Write a volume with 1 x 1 x 2.5 mm voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing([1.0, 1.0, 2.5])
    sitk.WriteImage(image, str(path))
    return path
