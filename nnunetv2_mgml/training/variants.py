"""Ablations and baselines: a trainer each, a few lines each. Those named by the paper have its terms alone."""

# ruff: noqa: N801  nnU-Net's naming scheme: the class name is the argument of -tr

from __future__ import annotations

from typing import Any

import torch

from nnunetv2_mgml.network.multi_encoder_unet import zero_absent
from nnunetv2_mgml.training.base import MissingModalityTrainer
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


class nnUNetTrainerMGML_noConsistency(nnUNetTrainerMGML):
    """Without L_CR (the paper's "Baseline + Meta-AMF")."""

    config_overrides = {"consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_noMetaAMF(nnUNetTrainerMGML):
    """Without the soft label (the paper's "Baseline + L_CR")."""

    config_overrides = {"soft_label": "none", "complete_view_weight": 0.0}


class nnUNetTrainerMGML_fixedSoftLabels(nnUNetTrainerMGML):
    """Soft labels from fixed parameters (the paper's FPSLD, Table 2), without L_CR."""

    config_overrides = {"soft_label": "fixed", "consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_baseline(nnUNetTrainerMGML):
    """The multi-encoder network with the segmentation losses only."""

    config_overrides = {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0}


class nnUNetTrainerMGML_paperTerms(nnUNetTrainerMGML):
    """The paper's MGML, Meta-AMF and L_CR, without the loss on the complete view that our default adds."""

    config_overrides = {"complete_view_weight": 0.0}


class nnUNetTrainerModalityDropout(MissingModalityTrainer):
    """The stock nnU-Net network, trained with random channels empty: what one would try first."""

    def train_step(self, batch: dict) -> dict[str, Any]:
        """nnU-Net's step on the visible channels."""
        visible: torch.Tensor = zero_absent(batch["data"], batch["modality_mask"])
        with self.autocast():
            return super().train_step({**batch, "data": visible})
