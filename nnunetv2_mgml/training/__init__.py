"""The trainers nnU-Net finds by name."""

from nnunetv2_mgml.training import published_designs, variants
from nnunetv2_mgml.training.base import MissingModalityTrainer
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML

TRAINERS: dict[str, type[MissingModalityTrainer]] = {
    name: value
    for module in (variants, published_designs)
    for name, value in vars(module).items()
    if name.startswith("nnUNetTrainer") and isinstance(value, type)
}
"""Every trainer by name, `nnUNetTrainerMGML` among them; ``ext/`` hands these to nnU-Net."""

__all__ = ["TRAINERS", "nnUNetTrainerMGML"]
