"""What nnU-Net finds through ``nnUNet_extTrainer``: the trainers, re-exported by absolute imports."""

from nnunetv2_mgml.training import TRAINERS

globals().update(TRAINERS)  # nnU-Net asks this module for a trainer by name, with hasattr
__all__ = list(TRAINERS)
