"""Encoders built from the plans' own architecture arguments, and what a decoder needs to know about them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.network.pointwise import pointwise
from nnunetv2_mgml.network.silence import random_layers_act
from nnunetv2_mgml.plans.topology import scale_features


@dataclass
class EncoderSpec:
    """The attributes `UNetDecoder` reads from an encoder, without the encoder (so that no weight is held twice)."""

    output_channels: list[int]
    strides: list[list[int]]
    kernel_sizes: list[list[int]]
    conv_op: type[nn.Module]
    conv_bias: bool
    norm_op: type[nn.Module] | None
    norm_op_kwargs: dict[str, Any] | None
    dropout_op: type[nn.Module] | None
    dropout_op_kwargs: dict[str, Any] | None
    nonlin: type[nn.Module] | None
    nonlin_kwargs: dict[str, Any] | None

    def from_scale(self, scale: int) -> EncoderSpec:
        """Return the spec of the scales from this one to the bottleneck."""
        lists = ("output_channels", "strides", "kernel_sizes")
        return dataclasses.replace(self, **{name: getattr(self, name)[scale:] for name in lists})


def plan_unet(
    class_name: str,
    arch_kwargs: dict[str, Any],
    require_import: tuple[str, ...] | list[str],
    input_channels: int,
    num_classes: int,
    width_factor: float,
) -> nn.Module:
    """Build the plan's own U-Net for one modality, ``width_factor`` times as wide.

    Raises:
        ValueError: the architecture is not made of an encoder with skips and a convolutional decoder.
    """
    kwargs = copy.deepcopy(dict(arch_kwargs))
    if "features_per_stage" not in kwargs:
        raise ValueError(
            f"The plan's architecture {class_name} has no features_per_stage. MGML needs nnU-Net's PlainConvUNet or "
            f"ResidualEncoderUNet; plan with nnUNetPlannerResEncM or the default planner."
        )
    scale_features(kwargs, width_factor)
    unet: nn.Module = get_network_from_plans(
        class_name, kwargs, require_import, input_channels, num_classes, allow_init=False, deep_supervision=False
    )
    encoder = getattr(unet, "encoder", None)
    if not all(hasattr(encoder, name) for name in ("output_channels", "kernel_sizes", "strides")):
        raise ValueError(
            f"The plan's architecture {class_name} has no encoder that MGML can use; supported "
            f"are PlainConvUNet and ResidualEncoderUNet."
        )
    return unet


def encoder_spec(encoder: nn.Module) -> EncoderSpec:
    """Read a spec off a PlainConvEncoder or ResidualEncoder, sizes written out per stage and axis."""
    read: Any = encoder  # attributes that nnU-Net gives it, without types
    dimension = 3 if read.conv_op is nn.Conv3d else 2
    kernels = [[k] * dimension if isinstance(k, int) else list(k) for k in read.kernel_sizes]
    return EncoderSpec(
        output_channels=list(read.output_channels),
        strides=[list(s) for s in read.strides],
        kernel_sizes=kernels,
        conv_op=read.conv_op,
        conv_bias=read.conv_bias,
        norm_op=read.norm_op,
        norm_op_kwargs=read.norm_op_kwargs,
        dropout_op=read.dropout_op,
        dropout_op_kwargs=read.dropout_op_kwargs,
        nonlin=read.nonlin,
        nonlin_kwargs=read.nonlin_kwargs,
    )


def silence_dropout_of_the_teacher(network: nn.Module) -> None:
    """Let the plan's dropout layers drop only where `random_layers_act`, so that the teacher pass is not noisy."""
    for module in network.modules():
        if type(module) in _QUIET:
            module.__class__ = _QUIET[type(module)]
        elif isinstance(module, DROPOUTS) and type(module) not in _QUIET.values():
            raise ValueError(
                f"The plan's dropout is {type(module).__name__}; MGML can use "
                f"{', '.join(kind.__name__ for kind in _QUIET)}. Set another dropout_op."
            )


class NarrowedEncoder(nn.Module):
    """An encoder whose features are projected, scale by scale, to the width the fusion and the decoders work at.

    The projections are 1x1 convolutions; they run with the encoder, once per patch, whatever subsets are asked for.

    Args:
        encoder: returns ``(B, C_s, *spatial_s)`` per scale.
        spec: of that encoder.
        widths: channels per scale after the projection.
    """

    def __init__(self, encoder: nn.Module, spec: EncoderSpec, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.projections = nn.ModuleList(
            nn.Identity() if before == after else pointwise(spec.conv_op)(before, after, 1, bias=spec.conv_bias)
            for before, after in zip(spec.output_channels, widths, strict=True)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map ``(B, 1 + P, *spatial)`` to ``(B, widths[s], *spatial_s)``, full resolution first."""
        return [project(f) for project, f in zip(self.projections, self.encoder(x), strict=True)]


class _Quiet(nn.Module):
    """Dropout that acts only where `random_layers_act`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: any tensor; returns the same shape and dtype."""
        return super().forward(x) if random_layers_act(self.training) else x


class QuietDropout(_Quiet, nn.Dropout):
    """`torch.nn.Dropout`, silent in the teacher's pass."""


class QuietDropout2d(_Quiet, nn.Dropout2d):
    """`torch.nn.Dropout2d`, silent in the teacher's pass."""


class QuietDropout3d(_Quiet, nn.Dropout3d):
    """`torch.nn.Dropout3d`, silent in the teacher's pass."""


_QUIET: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: QuietDropout,
    nn.Dropout2d: QuietDropout2d,
    nn.Dropout3d: QuietDropout3d,
}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


if not TYPE_CHECKING:
    __getattr__ = forward(__name__)
