"""The MetaNetwork (eq. 1-2): from how each modality's prediction looks on average to how to fuse them.

Differs from the paper and its code: the input also says which modalities exist, a missing one is zero, each sample has
its own parameters, and beta and alpha have the range in which they change the result. T1 and T2 are produced and logged
as eq. 2 names them, but no equation uses them: their gradient is exactly zero, in the published code as here.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import nn

from nnunetv2_mgml.objective.tensors import no_autocast

_START_T1, _START_T2, _START_CONFIDENCE = 0.75, 0.85, 0.5
_SMALL_START = 1e-3
PUBLISHED_T_RANGE = (0.05, 0.95)
"""Range of T1 and T2 in the published code."""


class MetaParameters(NamedTuple):
    """The meta-parameters of eq. 2, one set per sample, each ``(B,)`` float32."""

    t1: torch.Tensor
    """In [0, 1]; no equation uses it."""
    t2: torch.Tensor
    """In [0, 1]; no equation uses it."""
    w_f: torch.Tensor
    """Weight of smooth max against smooth min, in [0, 1] (eq. 5)."""
    beta: torch.Tensor
    """Sharpness of smooth max (eq. 3)."""
    alpha: torch.Tensor
    """Sharpness of smooth min (eq. 4)."""

    @classmethod
    def fixed(cls, batch_size: int, w_f: float, sharpness: float, device: torch.device | None = None) -> MetaParameters:
        """Return constant parameters (the paper's FPSLD, Table 2)."""
        t1, t2, confidence, sharp = (
            torch.full((batch_size,), value, device=device) for value in (_START_T1, _START_T2, w_f, sharpness)
        )
        return cls(t1, t2, confidence, sharp, sharp)


class MetaNetwork(nn.Module):
    """Two linear layers with a ReLU between them, then sigmoids mapped to each parameter's range (eq. 2).

    Args:
        num_modalities: ``M``.
        num_classes: ``K``, background included.
        hidden: width of the hidden layer.
        sharpness: range of beta and alpha.
        start_sharpness: where they start; None: the geometric mean of the range.
        availability_bits: whether the input also holds ``M`` bits saying which modalities exist. Without them and with
            ``M = K = 4``, ``hidden = 64`` the layers are those of the published code: 1413 parameters.
        published_start: PyTorch's own spread for the weights of the output layer, and T1 and T2 in
            `PUBLISHED_T_RANGE`, as in the published code.
    """

    def __init__(
        self,
        num_modalities: int,
        num_classes: int,
        hidden: int = 64,
        sharpness: tuple[float, float] = (0.5, 20.0),
        start_sharpness: float | None = None,
        availability_bits: bool = True,
        published_start: bool = False,
    ) -> None:
        super().__init__()
        self.availability_bits = availability_bits
        self.t_range = PUBLISHED_T_RANGE if published_start else (0.0, 1.0)
        self.sharpness = sharpness
        low, high = sharpness
        start = math.sqrt(low * high) if start_sharpness is None else start_sharpness
        if not low < start < high:
            raise ValueError(f"start_sharpness must lie inside the range {sharpness}, got {start}.")
        self.layers = nn.Sequential(
            nn.Linear(num_modalities * (num_classes + availability_bits), hidden), nn.ReLU(), nn.Linear(hidden, 5)
        )
        last = cast(nn.Linear, self.layers[2])
        if not published_start:
            # Small: the start values hold whatever the first batch shows, and gradients still reach both layers.
            nn.init.normal_(last.weight, std=_SMALL_START)
        share = (start - low) / (high - low)
        lowest, highest = self.t_range
        t1, t2 = ((t - lowest) / (highest - lowest) for t in (_START_T1, _START_T2))
        starts = torch.tensor([t1, t2, _START_CONFIDENCE, share, share])
        with torch.no_grad():
            last.bias.copy_(torch.logit(starts))

    def forward(self, mean_probabilities: torch.Tensor, available: torch.Tensor) -> MetaParameters:
        """Predict the meta-parameters.

        Args:
            mean_probabilities: ``(B, M, K)``, each modality's class probabilities averaged over the patch (eq. 1).
            available: ``(B, M)`` bool, the modalities the case has; whatever the slots of the others hold is ignored.

        Returns:
            One set per sample, each ``(B,)``.
        """
        with no_autocast(mean_probabilities):
            inputs = torch.where(available[:, :, None], mean_probabilities, 0).flatten(1)
            if self.availability_bits:
                inputs = torch.cat((inputs, available.to(inputs.dtype)), 1)
            t1, t2, w_f, beta, alpha = self.layers(inputs.to(next(self.layers.parameters()).dtype)).sigmoid().unbind(1)
            return MetaParameters(
                _into(t1, self.t_range),
                _into(t2, self.t_range),
                w_f,
                _into(beta, self.sharpness),
                _into(alpha, self.sharpness),
            )


def _into(share: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    low, high = limits
    return share * (high - low) + low
