"""Fusion designs, one file each; importing this package registers them. Those of other packages: `installed`."""

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    build_fusion,
    find_design,
    fusion_designs,
    register,
)
from nnunetv2_mgml.network.fusion.concat import ConcatFusion
from nnunetv2_mgml.network.fusion.demoseg import DeMoSegFusion
from nnunetv2_mgml.network.fusion.hemis import HemisFusion
from nnunetv2_mgml.network.fusion.imfuse import ImFuseFusion
from nnunetv2_mgml.network.fusion.m2ftrans import M2FTransFusion
from nnunetv2_mgml.network.fusion.mean import MeanFusion
from nnunetv2_mgml.network.fusion.mfi import FeatureInteractionFusion
from nnunetv2_mgml.network.fusion.mmformer import MmFormerFusion
from nnunetv2_mgml.network.fusion.region_aware import RegionAwareFusion
from nnunetv2_mgml.network.fusion.sfusion import SelfAttentionFusion
from nnunetv2_mgml.network.fusion.uhved import UHvedFusion

__all__ = [
    "ConcatFusion",
    "DeMoSegFusion",
    "FeatureInteractionFusion",
    "FusedScale",
    "FusionDesign",
    "FusionSpec",
    "HemisFusion",
    "ImFuseFusion",
    "M2FTransFusion",
    "MeanFusion",
    "MmFormerFusion",
    "RegionAwareFusion",
    "SelfAttentionFusion",
    "UHvedFusion",
    "build_fusion",
    "find_design",
    "fusion_designs",
    "register",
]
