"""nnU-Net's training loss without a trainer.

Bends: ``nnUNetTrainer._build_loss`` and ``_get_deep_supervision_scales``, called on an object that has what they read.
Why: a trainer cannot be made without result folders and a device, and a copy of its loss would grow old.
Guarded by: tests/upstream/test_upstream_drift.py, tests/objective/test_memory.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn


def training_loss(configuration: ConfigurationManager, label_manager: Any) -> nn.Module:
    """Return what nnU-Net's trainer compares outputs and targets with, under deep supervision, on one device.

    Args:
        configuration: of the plans.
        label_manager: of the dataset.
    """
    trainer = SimpleNamespace(
        label_manager=label_manager,
        configuration_manager=configuration,
        enable_deep_supervision=True,
        is_ddp=False,
        _do_i_compile=lambda: False,
    )
    trainer._get_deep_supervision_scales = lambda: nnUNetTrainer._get_deep_supervision_scales(trainer)
    loss: nn.Module = nnUNetTrainer._build_loss(trainer)
    return loss
