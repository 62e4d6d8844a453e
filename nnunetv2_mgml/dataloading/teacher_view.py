"""The teacher's own, stronger intensity augmentation (section 3.3; off by default, ``teacher_augmentation``).

Geometry stays as it is: the teacher's prediction is compared voxel by voxel with the student's.
"""

from __future__ import annotations

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform


def stronger_intensity_transforms() -> BasicTransform:
    """Return nnU-Net's intensity transforms with twice its ranges and every one applied half of the time."""
    strong = BGContrast((0.5, 1.5))
    transforms = [
        MultiplicativeBrightnessTransform(multiplier_range=strong, synchronize_channels=False, p_per_channel=1),
        ContrastTransform(contrast_range=strong, preserve_range=True, synchronize_channels=False, p_per_channel=1),
        GammaTransform(gamma=BGContrast((0.5, 2.0)), p_invert_image=0, synchronize_channels=False, p_per_channel=1,
                       p_retain_stats=1),
        GaussianNoiseTransform(noise_variance=(0, 0.2), p_per_channel=1, synchronize_channels=True),
    ]
    return ComposeTransforms([RandomTransform(t, apply_probability=0.5) for t in transforms])


def teacher_view(data: torch.Tensor, num_modalities: int, transforms: BasicTransform) -> torch.Tensor:
    """Return an augmented copy of a batch.

    Args:
        data: ``(B, M + P, *spatial)``; previous-stage channels after the first ``M`` are left as they are.
        num_modalities: ``M``.
        transforms: from `stronger_intensity_transforms`.

    Returns:
        ``data``'s shape and dtype; the input is not changed.
    """
    view = data.clone()
    for sample in view:
        sample[:num_modalities] = transforms(image=sample[:num_modalities].clone())["image"]
    return view
