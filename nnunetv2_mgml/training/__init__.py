"""The trainers nnU-Net finds by name."""

from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
from nnunetv2_mgml.training.variants import (
    nnUNetTrainerMGML_baseline,
    nnUNetTrainerMGML_fixedSoftLabels,
    nnUNetTrainerMGML_noConsistency,
    nnUNetTrainerMGML_noMetaAMF,
    nnUNetTrainerModalityDropout,
)

__all__ = ["nnUNetTrainerMGML", "nnUNetTrainerMGML_baseline", "nnUNetTrainerMGML_fixedSoftLabels",
           "nnUNetTrainerMGML_noConsistency", "nnUNetTrainerMGML_noMetaAMF", "nnUNetTrainerModalityDropout"]
