"""Small plans, datasets and networks for tests; nothing here needs data on disk unless it says so."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.objective import Options, needs_of

REGIONS = {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3]}
BRATS_JSON: dict[str, Any] = {
    "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"},
    "labels": REGIONS,
    "regions_class_order": [1, 2, 3],
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def configuration(
    patch: tuple[int, ...] = (16, 16, 16),
    modalities: int = 4,
    stages: int = 3,
    strides: list[list[int]] | None = None,
    kernels: list[list[int]] | None = None,
    residual: bool = False,
    widths: list[int] | None = None,
) -> dict[str, Any]:
    """A plans configuration as nnU-Net writes it."""
    dimension = len(patch)
    conv = f"torch.nn.modules.conv.Conv{dimension}d"
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    unet = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "data_identifier": f"nnUNetPlans_{dimension}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "spacing": [1.0] * dimension,
        "batch_dice": False,
        "median_image_size_in_voxels": [24.0] * dimension,
        "normalization_schemes": ["ZScoreNormalization"] * modalities,
        "use_mask_for_norm": [True] * modalities,
        **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in ("data", "seg", "probabilities")},
        **{
            f"resampling_fn_{kind}_kwargs": {
                "is_seg": kind == "seg",
                "order": 1,
                "order_z": 0,
                "force_separate_z": None,
            }
            for kind in ("data", "seg", "probabilities")
        },
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{unet}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": widths or [8 * 2**s for s in range(stages)],
                "conv_op": conv,
                "kernel_sizes": kernels or [[3] * dimension] * stages,
                "strides": strides or [[1] * dimension] + [[2] * dimension] * (stages - 1),
                blocks: [1] * stages,
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


def plans(name: str = "Dataset900_Phantom", **kwargs: Any) -> dict[str, Any]:
    """A whole plans dict with one configuration, ``3d_fullres`` or ``2d``."""
    config = configuration(**kwargs)
    key = "3d_fullres" if len(config["patch_size"]) == 3 else "2d"
    channels = len(config["normalization_schemes"])
    statistics = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    return {
        "dataset_name": name,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [24, 24, 24],
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "configurations": {key: config},
        "foreground_intensity_properties_per_channel": {str(c): dict(statistics) for c in range(channels)},
    }


def options_with(**changes: Any) -> Options:
    """The default options with some changed, by their flat names."""
    return Options().updated(changes)


def network(
    config: Options | None = None,
    heads: int = 3,
    classes: int = 4,
    extra_channels: int = 0,
    deep_supervision: bool = False,
    **kwargs: Any,
) -> MultiEncoderUNet:
    """A small network; ``kwargs`` go to `configuration`."""
    manager = ConfigurationManager(configuration(**kwargs))
    modalities = len(manager.normalization_schemes)
    config = config or options_with(fusion="concat", width_factor=1.0)
    return build_network(
        manager,
        config.network,
        modalities + extra_channels,
        heads,
        classes,
        deep_supervision,
        needs_of(config),
    )


def write_dataset(
    root: Path,
    dataset_json: dict[str, Any] | None = None,
    cases: int = 2,
    plans_dict: dict[str, Any] | None = None,
    shape: tuple[int, int, int] = (20, 22, 24),
    absent: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Write a preprocessed dataset with blob tumours; each region is bright in a modality of its own.

    Args:
        root: folder with ``preprocessed`` in it (the ``nnunet_folders`` fixture).
        dataset_json: labels and channels; BraTS regions by default.
        cases: number of cases ``case_0``, ...
        plans_dict: from `plans`.
        shape: voxels, axis order z, y, x.
        absent: case -> channel that is empty in it.

    Returns:
        The plans dict as written.
    """
    dataset_json = dataset_json or BRATS_JSON
    plans_dict = plans_dict or plans()
    base = root / "preprocessed" / plans_dict["dataset_name"]
    (base / "gt_segmentations").mkdir(parents=True)
    (config,) = plans_dict["configurations"].values()
    folder = base / config["data_identifier"]
    folder.mkdir()
    channels = len(dataset_json["channel_names"])
    values = [v for name, v in dataset_json["labels"].items() if name not in ("background", "ignore")]
    locations_of = [tuple(v) if isinstance(v, list) else v for v in values]
    for index in range(cases):
        name, rng = f"case_{index}", np.random.default_rng(index)
        seg = blob_labels(rng, shape)
        data = rng.normal(scale=0.3, size=(channels, *shape)).astype(np.float32)
        for c in range(channels):
            data[c] += 2 * (seg > c % 3)
        if absent and name in absent:
            data[absent[name]] = 0
        present = int(np.max([np.max(v) for v in values]))
        seg = np.minimum(seg, present)
        where = {region: np.argwhere(np.isin(seg[None], region)) for region in locations_of}
        properties = {
            "class_locations": where,
            "spacing": [1.0] * 3,
            "shape_before_cropping": shape,
            "bbox_used_for_cropping": [[0, n] for n in shape],
            "shape_after_cropping_and_before_resampling": shape,
            "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())},
        }
        nnUNetDatasetBlosc2.save_case(
            data, seg[None].astype(np.int16), properties, str(folder / name), chunks=(1, *shape), blocks=(1, 10, 11, 12)
        )
        sitk.WriteImage(sitk.GetImageFromArray(seg), str(base / "gt_segmentations" / f"{name}.nii.gz"))
    names = [f"case_{i}" for i in range(cases)]
    for file, content in (
        ("dataset.json", dataset_json),
        ("dataset_fingerprint.json", {}),
        (f"{plans_dict['plans_name']}.json", plans_dict),
        ("splits_final.json", [{"train": names, "val": names}]),
    ):
        (base / file).write_text(json.dumps(content))
    return plans_dict


def blob_labels(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Three nested balls (labels 1, 2, 3 from outside in), uint8, axis order z, y, x."""
    centre = np.array(shape) / 2 + rng.uniform(-2, 2, size=3)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)))
    return (distance < 7.0).astype(np.uint8) + (distance < 5.0) + (distance < 3.0)


def make_trainer(
    cls: type[Any],
    plans_dict: dict[str, Any],
    options: dict[str, Any] | None = None,
    dataset_json: dict[str, Any] | None = None,
    resume: bool = False,
    fold: int | str = 0,
) -> Any:
    """Instantiate a trainer on the CPU as nnU-Net's run_training does."""
    plans_dict = copy.deepcopy(plans_dict)
    plans_dict["continue_training"] = resume
    plans_dict["mgml"] = {"config": {**TINY, **(options or {})}}
    key = next(iter(plans_dict["configurations"]))
    return cls(plans_dict, key, fold, copy.deepcopy(dataset_json or BRATS_JSON), torch.device("cpu"))


TINY: dict[str, Any] = {
    "num_epochs": 3,
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
    "width_factor": 1.0,
    "fusion": "concat",
    "seed": 5,
}
