"""A dataset planned by nnU-Net for the tests of `mgml plan`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import BRATS_JSON
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

DATASET = "Dataset137_Tiny"


def nnunet_plans(
    root: Path,
    planner: type = ExperimentPlanner,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    shape: tuple[int, ...] = (140, 170, 140),
    gpu: float = 8,
) -> dict:
    """Plans as nnU-Net's planner writes them, from a fingerprint; the images are never opened."""
    raw, preprocessed = root / "raw" / DATASET, root / "preprocessed" / DATASET
    for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
        folder.mkdir(parents=True, exist_ok=True)
    for case in ("a", "b"):
        (raw / "labelsTr" / f"{case}.nii.gz").touch()
        for channel in range(4):
            (raw / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
    dataset_json = {**BRATS_JSON, "overwrite_image_reader_writer": "SimpleITKIO"}
    (raw / "dataset.json").write_text(json.dumps(dataset_json))
    fingerprint = {
        "spacings": [list(spacing)] * 2,
        "shapes_after_crop": [list(shape)] * 2,
        "median_relative_size_after_cropping": 0.3,
        "foreground_intensity_properties_per_channel": {},
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    with pytest.MonkeyPatch.context() as patch:
        # memory by the number of voxels: fast, since no network is built, and what it decides is the patch size only
        patch.setattr(
            planner,
            "static_estimate_VRAM_usage",
            staticmethod(lambda size, *_: float(np.prod(size)) * (300 if len(size) == 3 else 20000)),
        )
        planner(DATASET, gpu_memory_target_in_gb=gpu, plans_name="nnUNetPlans").plan_experiment()
    return json.loads((preprocessed / "nnUNetPlans.json").read_text())


def plans_that_inherit(root: Path) -> dict:
    """Plan the dataset in ``root`` and add two configurations that inherit; the file and the plans returned agree."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        plans = nnunet_plans(root)
    plans["configurations"]["3d_bs4"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    plans["configurations"]["3d_small"] = {"inherits_from": "3d_bs4", "patch_size": [64, 64, 64]}
    (root / "preprocessed" / DATASET / "nnUNetPlans.json").write_text(json.dumps(plans, indent=4))
    return plans


def resolved(plans: dict, name: str) -> dict:
    return PlansManager(plans).get_configuration(name).configuration
