"""Channel-shuffle blocks of DeMoSeg: a convolution, and its channels added to themselves in an order of their gates.

``y = LeakyReLU(InstanceNorm(Conv(x)))``, one gate per channel ``s = sigmoid(W2 LeakyReLU(W1 mean(y)))``, and then
``LeakyReLU(InstanceNorm(y + y[argsort(s)]))``. In the published block (``gating="published"``) nothing ever trains
``W1`` and ``W2``, since sorting has no gradient: the order is that of a random network, which therefore is kept in
buffers here. With ``gating="learned"``, which is ours, the added channels are multiplied by their gates, which learn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

GATINGS = ("published", "learned")


class ChannelGate(nn.Module):
    """Pooled channels ``(B, C) -> `` gates in (0, 1), ``(B, C)`` float32, by two layers of a quarter of the width.

    Args:
        width: ``C``.
        trained: whether the layers are parameters; otherwise they are buffers.
    """

    first_weight: torch.Tensor
    first_bias: torch.Tensor
    second_weight: torch.Tensor
    second_bias: torch.Tensor

    def __init__(self, width: int, trained: bool) -> None:
        super().__init__()
        first, second = nn.Linear(width, max(1, width // 4)), nn.Linear(max(1, width // 4), width)
        tensors = {
            "first_weight": first.weight,
            "first_bias": first.bias,
            "second_weight": second.weight,
            "second_bias": second.bias,
        }
        for name, tensor in tensors.items():
            if trained:
                self.register_parameter(name, nn.Parameter(tensor.detach().clone()))
            else:
                self.register_buffer(name, tensor.detach().clone())

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Args: pooled ``(B, C)`` float32."""
        hidden = F.leaky_relu(F.linear(pooled, self.first_weight, self.first_bias))
        return F.linear(hidden, self.second_weight, self.second_bias).sigmoid()


def sorted_order(values: torch.Tensor) -> torch.Tensor:
    """Return ``values.argsort(dim=1, stable=True)`` of ``(B, C)``, by comparing all pairs.

    ONNX has no stable sorting. ``C`` is a number of channels, so that the pairs are few next to the voxels.
    """
    places = torch.arange(values.shape[1], device=values.device)
    mine, other = values[:, :, None], values[:, None, :]
    before = (other < mine) | ((other == mine) & (places[None, :] < places[:, None]))
    rank = before.sum(2)  # (B, C): where each channel goes
    return (rank[:, None, :] == places[:, None]).int().argmax(2)


class ChannelShuffle(nn.Module):
    """What follows the convolution of a block: ``(B, C, *spatial)`` to the same.

    Args:
        width: ``C``.
        norm_op: instance norm of the plan; None: no norm.
        norm_op_kwargs: its arguments.
        gating: one of `GATINGS`.
        descending: sort the gates the other way round.

    Raises:
        ValueError: another gating.
    """

    def __init__(
        self,
        width: int,
        norm_op: type[nn.Module] | None,
        norm_op_kwargs: dict[str, object] | None,
        gating: str = "published",
        descending: bool = False,
    ) -> None:
        super().__init__()
        if gating not in GATINGS:
            raise ValueError(f"gating is {gating!r}; it must be one of {', '.join(GATINGS)}.")
        self.learned = gating == "learned"
        self.descending = descending
        self.gate = ChannelGate(width, self.learned)
        self.norm = nn.Identity() if norm_op is None else norm_op(width, **(norm_op_kwargs or {}))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Args: features ``(B, C, *spatial)``."""
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            gates = self.gate(wide.flatten(2).mean(2))
        order = sorted_order(-gates if self.descending else gates)
        spread = order.reshape(*order.shape, *[1] * (features.ndim - 2)).expand_as(features)
        shuffled = features.gather(1, spread)
        if self.learned:
            chosen = gates.gather(1, order).reshape(*order.shape, *[1] * (features.ndim - 2))
            shuffled = shuffled * chosen.to(features.dtype)
        return F.leaky_relu(self.norm(features + shuffled), 0.01)
