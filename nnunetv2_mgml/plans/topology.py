"""A new patch size for a configuration of nnU-Net's plans, with the topology its planner gives it; other widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, overload

MIN_FEATURE_MAP = 4
"""Smallest edge of a bottleneck in voxels (``UNet_featuremap_min_edge_length`` of nnU-Net's planners)."""

MIN_STAGES = 3
"""With two, deep supervision has one output, and nnU-Net gives the last one weight zero: 0 / 0."""

_NO_LIMIT = 999999


def replan(configuration: dict[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
    """Return the entries of a configuration that another patch size changes.

    Args:
        configuration: resolved configuration (``inherits_from`` applied); not changed.
        patch_size: voxels, in the axis order of the plan (that of its spacing).

    Returns:
        ``patch_size`` and ``architecture``, JSON-ready. Strides, kernels and the number of stages are nnU-Net's for
        this patch and the plan's spacing. Lists with an entry per stage are cut, or extended: features by their
        maximum, numbers of convolutions by their last value.

    Raises:
        ValueError: wrong number of axes, a size the topology cannot divide, or one too small for it.
    """
    spacing = configuration["spacing"]
    if len(patch_size) != len(spacing):
        raise ValueError(
            f"patch_size {list(patch_size)} has {len(patch_size)} axes, this configuration has {len(spacing)}."
        )
    architecture = copy.deepcopy(configuration["architecture"])
    kwargs = architecture["arch_kwargs"]
    missing = sorted({"strides", "kernel_sizes", "features_per_stage", "n_conv_per_stage_decoder"} - set(kwargs))
    if missing:
        raise ValueError(
            f"patch_size can only be changed for U-Nets planned by nnU-Net; the architecture "
            f"{architecture['network_class_name']} has no {', '.join(missing)}."
        )
    strides, kernels, padded = _topology(spacing, patch_size)
    if padded != list(patch_size):
        raise ValueError(
            f"patch_size {list(patch_size)} cannot be divided as its network needs. "
            f"Nearest allowed size: {nearest_allowed_size(spacing, patch_size)}."
        )
    stages = len(strides)
    if stages < MIN_STAGES:
        raise ValueError(
            f"patch_size {list(patch_size)} leaves a network of {stages} stages; at least {MIN_STAGES} "
            f"are needed: use at least {MIN_FEATURE_MAP * 2 ** (MIN_STAGES - 1)} voxels along the axes "
            f"of finest spacing."
        )
    kwargs.update(n_stages=stages, strides=strides, kernel_sizes=kernels)
    kwargs["features_per_stage"] = _resize(kwargs["features_per_stage"], stages, max)
    for key in ("n_conv_per_stage", "n_blocks_per_stage"):
        if key in kwargs:
            kwargs[key] = _resize(kwargs[key], stages, _last)
    kwargs["n_conv_per_stage_decoder"] = _resize(kwargs["n_conv_per_stage_decoder"], stages - 1, _last)
    return {"patch_size": list(patch_size), "architecture": architecture}


def with_features(configuration: dict[str, Any], features: float | Sequence[int]) -> dict[str, Any]:
    """Return the entry of a configuration that other feature channels change.

    Args:
        configuration: resolved configuration (``inherits_from`` applied); not changed.
        features: channels of every stage, or a multiple of the configuration's own (see `scaled_widths`).

    Returns:
        ``architecture``, JSON-ready; a residual encoder's ``stem_channels`` are multiplied too.

    Raises:
        ValueError: not one number for each stage, or an architecture without ``features_per_stage``.
    """
    architecture = copy.deepcopy(configuration["architecture"])
    kwargs = architecture["arch_kwargs"]
    if "features_per_stage" not in kwargs:
        raise ValueError(
            f"features_per_stage can only be changed for U-Nets planned by nnU-Net; the architecture "
            f"{architecture['network_class_name']} has none."
        )
    if isinstance(features, (int, float)):
        scale_features(kwargs, features)
        return {"architecture": architecture}
    if len(features) != kwargs["n_stages"]:
        raise ValueError(
            f"features_per_stage {list(features)} has {len(features)} numbers; the network has {kwargs['n_stages']} "
            f"stages. Give one for each, or a factor such as 0.5."
        )
    kwargs["features_per_stage"] = list(features)
    return {"architecture": architecture}


def scale_features(arch_kwargs: dict[str, Any], factor: float) -> None:
    """Make the U-Net of these arguments ``factor`` times as wide, in place: its stages, and its stem if it has one."""
    for key in ("features_per_stage", "stem_channels"):
        if arch_kwargs.get(key) is not None:
            arch_kwargs[key] = scaled_widths(arch_kwargs[key], factor)


@overload
def scaled_widths(widths: int, factor: float) -> int: ...


@overload
def scaled_widths(widths: list[int], factor: float) -> list[int]: ...


def scaled_widths(widths: list[int] | int, factor: float) -> list[int] | int:
    """Return feature channels times ``factor``, each rounded to the nearest multiple of 8, at least 8."""
    if isinstance(widths, int):
        return max(8, round(widths * factor / 8) * 8)
    return [max(8, round(w * factor / 8) * 8) for w in widths]


def nearest_allowed_size(spacing: Sequence[float], patch_size: Sequence[int]) -> list[int]:
    """Return an allowed patch size near a wanted one.

    Args:
        spacing: mm, in the axis order of the patch.
        patch_size: voxels.
    """
    size = list(patch_size)
    for axis, wanted in enumerate(patch_size):
        for candidate in sorted(range(1, 2 * max(wanted, MIN_FEATURE_MAP) + 1), key=lambda n: abs(n - wanted)):
            size[axis] = candidate
            if _topology(spacing, size)[2][axis] == candidate:
                break
    # which axes are halved depends on all of them together, so what fits one by one may need padding after all
    padded = [_topology(spacing, start)[2] for start in (size, patch_size)]
    return min(padded, key=lambda p: sum(abs(a - b) for a, b in zip(p, patch_size, strict=True)))


def smaller_patches(configuration: dict[str, Any]) -> Iterator[list[int]]:
    """Yield ever smaller allowed patch sizes, as nnU-Net's planner shrinks them.

    The axis that is longest in mm gets shorter by the least the network can divide, until one has too few stages.

    Args:
        configuration: resolved configuration.
    """
    spacing, size = configuration["spacing"], list(configuration["patch_size"])
    while True:
        strides = _topology(spacing, size)[0]
        divisors = [math.prod(stride[axis] for stride in strides) for axis in range(len(size))]
        axis = max(range(len(size)), key=lambda axis: size[axis] * spacing[axis])
        if size[axis] <= divisors[axis]:
            return
        size[axis] -= divisors[axis]
        strides, _, size = _topology(spacing, size)
        if len(strides) < MIN_STAGES:
            return
        yield list(size)


def _topology(
    spacing: Sequence[float],
    patch_size: Sequence[int],
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return strides and kernel sizes per stage, and the patch size padded to what they can divide."""
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    _, strides, kernels, padded, _ = get_pool_and_conv_props(spacing, patch_size, MIN_FEATURE_MAP, _NO_LIMIT)
    return [list(s) for s in strides], [list(k) for k in kernels], [int(n) for n in padded]


def _resize(values: Any, length: int, fill: Any) -> Any:
    if not isinstance(values, (list, tuple)):  # one number for all stages
        return values
    values = list(values)
    return values[:length] + [fill(values)] * (length - len(values))


def _last(values: list[int]) -> int:
    return values[-1]
