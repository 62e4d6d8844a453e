"""Fusion designs, one file each; importing this package registers all of them."""

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    build_fusion,
    fusion_designs,
    register,
)
from nnunetv2_mgml.network.fusion.concat import ConcatFusion
from nnunetv2_mgml.network.fusion.mean import MeanFusion
from nnunetv2_mgml.network.fusion.region_aware import RegionAwareFusion

__all__ = ["ConcatFusion", "FusedScale", "FusionDesign", "FusionSpec", "MeanFusion", "RegionAwareFusion",
           "build_fusion", "fusion_designs", "register"]
