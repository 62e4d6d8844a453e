"""Predict one preprocessed case for many modality subsets from one pass of the encoders.

nnU-Net's own sliding window, mirroring and fold ensemble run unchanged; they see a network whose output channels are
those of all subsets side by side. What a subset gets is what it would get alone, up to rounding: sums that every subset
needs are made once, in another order (logits differ by some 1e-5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.interface import bare, subset_network
from nnunetv2_mgml.upstream.sliding_window import network_with_heads


class ManySubsets(nn.Module):
    """Wraps a network so that it answers for several subsets at once.

    Args:
        network: a `SubsetNetwork` (`MultiEncoderUNet`): its encoders then run once per input.
            Any other network is run once per subset with the absent channels set to zero.
        subsets: ``S`` subsets, ``M`` bools each.
    """

    def __init__(self, network: nn.Module, subsets: Sequence[Subset]) -> None:
        super().__init__()
        self.network = network
        self.subsets = [tuple(bool(p) for p in subset) for subset in subsets]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, M + P, *spatial)`` to logits ``(B, S * heads, *spatial)``, subset by subset."""
        used = tuple(any(visible) for visible in zip(*self.subsets, strict=True))
        network = subset_network(self.network)
        if network is None:
            return torch.cat([self.network(_without(x, subset)) for subset in self.subsets], 1)
        features = network.encode(_without(x, used), used)
        subsets = torch.tensor(self.subsets, device=x.device)
        return network.decode_subsets(features, subsets).flatten(1, 2)


def _without(x: torch.Tensor, subset: Subset) -> torch.Tensor:
    """Return ``(B, M + P, *spatial)`` with the modalities outside the subset zero."""
    if all(subset):
        return x
    x = x.clone()
    x[:, [index for index, visible in enumerate(subset) if not visible]] = 0
    return x


class SubsetPredictor(MGMLPredictor):
    """An `MGMLPredictor` that can also predict many subsets of a preprocessed case at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._subsets: list[Subset] = []

    def predict_subsets(self, data: NDArray[Any], subsets: Sequence[Subset]) -> NDArray[Any]:
        """Predict a preprocessed case for several subsets.

        Args:
            data: ``(M, z, y, x)`` float32, preprocessed; what an absent channel holds does not matter.
            subsets: ``S`` subsets in the model's channel order.

        Returns:
            Logits ``(S, heads, z, y, x)`` float16 on the preprocessed grid. That is the memory it takes, beside one
            patch of logits per subset: 2 bytes x S x heads x voxels.
        """
        self._subsets = list(subsets)
        try:
            logits: NDArray[Any] = self.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy()
        finally:
            self._subsets = []
        return logits.reshape(len(subsets), -1, *logits.shape[1:])

    def predict_sliding_window_return_logits(self, input_image: torch.Tensor) -> torch.Tensor:
        """As `MGMLPredictor`; inside `predict_subsets` for all its subsets, ``(S * heads, z, y, x)``."""
        if not self._subsets:
            return super().predict_sliding_window_return_logits(input_image)
        heads = self.label_manager.num_segmentation_heads * len(self._subsets)
        with network_with_heads(self, ManySubsets(bare(self.network), self._subsets), heads):
            return super().predict_sliding_window_return_logits(input_image)
