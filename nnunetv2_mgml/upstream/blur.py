"""nnU-Net's blur, without a stopwatch.

Bends: ``GaussianBlurTransform.benchmark`` of batchgeneratorsv2, in the transforms nnU-Net has made.
Why: it takes FFT or convolution, whichever it timed faster; the two round differently, so that runs would not repeat.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms


def stop_timing(transforms: ComposeTransforms) -> None:
    """Let every blur among nnU-Net's transforms always convolve, in place."""
    for transform in transforms.transforms:
        inner = getattr(transform, "transform", transform)  # out of its RandomTransform
        if isinstance(inner, GaussianBlurTransform):
            inner.benchmark = False
