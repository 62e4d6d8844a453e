"""The training objective (eq. 1-10), built of terms: one file each in `terms`, their equations in the modules here.

Who gets which gradient is said in each term. `Options` are complete only with what the terms declare, so whoever reads
options imports this package.
"""

from nnunetv2_mgml.objective import published, terms
from nnunetv2_mgml.objective.base import (
    Progress,
    Term,
    TermSpec,
    TermValue,
    find_term,
    loss_terms,
    random_subsets,
    register,
    term_options,
)
from nnunetv2_mgml.objective.objective import Objective, ObjectiveValue, needs_of
from nnunetv2_mgml.objective.step import FurtherSubsets, Step
from nnunetv2_mgml.plans.options import Options, declare_objective

declare_objective(term_options)

__all__ = [
    "FurtherSubsets",
    "Objective",
    "ObjectiveValue",
    "Options",
    "Progress",
    "Step",
    "Term",
    "TermSpec",
    "TermValue",
    "find_term",
    "loss_terms",
    "needs_of",
    "published",
    "random_subsets",
    "register",
    "terms",
]
