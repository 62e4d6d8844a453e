"""What nnU-Net finds through ``nnUNet_extTrainer``: the trainers, re-exported by absolute imports."""

from nnunetv2_mgml.training import (
    nnUNetTrainerMGML,
    nnUNetTrainerMGML_baseline,
    nnUNetTrainerMGML_fixedSoftLabels,
    nnUNetTrainerMGML_noConsistency,
    nnUNetTrainerMGML_noMetaAMF,
    nnUNetTrainerModalityDropout,
)

__all__ = ["nnUNetTrainerMGML", "nnUNetTrainerMGML_baseline", "nnUNetTrainerMGML_fixedSoftLabels",
           "nnUNetTrainerMGML_noConsistency", "nnUNetTrainerMGML_noMetaAMF", "nnUNetTrainerModalityDropout"]
