"""nnU-Net's augmentation or the paper's, through the two hooks nnU-Net has for it."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_mgml.dataloading.paper_augmentation import (
    ROTATION,
    OneAxisRotation,
    initial_patch_size,
    paper_training_transforms,
)
from nnunetv2_mgml.plans.options import Options


class AugmentationTrainer(nnUNetTrainer):
    """nnU-Net's trainer that reads ``augmentation`` from the ``options`` its subclass sets."""

    options: Options

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:  # noqa: N802
        """nnU-Net's choices, or the paper's rotation and the patch it needs; flips of all axes in both."""
        rotation, dummy_2d, size, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.options.training.augmentation == "paper":
            rotation = OneAxisRotation(ROTATION)
            size = initial_patch_size(self.configuration_manager.patch_size, dummy_2d)
        return rotation, dummy_2d, size, mirror_axes

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's transforms, or the paper's; with ``deterministic`` none of them decides by the clock."""
        if self.options.training.augmentation == "paper":
            return paper_training_transforms(*args, **kwargs)
        transforms = super().get_training_transforms(*args, **kwargs)
        if self.options.training.deterministic:
            stop_timing(transforms)
        return transforms


def stop_timing(transforms: ComposeTransforms) -> None:
    """Let nnU-Net's blur always convolve, in place; by default it takes FFT or convolution, whichever it timed faster.

    The two round differently, so that runs would not repeat.
    """
    for transform in transforms.transforms:
        inner = getattr(transform, "transform", transform)  # out of its RandomTransform
        if isinstance(inner, GaussianBlurTransform):
            inner.benchmark = False
