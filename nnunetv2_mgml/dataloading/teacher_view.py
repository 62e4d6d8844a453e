"""The teacher's own, stronger intensity augmentation (section 3.3; off by default, ``teacher_augmentation``).

Geometry stays as it is: the teacher's prediction is compared voxel by voxel with the student's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform


def stronger_intensity_transforms() -> BasicTransform:
    """Return brightness, contrast, gamma and noise, stronger than nnU-Net's, every one applied half of the time.

    The ranges are twice nnU-Net's, but for the lower end of gamma: 0.5 where nnU-Net has 0.7, the inverse of the upper
    end. Its blur, low resolution and inverted gamma are not among them.
    """
    strong = BGContrast((0.5, 1.5))
    transforms = [
        MultiplicativeBrightnessTransform(multiplier_range=strong, synchronize_channels=False, p_per_channel=1),
        ContrastTransform(contrast_range=strong, preserve_range=True, synchronize_channels=False, p_per_channel=1),
        GammaTransform(
            gamma=BGContrast((0.5, 2.0)),
            p_invert_image=0,
            synchronize_channels=False,
            p_per_channel=1,
            p_retain_stats=1,
        ),
        GaussianNoiseTransform(noise_variance=(0, 0.2), p_per_channel=1, synchronize_channels=True),
    ]
    return ComposeTransforms([RandomTransform(t, apply_probability=0.5) for t in transforms])


def teacher_view(
    data: torch.Tensor, num_modalities: int, transforms: BasicTransform, use_mask_for_norm: Sequence[bool]
) -> torch.Tensor:
    """Return an augmented copy of a batch, in which the background stays 0 where nnU-Net keeps it 0.

    Args:
        data: ``(B, M + P, *spatial)``; previous-stage channels after the first ``M`` are left as they are.
        num_modalities: ``M``.
        transforms: from `stronger_intensity_transforms`.
        use_mask_for_norm: of the plans, one per modality; where True, voxels that are 0 in ``data`` stay 0.

    Returns:
        ``data``'s shape and dtype; the input is not changed.
    """
    view = data.clone()
    for sample in view:
        sample[:num_modalities] = transforms(image=sample[:num_modalities].clone())["image"]
    masked = [m for m in range(num_modalities) if use_mask_for_norm[m]]
    view[:, masked] = torch.where(data[:, masked] == 0, 0, view[:, masked])
    return view
