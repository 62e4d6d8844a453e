"""Label maps, prediction folders and finished evaluations for the evaluation tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.scoring.results import COLUMNS, Evaluation

CHANNELS = ("t1", "t1ce", "t2", "flair")
REGIONS = {"whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)}
NAMES = [subset_name(s, CHANNELS) for s in all_subsets(4)]
DATASET_JSON: dict[str, Any] = {
    "channel_names": dict(enumerate(CHANNELS)),
    "file_ending": ".nii.gz",
    "regions_class_order": [1, 2, 3],
    "labels": {"background": 0, **{name: list(labels) for name, labels in REGIONS.items()}},
}


def write_labels(
    path: Path,
    labels: np.ndarray,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    origin: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> Path:
    """Write a label map; spacing and origin in mm, (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = sitk.GetImageFromArray(labels)
    picture.SetSpacing(spacing)
    picture.SetOrigin(origin)
    sitk.WriteImage(picture, str(path))
    return path


def random_labels(seed: int, shape: tuple[int, ...] = (8, 9, 10), highest: int = 3) -> np.ndarray:
    """Noise of labels 0 to ``highest``, uint8."""
    return np.random.default_rng(seed).integers(0, highest + 1, size=shape, dtype=np.uint8)


def write_study(
    root: Path, cases: int = 3, subsets: Iterable[str] = ("t1", "flair"), dataset_json: dict[str, Any] | None = None
) -> Path:
    """Write ``labels/``, ``predictions/<subset>/`` and ``dataset.json``; returns the root."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(dataset_json or DATASET_JSON))
    for case in range(cases):
        write_labels(root / "labels" / f"case_{case}.nii.gz", random_labels(case))
        for number, subset in enumerate(subsets):
            write_labels(root / "predictions" / subset / f"case_{case}.nii.gz", random_labels(100 * number + case + 10))
    return root


def synthetic_evaluation(
    name: str = "A",
    shift: float = 0.0,
    cases: int = 12,
    seed: int = 0,
    policy: str = "brats",
    metrics: Iterable[str] = ("dice", "hd95"),
    channels: tuple[str, ...] = CHANNELS,
) -> Evaluation:
    """An evaluation of random values; ``shift`` is added to every Dice, so pairs differ by exactly that."""
    rng = np.random.default_rng(seed)
    names = [subset_name(s, channels) for s in all_subsets(len(channels))]
    rows = [
        (
            f"case_{c:02d}",
            subset,
            region,
            metric,
            rng.uniform(0.3, 0.8) + shift if metric == "dice" else rng.uniform(1, 20),
        )
        for c in range(cases)
        for subset in names
        for region in REGIONS
        for metric in metrics
    ]
    return Evaluation(name, pd.DataFrame(rows, columns=list(COLUMNS)), channels, dict(REGIONS), policy)
