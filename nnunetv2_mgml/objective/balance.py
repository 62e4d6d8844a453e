"""The epoch-wise part of PASSION's rebalancing: how far each modality lags behind, and the weight it gets for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import distributed as dist

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.objective.rebalancing import Balance

BETA_LIMITS = (0.1, 4.0)
_GROWTH = 1.5  # of the rate, at the start of every third of the training (published: epochs 0, 100, 200 of 300)


class ModalityBalance:
    """Keeps ``beta_m`` and the epoch's mean ``dist_m``; one per rank, equal on all ranks after every epoch.

    Args:
        channels: modality names, ``M`` of them.
        rate: step of ``beta`` (eta) before its growth.
    """

    def __init__(self, channels: Sequence[str], rate: float) -> None:
        self.channels = tuple(channels)
        self.rate = rate
        self.beta = torch.ones(len(self.channels), dtype=torch.float64)
        self.count_weights = torch.ones(len(self.channels), dtype=torch.float64)
        self._sums = torch.zeros(2, len(self.channels))

    def count_cases(self, availability: Iterable[Subset]) -> None:
        """Set ``w_m`` = cases / cases that have the modality (0 where none has) from the training cases' subsets."""
        present = torch.tensor(list(availability), dtype=torch.float64).reshape(-1, len(self.channels))
        having = present.sum(0)
        self.count_weights = torch.where(having > 0, len(present) / having.clamp_min(1), 0.0)

    def weights(self, device: torch.device) -> Balance:
        """Return what the loss needs in this epoch, float32."""
        return Balance(self.beta.to(device, torch.float32), self.count_weights.to(device, torch.float32))

    def observe(self, distance: torch.Tensor, available: torch.Tensor) -> None:
        """Add a step's ``dist_m`` ``(B, M)``, 0 where ``available (B, M)`` is False."""
        self._sums = self._sums.to(distance.device)
        self._sums += torch.stack((distance.sum(0), available.sum(0).to(distance.dtype)))

    def end_epoch(self, epoch: int, num_epochs: int, update: bool = True) -> dict[str, float]:
        """Move ``beta`` towards the modalities that lag, and forget the epoch's distances.

        Args:
            epoch: the epoch that ends, from 0.
            num_epochs: of the whole training.
            update: False in the warm-up, which only measures.

        Returns:
            For the log: ``distance_<modality>`` of this epoch (left out for a modality no sample had) and
            ``balance_<modality>``, the weights of the next.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._sums)
        total, seen = self._sums.cpu().double()
        self._sums = torch.zeros_like(self._sums)
        mean = total / seen.clamp_min(1)
        if update:
            rate = self.rate * _GROWTH ** (1 + 3 * epoch // num_epochs)
            self.beta = updated_beta(self.beta, mean, seen > 0, rate)
        row = {f"distance_{name}": float(mean[m]) for m, name in enumerate(self.channels) if seen[m] > 0}
        return {**row, **{f"balance_{name}": float(self.beta[m]) for m, name in enumerate(self.channels)}}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps (between epochs there are no sums)."""
        return {"beta": self.beta.clone(), "channels": list(self.channels)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's weights.

        Raises:
            ValueError: the checkpoint is of another number of modalities. (Their order is compared before; a name may
                have changed.)
        """
        if len(state["channels"]) != len(self.channels):
            raise ValueError(
                f"The checkpoint balances the modalities {', '.join(state['channels'])}, this training "
                f"has {', '.join(self.channels)}. Use the plans and the dataset it was trained with."
            )
        self.beta = state["beta"].to("cpu", torch.float64).clone()
        self._sums.zero_()


def updated_beta(beta: torch.Tensor, distance: torch.Tensor, seen: torch.Tensor, rate: float) -> torch.Tensor:
    """Return ``beta_m - rate (d - d_m) / d``, clipped to `BETA_LIMITS`, then scaled to a root mean square of 1.

    Args:
        beta: ``(M,)`` float64.
        distance: ``d_m``, the epoch's mean ``dist_m``, ``(M,)``; ``d`` is the mean of those seen.
        seen: ``(M,)`` bool; the others keep their weight but for the scaling.
        rate: eta.
    """
    mean = (distance * seen).sum() / seen.sum().clamp_min(1)
    lag = torch.where(seen & (mean > 0), distance / torch.where(mean > 0, mean, 1) - 1, 0.0)
    moved = (beta + rate * lag).clamp(*BETA_LIMITS)
    return moved / moved.square().mean().sqrt()
