"""The training losses (eq. 1-10): `MGMLLoss` is what a trainer calls, one module per equation below it."""

from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters, build_meta_network
from nnunetv2_mgml.objective.total import LossTerms, MGMLLoss

__all__ = ["LossTerms", "MGMLLoss", "MetaNetwork", "MetaParameters", "build_meta_network"]
