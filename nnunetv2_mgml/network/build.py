"""Build the network from plans: nnU-Net's architecture arguments and our options."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunetv2_mgml.network.conditional_norms import can_be_conditional
from nnunetv2_mgml.network.decoder import FusionDecoder, modality_decoder
from nnunetv2_mgml.network.early_fusion import EarlyFusionUNet, Stem, TrunkDecoder
from nnunetv2_mgml.network.encoders import (
    EncoderSpec,
    NarrowedEncoder,
    encoder_spec,
    plan_unet,
    silence_dropout_of_the_teacher,
)
from nnunetv2_mgml.network.fusion import FusionSpec, build_fusion
from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.network.pointwise import pointwise
from nnunetv2_mgml.network.shared_encoder import SharedEncoderUNet
from nnunetv2_mgml.plans.options import NetworkOptions
from nnunetv2_mgml.plans.topology import scaled_widths
from nnunetv2_mgml.upstream.cpu_layers import make_fast


def count_modalities(configuration_manager: ConfigurationManager) -> int:
    """Return ``M``: the plan normalises each image channel, and only those (a cascade's one-hot channels are not)."""
    return len(configuration_manager.normalization_schemes)


def build_network(
    configuration_manager: ConfigurationManager,
    options: NetworkOptions,
    num_input_channels: int,
    num_output_channels: int,
    num_classes: int,
    deep_supervision: bool,
    needs: Needs,
) -> MultiEncoderUNet:
    """Build and initialise a `MultiEncoderUNet`.

    Args:
        configuration_manager: the plan's configuration (architecture, patch size, channels).
        options: our options of the network.
        num_input_channels: ``M`` plus a cascade's previous-stage channels.
        num_output_channels: ``R``, fused heads.
        num_classes: ``K``, label classes with background.
        deep_supervision: start value of ``network.decoder.deep_supervision``.
        needs: of the loss terms; heads that no term needs are left out.

    Raises:
        ValueError: fewer than two modalities, or an unknown fusion design.
        ValueError: an architecture without encoder and decoder.
    """
    modalities = count_modalities(configuration_manager)
    if modalities < 2:
        raise ValueError(
            f"MGML needs at least two modalities; this dataset has {modalities}. Train it with the stock nnUNetTrainer."
        )
    arch_kwargs = configuration_manager.network_arch_init_kwargs
    shares = options.network_form == "shared_encoder"
    unet = plan_unet(
        configuration_manager.network_arch_class_name,
        arch_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        num_input_channels if shares else 1 + num_input_channels - modalities,
        num_classes,
        options.width_factor,
    )
    encoder = cast(nn.Module, unet.encoder)  # `plan_unet` refuses others
    spec = encoder_spec(encoder)
    scale = modality_scale(options, len(spec.output_channels))
    conditional = has_conditional_norms(options, arch_kwargs)
    narrow = dataclasses.replace(spec, output_channels=scaled_widths(spec.output_channels, options.decoder_width_ratio))
    convs = options.decoder_convs or arch_kwargs["n_conv_per_stage_decoder"]
    nonlin_first = bool(arch_kwargs.get("nonlin_first", False))
    if options.network_form == "early_fusion":
        early = _early_fusion(
            narrow,
            modalities,
            num_input_channels,
            num_output_channels,
            num_classes,
            deep_supervision,
            configuration_manager,
            options,
            needs,
        )
        return _initialized(early, unet)
    fusion = build_fusion(options.fusion, _fusion_spec(narrow, modalities, num_classes, configuration_manager, options))
    decoder = FusionDecoder(narrow, num_output_channels, convs, deep_supervision, nonlin_first)
    of_modalities = _modality_decoder(narrow, num_classes, convs, nonlin_first, scale) if needs.modality else None
    encoders = [
        NarrowedEncoder(copy.deepcopy(encoder), spec, narrow.output_channels)
        for _ in range(1 if shares else modalities)
    ]
    network: MultiEncoderUNet
    if shares:
        network = SharedEncoderUNet(encoders[0], modalities, fusion, decoder, of_modalities, scale)
    else:
        network = MultiEncoderUNet(encoders, fusion, decoder, of_modalities, scale)
    if conditional:
        network.condition_norms()
    return _initialized(network, unet)


def has_conditional_norms(options: NetworkOptions, arch_kwargs: Mapping[str, Any]) -> bool:
    """Return whether norms of fusion and decoder depend on what is visible.

    Args:
        options: of the network.
        arch_kwargs: the plan's.

    Raises:
        ValueError: ``conditional_norms`` is true, which form or norms do not allow.
    """
    if options.conditional_norms is False:
        return False
    one_u_net = options.network_form == "early_fusion"
    possible = can_be_conditional(arch_kwargs.get("norm_op"), arch_kwargs.get("norm_op_kwargs"))
    if options.conditional_norms and one_u_net:
        raise ValueError(
            "conditional_norms=true needs network_form=multi_encoder or shared_encoder; this is early_fusion. Set "
            "conditional_norms to null or false, or use nnUNetTrainerModalityDropout_conditional, one U-Net that has "
            "such norms."
        )
    if options.conditional_norms and not possible:
        raise ValueError(
            f"conditional_norms is true, but fusion and decoder have no instance norms that can depend on what is "
            f"visible: the plan's norm_op is {arch_kwargs.get('norm_op')} with {arch_kwargs.get('norm_op_kwargs')}. "
            f"Allowed are InstanceNorm2d and InstanceNorm3d without track_running_stats. Set conditional_norms to null "
            f"or false."
        )
    return possible and not one_u_net


def modality_scale(options: NetworkOptions, stages: int) -> int:
    """Return the scale at which the decoder for the modalities ends: 0 is full resolution.

    Args:
        options: of the network.
        stages: of its encoders.

    Raises:
        ValueError: no such decoder ends at ``modality_decoder_scale``.
    """
    scale, last = options.modality_decoder_scale, max(0, stages - 2)
    early = options.network_form == "early_fusion"
    if scale is None:
        return 0 if early else min(1, last)
    if scale and early:
        raise ValueError(
            f"modality_decoder_scale is {scale}, but network_form=early_fusion has no decoder for the modalities. "
            f"Set it to 0."
        )
    if scale > last:
        raise ValueError(f"modality_decoder_scale is {scale}; with {stages} stages it can be 0 to {last}.")
    return scale


def _modality_decoder(spec: EncoderSpec, num_classes: int, convs: Any, nonlin_first: bool, scale: int) -> nn.Module:
    """Build the decoder shared by all modalities, which ends at a scale."""
    if not isinstance(convs, int):
        convs = convs[: len(convs) - scale]
    shared: nn.Module = modality_decoder(spec.from_scale(scale), num_classes, convs, nonlin_first)
    return shared


def _initialized(network: MultiEncoderUNet, unet: nn.Module) -> MultiEncoderUNet:
    network.apply(cast("Callable[[nn.Module], None]", unet.initialize))
    network.fusion.initialize()
    silence_dropout_of_the_teacher(network)
    make_fast(network.modules())
    return network


def _early_fusion(
    spec: EncoderSpec,
    modalities: int,
    num_input_channels: int,
    num_output_channels: int,
    num_classes: int,
    deep_supervision: bool,
    configuration_manager: ConfigurationManager,
    options: NetworkOptions,
    needs: Needs,
) -> EarlyFusionUNet:
    """Build the early-fusion form: stems, a fusion of one scale, and the trunk."""
    whole = _fusion_spec(spec, modalities, num_classes, configuration_manager, options)
    finest = dataclasses.replace(
        whole, channels=whole.channels[:1], kernel_sizes=whole.kernel_sizes[:1], strides=whole.strides[:1]
    )
    fusion = build_fusion(options.fusion, finest)
    head = None
    if needs.modality:
        head = pointwise(spec.conv_op)(spec.output_channels[0], num_classes, 1)
    return EarlyFusionUNet(
        encoders=[Stem(spec, 1 + num_input_channels - modalities) for _ in range(modalities)],
        fusion=fusion,
        decoder=TrunkDecoder(spec, num_output_channels, deep_supervision, fusion.options.get("gating", "published")),
        modality_decoder=head,
    )


def _fusion_spec(
    spec: EncoderSpec,
    modalities: int,
    num_classes: int,
    configuration_manager: ConfigurationManager,
    options: NetworkOptions,
) -> FusionSpec:
    def per_axis(sizes: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(n) for n in size) for size in sizes)

    norm_kwargs: dict[str, Any] = dict(spec.norm_op_kwargs or {})
    return FusionSpec(
        num_modalities=modalities,
        num_classes=num_classes,
        channels=tuple(spec.output_channels),
        kernel_sizes=per_axis(spec.kernel_sizes),
        strides=per_axis(spec.strides),
        patch_size=tuple(configuration_manager.patch_size),
        conv_op=spec.conv_op,
        norm_op=spec.norm_op,
        norm_op_kwargs=norm_kwargs,
        nonlin=spec.nonlin,
        nonlin_kwargs=dict(spec.nonlin_kwargs or {}),
        conv_bias=spec.conv_bias,
        options=dict(options.fusion_options),
        revision=options.fusion_revision,
    )
