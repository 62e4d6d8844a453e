"""nnU-Net's own network whose norms depend on what is visible: random empty channels, and a network that knows of them.

An empty channel looks like tissue of mean intensity, and one set of weights has to serve every subset. Here the norms
are conditional (`nnunetv2_mgml.network.conditional_norms`). It costs a few numbers per norm and, on one core of a CPU,
1 % of a small training step (``benchmarks/ablation/cubes_seconds.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnunetv2_mgml.network.conditional_norms import make_conditional
from nnunetv2_mgml.network.interface import Logits, View
from nnunetv2_mgml.network.subset_module import SubsetModule, zero_absent


class ConditionedUNet(SubsetModule):
    """A U-Net of nnU-Net, its norms conditional; keys of its state dict are the U-Net's, and ``of_modalities`` more.

    Absent channels are zero, so *missing is exact*: whatever one held cannot change the output by one bit.

    Args:
        unet: nnU-Net's network with ``M + P`` input channels (``P``: of a cascade's previous stage); taken apart.
        modalities: ``M``.

    Raises:
        ValueError: an architecture without encoder and decoder, or without instance norms.
    """

    def __init__(self, unet: nn.Module, modalities: int) -> None:
        super().__init__()
        if not (hasattr(unet, "encoder") and hasattr(unet, "decoder")):
            raise ValueError(
                f"The plan's architecture {type(unet).__name__} has no encoder and decoder; supported are "
                f"PlainConvUNet and ResidualEncoderUNet. Plan with nnUNetPlannerResEncM or the default planner."
            )
        self._modalities = modalities
        told = make_conditional(unet.modules(), modalities)
        if told is None:
            raise ValueError(
                f"The plan's architecture {type(unet).__name__} has no instance norms, which are what depends on the "
                f"visible modalities here. Plan with one of nnU-Net's planners, or use nnUNetTrainerModalityDropout."
            )
        self._told = told
        self.encoder: Any = unet.encoder
        self.decoder: Any = unet.decoder
        """``decoder.deep_supervision`` is the switch nnU-Net sets."""

    @property
    def num_modalities(self) -> int:
        """``M``."""
        return self._modalities

    def encode(self, x: torch.Tensor, subset: tuple[bool, ...] | None = None) -> list[torch.Tensor]:
        """Return the images themselves, ``[(B, M + P, *spatial)]``: no pass here serves several subsets."""
        return [x]

    def decode_subsets(self, features: list[torch.Tensor], subsets: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, S, R, *spatial)`` for every sample and subset ``(S, M)``, a pass for each subset.

        Args:
            features: as `encode` returns them.
            subsets: ``(S, M)`` bool.
        """
        (x,) = features
        each = [self._pass(x, row.expand(len(x), -1)) for row in subsets]
        return torch.stack([logits if isinstance(logits, torch.Tensor) else logits[0] for logits in each], 1)

    def forward(
        self, x: torch.Tensor, view: View | torch.Tensor | None = None, *, modality_mask: torch.Tensor | None = None
    ) -> Logits:
        """Predict.

        Args:
            x: ``(B, M + P, *spatial)``: the modalities in channel order, then a cascade's previous-stage one-hot.
            view: what may be seen; a tensor ``(B, M)`` is what is visible. None: what `set_visible` was told, else read
                in-band (see `nnunetv2_mgml.network.subset_module.in_band_mask`).
            modality_mask: ``(B, M)`` bool, another name for a view that is a tensor.

        Returns:
            Logits ``(B, R, *spatial)``, or with deep supervision a list, highest resolution first.
        """
        return self._pass(x, self._view(x, modality_mask if view is None else view).visible)

    def _pass(self, x: torch.Tensor, visible: torch.Tensor) -> Logits:
        with self._told.tell(visible):
            logits: Logits = self.decoder(self.encoder(zero_absent(x, visible)))
        return logits
