"""nnU-Net's augmentation or the paper's: what the two hooks nnU-Net has for it return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from nnunetv2_mgml.dataloading.paper_augmentation import (
    ROTATION,
    OneAxisRotation,
    initial_patch_size,
    paper_training_transforms,
)
from nnunetv2_mgml.plans.options import TrainingOptions
from nnunetv2_mgml.upstream.blur import stop_timing

SpatialChoices = tuple[Any, bool, Any, Any]
"""What nnU-Net's hook returns: rotation, whether slices are augmented in 2D, voxels to load per axis, mirror axes."""


def spatial_choices(options: TrainingOptions, patch_size: Sequence[int], stock: SpatialChoices) -> SpatialChoices:
    """Return nnU-Net's choices, or the paper's rotation and the patch it needs; flips of all axes in both.

    Args:
        options: ``augmentation``.
        patch_size: the network's input, voxels, plan axis order.
        stock: nnU-Net's.
    """
    if options.augmentation != "paper":
        return stock
    _, dummy_2d, _, mirror_axes = stock
    return OneAxisRotation(ROTATION), dummy_2d, initial_patch_size(patch_size, dummy_2d), mirror_axes


def training_transforms(
    options: TrainingOptions, stock: Callable[..., ComposeTransforms], *args: Any, **kwargs: Any
) -> BasicTransform:
    """Return nnU-Net's transforms, or the paper's; with ``deterministic`` none of them decides by the clock.

    Args:
        options: ``augmentation`` and ``deterministic``.
        stock: nnU-Net's ``get_training_transforms``, of which the rest are the arguments.
    """
    if options.augmentation == "paper":
        return paper_training_transforms(*args, **kwargs)
    transforms = stock(*args, **kwargs)
    if options.deterministic:
        stop_timing(transforms)
    return transforms
