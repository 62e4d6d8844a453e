"""The trainers nnU-Net finds by name."""

from __future__ import annotations

from typing import cast

from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML  # first: a package with a fusion design may ask for it

from nnunetv2_mgml.training import variants  # isort: skip

TRAINERS: dict[str, type[nnUNetTrainerMGML]] = {
    name: value
    for name, value in vars(variants).items()
    if name.startswith("nnUNetTrainer") and isinstance(value, type) and issubclass(value, nnUNetTrainerMGML)
}
"""Every trainer by name, `nnUNetTrainerMGML` among them; ``ext/`` hands these to nnU-Net."""

__all__ = ["TRAINERS", "nnUNetTrainerMGML"]
_old_path = forward(__name__, calls=2)


def __getattr__(name: str) -> type[nnUNetTrainerMGML]:
    """Return a trainer by name: most are made from the fusion designs, also from those of other packages."""
    return TRAINERS[name] if name in TRAINERS else cast("type[nnUNetTrainerMGML]", _old_path(name))
