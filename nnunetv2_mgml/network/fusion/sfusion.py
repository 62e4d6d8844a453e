"""SFusion (Liu et al., MICCAI 2023): a transformer over the tokens of the available modalities scores every voxel.

A softmax over the available modalities turns the scores, one per voxel and channel, into weights of a sum. Used at
every scale; the parameters do not depend on the number of modalities. ``form=published`` is the block as published
(`score_transformer`); its token grid follows the plan's patch, at most ``grid`` cells per axis, so that sizes which the
published grid of 8 does not divide work too. ``form=interpolated``, what this design was before, has pre-norm GELU
layers, learned positions that are the same for all modalities, and linear interpolation of the tokens: it does not
depend on the order of the modalities and has fewer weights, and its scores are smooth inside a cell.

Absent modalities are hidden by key padding, which equals removing them, but the transformer then computes all ``M``
modalities whatever the mask is. On a CPU, where neither training nor a compiled graph asks for one shape for all masks,
the published form does remove them: subsets of the same size go through the transformer together, tokens of absent
modalities are left out, and one modality alone, whose weight is 1, comes back as it is. A GPU would have to be waited
for at every scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.network.fusion.attention import to_grid, to_tokens, transformer_layers
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, can_be_read, expand_mask, register
from nnunetv2_mgml.network.fusion.positions import PositionCode, resize_linear
from nnunetv2_mgml.network.fusion.score_transformer import CellScores
from nnunetv2_mgml.network.silence import random_layers_act

_POOL: dict[int, Callable[..., torch.Tensor]] = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class InterpolatedScores(nn.Module):
    """Features ``(B, M, C, *spatial) -> `` scores of the same shape, by linear interpolation of the tokens."""

    def __init__(self, spec: FusionSpec, scale: int, options: dict[str, Any]) -> None:
        super().__init__()
        width = spec.channels[scale]
        self.grid = options["grid"]
        self.positions = PositionCode(self.pooled_size(spec.feature_size(scale)), width)
        self.layers = transformer_layers(width, options)
        # A bias here would be added to all modalities alike and cancel in the softmax over them.
        self.norm = nn.LayerNorm(width, bias=False)

    def pooled_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token grid of features of ``size`` voxels."""
        return tuple(min(self.grid, n) for n in size)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        batch, modalities = features.shape[:2]
        size = tuple(features.shape[3:])
        grid = self.pooled_size(size)
        pooled = _POOL[len(size)](features.flatten(0, 1), grid).unflatten(0, (batch, modalities))
        tokens = to_tokens(pooled) + self.positions(grid).to(features.dtype)
        keep = mask[:, :, None].expand(*tokens.shape[:3]).flatten(1)
        tokens = tokens.flatten(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, keep)
        scores = to_grid(self.norm(tokens).unflatten(1, (modalities, -1)), grid).to(features.dtype)
        resized: torch.Tensor = resize_linear(scores.flatten(0, 1), size).unflatten(0, (batch, modalities))
        return resized


@register
class SelfAttentionFusion(FusionDesign):
    """Weighted sum of the modalities with one weight per voxel and channel, at every scale."""

    name = "sfusion"
    summary = "transformer over the available modalities weighs them per voxel and channel (SFusion, MICCAI 2023)"
    publication = "SFusion, MICCAI 2023"
    trainer = "SFusion"
    published_options: ClassVar[dict[str, Any]] = {"fusion_options": {"attention_dropout": 0.1, "narrow_heads": True}}
    published_alone: ClassVar[dict[str, Any]] = {"modality_decoder_weight": 0.0}
    differences: ClassVar[tuple[str, ...]] = (
        (
            "the token grid follows the plan's patch, at most 8 cells per axis; the published grid is 8 at every "
            "scale and has to divide the features"
        ),
        "the bias of the last norm, which cancels in the softmax, is left out",
    )
    default_options: ClassVar[dict[str, Any]] = {
        "form": "published",
        "grid": 8,
        "depth": 8,
        "heads": 4,
        "mlp_ratio": 4,
        "dropout": 0.1,
        "attention_dropout": 0.0,
        "narrow_heads": False,
    }
    defaults_before: ClassVar[dict[int, dict[str, Any]]] = {1: {"form": "interpolated", "heads": 8}}
    option_choices: ClassVar[dict[str, tuple[str, ...]]] = {"form": ("published", "interpolated")}
    order_matters = True
    hides_absent = True
    uses_context = False

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.published = self.options["form"] == "published"
        scores = CellScores if self.published else InterpolatedScores
        self.scales = nn.ModuleList(scores(spec, s, self.options) for s in range(spec.num_scales))

    def share(self, features: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """See `FusionDesign.share`: the pooled tokens of the published form."""
        if not self.published:
            return None
        return [cast(CellScores, scale).pool(f) for scale, f in zip(self.scales, features, strict=True)]

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        if not self.published:
            return FusedScale(_weighted_sum(features, self.scales[scale](features, mask), mask))
        if state is None:
            tokens = cast(CellScores, self.scales[scale]).pool(features)
        else:
            tokens = state[scale].expand(len(mask), -1, -1, -1)
        if random_layers_act(self.training) or not can_be_read(mask):
            scores = self.scales[scale](tokens, mask, tuple(features.shape[3:]))
            return FusedScale(_weighted_sum(features, scores, mask))
        return FusedScale(self._remove_absent(scale, features, mask, tokens))

    def _remove_absent(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Fuse the subsets of one size at a time, from what they have alone; ``(B, C, *spatial)``."""
        fused: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        counts = mask.sum(1)
        for count in counts.unique().tolist():
            own = (counts == count).nonzero()[:, 0]
            chosen = mask[own].nonzero()[:, 1].unflatten(0, (len(own), count))
            present = [features[own, chosen[:, i]] for i in range(count)]
            rows.append(own)
            if count == 1:
                fused.append(present[0])
                continue
            scores = self.scales[scale](tokens[own[:, None], chosen], None, tuple(features.shape[3:]))
            with torch.autocast(features.device.type, enabled=False):
                weights = scores.softmax(1)
            fused.append(sum(part * weight for part, weight in zip(present, weights.unbind(1), strict=True)))
        if len(fused) == 1:
            return fused[0]
        return torch.cat(fused)[torch.cat(rows).argsort()]


def _weighted_sum(features: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over visible modalities, weighted by the softmax of the scores; all ``(B, M, C, *spatial)``."""
    with torch.autocast(features.device.type, enabled=False):  # keeps the softmax in the features' memory format
        weights = scores.masked_fill(~expand_mask(mask, scores), -torch.inf).softmax(1)
    return (features * weights).sum(1)


if not TYPE_CHECKING:
    __getattr__ = forward(__name__)
