"""The paper's augmentation (section 4.1, ``augmentation=paper``) in place of nnU-Net's: rotation, intensity, flips.

The text gives "random rotations (up to 10 degrees), intensity changes with a scale of (0.1, 0.1), and random flipping".
What it leaves open follows the RFNet family's transforms, from which it stems: one plane per sample, a scale and a
shift drawn anew for every channel, each axis flipped half of the time. Differs from them in the interpolation (linear,
not nearest), in one intensity change per channel instead of one per slice, and in the background staying 0, as nnU-Net
keeps it. Everything after the augmentation (masks, regions, deep supervision) is nnU-Net's validation pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from numpy.typing import NDArray

ROTATION = np.deg2rad(10.0)
"""Largest angle, radians."""
SCALE = SHIFT = 0.1
"""A channel is multiplied by U(1 - SCALE, 1 + SCALE), then U(-SHIFT, SHIFT) standard deviations are added."""


class OneAxisRotation:
    """Angles for `SpatialTransform`, which asks for each axis in turn: one axis gets U(-limit, limit), the others 0.

    Args:
        limit: radians.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._axis = 0

    def __call__(self, image: torch.Tensor, dim: int) -> float:
        """Return the angle of axis ``dim`` for ``image (C, *spatial)``; in 2D only the last one is used."""
        axes = image.ndim - 1
        if dim == 0:
            self._axis = int(np.random.randint(axes)) if axes == 3 else axes - 1
        return float(np.random.uniform(-self.limit, self.limit)) if dim == self._axis else 0.0


class ScaleAndShift(ImageOnlyTransform):  # type: ignore[misc]  # batchgeneratorsv2 ships no types
    """Multiply every channel by a factor of its own and add an offset of its own; labels are left alone.

    Args:
        scale: factors are U(1 - scale, 1 + scale).
        shift: offsets are U(-shift, shift), in units of the normalised image.
    """

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale = scale
        self.shift = shift

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        """Draw a factor and an offset per channel of ``image (C, *spatial)``."""
        channels = len(data_dict["image"])
        return {
            "factors": np.random.uniform(1 - self.scale, 1 + self.scale, channels),
            "offsets": np.random.uniform(-self.shift, self.shift, channels),
        }

    def _apply_to_image(self, img: torch.Tensor, **params: Any) -> torch.Tensor:
        factors, offsets = (
            torch.as_tensor(params[name], dtype=img.dtype).reshape(-1, *[1] * (img.ndim - 1))
            for name in ("factors", "offsets")
        )
        return img * factors + offsets


def initial_patch_size(patch_size: Sequence[int], dummy_2d: bool) -> NDArray[np.int_]:
    """Return the voxels to load per axis, so that a patch rotated by up to `ROTATION` has no empty corners.

    Args:
        patch_size: the network's input, voxels, plan axis order.
        dummy_2d: rotate within the last two axes only.
    """
    inside = range(1 if dummy_2d else 0, len(patch_size))
    cos, sin = np.cos(ROTATION), np.sin(ROTATION)
    size = [
        max(n, *(n * cos + patch_size[j] * sin for j in inside if j != i)) if i in inside else n
        for i, n in enumerate(patch_size)
    ]
    return np.ceil(size).astype(int)


def paper_training_transforms(
    patch_size: Sequence[int],
    rotation_for_DA: Any,  # noqa: N803  nnU-Net's names
    deep_supervision_scales: Any,
    mirror_axes: Sequence[int] | None,
    do_dummy_2d_data_aug: bool,
    use_mask_for_norm: Sequence[bool] | None = None,
    is_cascaded: bool = False,
    foreground_labels: Any = None,
    regions: Any = None,
    ignore_label: int | None = None,
) -> BasicTransform:
    """Return the training transforms; the arguments are those of nnU-Net's ``get_training_transforms``."""
    transforms: list[BasicTransform] = [
        SpatialTransform(
            patch_size[1:] if do_dummy_2d_data_aug else patch_size,
            patch_center_dist_from_border=0,
            random_crop=False,
            p_rotation=1,
            rotation=rotation_for_DA,
            border_mode_seg="constant",
            padding_value_seg=-1,
        )
    ]
    if do_dummy_2d_data_aug:
        transforms = [Convert3DTo2DTransform(), *transforms, Convert2DTo3DTransform()]
    transforms.append(ScaleAndShift(SCALE, SHIFT))
    if mirror_axes:
        transforms.append(MirrorTransform(allowed_axes=tuple(mirror_axes)))
    if use_mask_for_norm is not None and any(use_mask_for_norm):
        transforms.append(MaskImageTransform(apply_to_channels=[i for i, used in enumerate(use_mask_for_norm) if used]))
    transforms.append(
        nnUNetTrainer.get_validation_transforms(
            deep_supervision_scales, is_cascaded, foreground_labels, regions, ignore_label
        )
    )
    return ComposeTransforms(transforms)
