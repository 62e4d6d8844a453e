"""The training losses (eq. 1-10): `MGMLLoss` is what a trainer calls, one module per equation below it."""

from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters, build_meta_network
from nnunetv2_mgml.objective.total import GROUPS, LossTerms, MGMLLoss, needs_of
from nnunetv2_mgml.plans.options import Options, declare_objective

declare_objective(lambda: GROUPS)

__all__ = ["LossTerms", "MGMLLoss", "MetaNetwork", "MetaParameters", "Options", "build_meta_network", "needs_of"]
