"""A tiny trained model (random weights) and NIfTI cases for the inference tests."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from kept_model_cases import FIXTURE, MODEL
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.inference.arrays import prepare_named
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.upstream.registration import add_ext_dir

CHANNELS = ("t1", "t1ce", "t2", "flair")
SHAPE = (20, 18, 22)
"""Voxels, axis order z, y, x; larger than the 16^3 patch, so that the sliding window moves."""


def write_model(
    folder: Path,
    trainer: str = "nnUNetTrainerMGML",
    folds: Iterable[int] = (0,),
    *,
    cascade: bool = False,
    normalization: str = "ZScoreNormalization",
    options: Mapping[str, Any] | None = None,
    stages: int = 2,
) -> Path:
    """Write what nnU-Net's predictor reads of a trained model; every region is predicted somewhere."""
    plans = builders.plans(stages=stages)
    config = {"width_factor": 1.0, "decoder_width_ratio": 1.0, "fusion": "concat", **(options or {})}
    plans["mgml"] = {"config": config, "num_classes": 4}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["normalization_schemes"] = [normalization] * 4
    for statistics in plans["foreground_intensity_properties_per_channel"].values():
        statistics.update(mean=200.0, std=100.0, percentile_00_5=0.0, percentile_99_5=400.0)
    dataset_json = copy.deepcopy(builders.BRATS_JSON)
    if cascade:
        configuration["previous_stage"] = "3d_lowres"
        dataset_json["labels"], dataset_json["regions_class_order"] = {"background": 0, "a": 1, "b": 2}, None
        plans["mgml"]["num_classes"] = 3
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    (folder / "plans.json").write_text(json.dumps(plans))
    for fold in folds:
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            {
                "network_weights": _weights(trainer, json.dumps(plans), json.dumps(dataset_json), fold),
                "trainer_name": trainer,
                "init_args": {"configuration": "3d_fullres"},
                "inference_allowed_mirroring_axes": (0, 1, 2),
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


@functools.cache
def _weights(trainer: str, plans: str, dataset: str, seed: int) -> dict[str, torch.Tensor]:
    add_ext_dir()
    manager, dataset_json = PlansManager(json.loads(plans)), json.loads(dataset)
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(seed)
    network = recursive_find_trainer_class_by_name(trainer).build_network_architecture(
        manager,
        configuration,
        determine_num_input_channels(manager, configuration, dataset_json),
        manager.get_label_manager(dataset_json).num_segmentation_heads,
        enable_deep_supervision=False,
    )
    for parameter in network.parameters():  # trained biases are not zero
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return network.state_dict()


def image(channel: int, seed: int = 0, shape: tuple[int, ...] = SHAPE, margin: int = 2) -> np.ndarray:
    """A random positive volume, int16, zero within ``margin`` voxels of the border (the same for all channels)."""
    volume = np.zeros(shape, dtype=np.int16)
    inside = tuple(slice(margin, n - margin) for n in shape)
    volume[inside] = np.random.default_rng([seed, channel]).integers(1, 400, size=volume[inside].shape)
    return volume


def write_image(
    path: Path, volume: np.ndarray, spacing: float = 1.0, origin: float = 0.0, direction: np.ndarray | None = None
) -> Path:
    """Write a volume with the given geometry (mm, the same on all axes)."""
    picture = sitk.GetImageFromArray(volume)
    picture.SetSpacing((spacing,) * 3)
    picture.SetOrigin((origin,) * 3)
    picture.SetDirection((np.eye(3) if direction is None else direction).ravel())
    sitk.WriteImage(picture, str(path))
    return path


def write_case(folder: Path, name: str, present: Iterable[int] = range(4), seed: int = 0) -> dict[int, Path]:
    """Write ``name_XXXX.nii.gz`` for the given channels."""
    folder.mkdir(exist_ok=True, parents=True)
    return {c: write_image(folder / f"{name}_{c:04d}.nii.gz", image(c, seed)) for c in present}


def run(the_predictor: MGMLPredictor, source: Any, target: Path, **kwargs: Any) -> dict[str, bytes]:
    """Predict without worker processes and return the segmentation files."""
    the_predictor.predict_from_files_sequential(source, target, **kwargs)
    return segmentations(target)


def segmentations(folder: Path) -> dict[str, bytes]:
    """Return the content of the segmentation files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.nii.gz"))}


def report(folder: Path, name: str = "mgml_prediction.json") -> dict[str, Any]:
    """Read the report a prediction wrote."""
    return json.loads((folder / name).read_text())


def load(path: Path | str) -> np.ndarray:
    """Read a label map ``(z, y, x)``."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def predictor(model: Path, missing: Any = ("auto",), folds: Any = (0,), **kwargs: Any) -> MGMLPredictor:
    """A predictor on the CPU, without mirroring or progress bar unless asked for."""
    kwargs = {"use_mirroring": False, "allow_tqdm": False, "device": torch.device("cpu"), **kwargs}
    result = MGMLPredictor(missing_modalities=missing, **kwargs)
    result.initialize_from_trained_model_folder(str(model), folds)
    return result


def item_of(the_predictor: MGMLPredictor, images: dict[str, np.ndarray]) -> dict[str, Any]:
    """Preprocess arrays given by modality name."""
    return prepare_named("p", images, {"spacing": [1.0] * 3}, None, ["auto"], the_predictor.model)


def predict_kept(images: Path, *options: str) -> int:
    """Type ``mgml predict`` with the kept model, output beside the images in ``OUT``; return the exit code."""
    command = ["predict", "-i", str(images), "-o", str(images.parent / "OUT"), "-m", str(FIXTURE / MODEL), "-f", "0"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "-device", "cpu", "--disable_tta", "-npp", "0", "-nps", "0", *options])
    return int(stopped.value.code or 0)
