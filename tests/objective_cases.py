"""Inputs and variants of the test that holds every term to the numbers it had before the terms were files of their own.

Only tensors, so that the same step can be computed by any version of the objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from loss_cases import labels_of, randn

K, M, SHAPE = 4, 3, (6, 4, 4)
AVAILABLE = torch.tensor([[True, True, True], [True, False, True]])
VISIBLE = torch.tensor([[True, False, False], [True, False, True]])
BETA = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
COUNT = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
RAMP = 0.5

PASSION = {"rebalancing": "passion"}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper_terms": {"complete_view_weight": 0.0},
    "baseline": {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0},
    "bare": {
        "soft_label": "none",
        "consistency_weight": 0.0,
        "complete_view_weight": 0.0,
        "modality_decoder_weight": 0.0,
    },
    "no_consistency": {"consistency_weight": 0.0, "complete_view_weight": 0.0},
    "no_meta_amf": {"soft_label": "none", "complete_view_weight": 0.0},
    "fixed": {"soft_label": "fixed", "consistency_weight": 0.0, "complete_view_weight": 0.0},
    "mean": {"soft_label": "mean"},
    "uniform_mask": {"mask_mode": "uniform"},
    "meta_by_soft_label": {"meta_objective": "soft_label"},
    "teaching_better": {"teaching": "better"},
    "soft_label_without_decoder_loss": {"modality_decoder_weight": 0.0},
    "weights": {
        "segmentation_weight": 1.5,
        "auxiliary_weight": 0.4,
        "soft_label_weight": 0.8,
        "temperature": 3.0,
        "sharpness_min": 0.7,
        "sharpness_max": 10.0,
        "mask_ratio": 0.4,
        "meta_hidden": 16,
    },
    "own_masks_only": {"mask_sampling": "fixed"},
    "passion": PASSION,
    "passion_alone": {
        **PASSION,
        "soft_label": "none",
        "consistency_weight": 0.0,
        "complete_view_weight": 0.0,
        "modality_decoder_weight": 1.0,
        "mask_sampling": "fixed",
    },
    "paper": {"reading": "paper", "complete_view_weight": 0.0},
    "paper_fixed": {"reading": "paper", "soft_label": "fixed"},
    "paper_own_masks": {"reading": "paper", "mask_sampling": "fixed"},
    "reference": {"reading": "reference", "complete_view_weight": 0.0},
    "reference_fixed": {"reading": "reference", "soft_label": "fixed"},
    "reference_none": {"reading": "reference", "soft_label": "none"},
}
LAYOUTS: dict[str, dict[str, bool]] = {
    "regions": dict(regions=True, ignore=False, deep=False),
    "labels": dict(regions=False, ignore=False, deep=False),
    "regions_ignore_deep": dict(regions=True, ignore=True, deep=True),
    "labels_ignore_deep": dict(regions=False, ignore=True, deep=True),
}
CASES = [
    f"{variant}/{layout}"
    for variant in VARIANTS
    for layout in (
        LAYOUTS if variant in ("default", "passion", "teaching_better") else ("regions", "labels_ignore_deep")
    )
]


@dataclass
class Inputs:
    """One step, ``B`` = 2, float64; every floating tensor is a leaf with gradient."""

    student: list[torch.Tensor]
    complete: list[torch.Tensor]
    modality: torch.Tensor
    auxiliary: torch.Tensor
    fusion_loss: torch.Tensor
    single_students: list[torch.Tensor]
    single_features: torch.Tensor
    teacher_features: torch.Tensor
    target: torch.Tensor | list[torch.Tensor]

    def leaves(self) -> dict[str, torch.Tensor]:
        """Name -> tensor whose gradient is compared."""
        lists = {"student": self.student, "complete": self.complete, "single": self.single_students}
        named = {f"{name}{s}": x for name, scales in lists.items() for s, x in enumerate(scales)}
        return named | {
            "modality": self.modality,
            "auxiliary": self.auxiliary,
            "fusion_loss": self.fusion_loss,
            "features": self.single_features,
        }


def inputs(regions: bool, ignore: bool, deep: bool) -> Inputs:
    """Draw one step."""
    heads = K - 1 if regions else K
    sizes = [tuple(n // 2**s for n in SHAPE) for s in range(2 if deep else 1)]

    def leaf(*shape: int, seed: int) -> torch.Tensor:
        return randn(*shape, seed=seed, dtype=torch.float64).requires_grad_()

    labels = labels_of(2, *SHAPE, classes=K + ignore)
    target = labels[:, None]
    if regions:
        maps = [(labels >= k) & (labels < K) for k in range(1, K)] + [labels == K] * ignore
        target = torch.stack(maps, 1)
    halves = (slice(None), slice(None), *(slice(None, None, 2) for _ in SHAPE))
    return Inputs(
        student=[leaf(2, heads, *size, seed=10 + s) for s, size in enumerate(sizes)],
        complete=[leaf(2, heads, *size, seed=20 + s) for s, size in enumerate(sizes)],
        modality=leaf(2, M, K, *SHAPE, seed=3),
        auxiliary=leaf(2, K, *(n // 2 for n in SHAPE), seed=5),
        fusion_loss=torch.tensor(0.25, dtype=torch.float64, requires_grad=True),
        single_students=[leaf(2, M, heads, *size, seed=30 + s) for s, size in enumerate(sizes)],
        single_features=leaf(2, M, 5, *SHAPE, seed=40),
        teacher_features=leaf(2, 5, *SHAPE, seed=41),
        target=[target, target[halves]] if deep else target,
    )
