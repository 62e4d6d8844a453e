"""The paper's optimizer."""

from __future__ import annotations

import torch
from torch import nn


def adam_of_the_paper(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Adam:
    """Return the optimizer of section 4.1 for all parameters of a network."""
    return torch.optim.Adam(
        network.parameters(), learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, amsgrad=True
    )
