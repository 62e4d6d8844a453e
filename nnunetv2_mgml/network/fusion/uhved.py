"""U-HVED (Dorent et al., MICCAI 2019): each modality is a Gaussian per voxel and channel, fused as a product.

With a standard-normal prior among the experts. The KL term compares the product over what the network sees with those
over all subsets of what the case has, so hidden modalities learn from it, and samples with one visible modality too.
Differences from the published code: the mean is used outside training (theirs samples in tests too) and in the teacher
pass, log-variances are clamped to +-10 and start at -2, the KL term is estimated on random voxels, and the
reconstruction of the images is an option (``reconstruction_weight``, 0.1 in the paper), in which image decoders of our
own shape see the fused features and modalities a case lacks do not count.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    float_mask,
    register,
    sum_present,
)
from nnunetv2_mgml.network.fusion.image_decoder import ImageDecoder, reconstruction_error
from nnunetv2_mgml.network.silence import random_layers_act

_MAX_LOG_VARIANCE = 10.0
_START_LOG_VARIANCE = -2.0


def product_of_gaussians(mean: torch.Tensor, precision: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Product of experts with a standard-normal prior.

    Args:
        mean: ``(B, M, ...)``.
        precision: ``(B, M, ...)`` float32, 1 / variance; 0 where a modality is absent.

    Returns:
        Mean and variance, ``(B, ...)`` float32.
    """
    variance = 1 / (1 + precision.sum(1))
    return (precision * mean).sum(1) * variance, variance


def gaussian_kl(
    mean: torch.Tensor, variance: torch.Tensor, other_mean: torch.Tensor | float, other_variance: torch.Tensor | float
) -> torch.Tensor:
    """``KL(N(mean, variance) || N(other_mean, other_variance))``, elementwise on tensors that broadcast."""
    ratio = variance / other_variance
    return 0.5 * (ratio - ratio.log() + (mean - other_mean).square() / other_variance - 1)


def subset_patterns(num_modalities: int, most: int, device: torch.device) -> torch.Tensor:
    """Return subsets ``(P, M)`` bool: all non-empty ones if they are at most ``most``, else 8 random ones."""
    if 2**num_modalities - 1 <= most:
        codes = torch.arange(1, 2**num_modalities, device=device)  # a list would be copied there, which waits
        return (codes[:, None] >> torch.arange(num_modalities - 1, -1, -1, device=device)) & 1 > 0
    return torch.rand(8, num_modalities, device=device) < 0.5


def subset_kl(
    mean: torch.Tensor,
    precision: torch.Tensor,
    visible: torch.Tensor,
    available: torch.Tensor,
    patterns: torch.Tensor,
) -> torch.Tensor:
    """The divergence term of one scale: ``sum_S KL(q_visible || q_S) / (N - 1) + sum_S KL(q_S || N(0, 1)) / N``.

    ``S`` runs over the ``N`` non-empty subsets of what a sample has, hidden modalities included; one of them is what is
    visible, whose divergence is 0. A pattern is cut down to what the sample has, which keeps them uniform, and one with
    nothing left is ignored. Scalar float32, averaged over batch, channels and voxels.

    Args:
        mean: ``(B, M, C, V)``.
        precision: ``(B, M, C, V)`` float32 or wider, 0 where not available.
        visible: ``(B, M)`` bool, a subset of ``available``.
        available: ``(B, M)`` bool, at least one True per row.
        patterns: ``(P, M)`` bool.
    """
    given_mean, given_variance = product_of_gaussians(mean, precision * float_mask(visible, precision))
    subsets = patterns[:, None] & available  # (P, B, M)
    exists = subsets.any(2).to(precision.dtype)
    chosen = subsets.to(precision.dtype)
    variance = 1 / (1 + torch.einsum("pbm,bmcv->pbcv", chosen, precision))
    subset_mean = torch.einsum("pbm,bmcv->pbcv", chosen, precision * mean) * variance
    to_subset = gaussian_kl(given_mean, given_variance, subset_mean, variance).mean((2, 3))
    to_prior = gaussian_kl(subset_mean, variance, 0.0, 1.0).mean((2, 3))
    number = 2.0 ** available.sum(1) - 1
    terms = to_subset * number / (number - 1).clamp(min=1) + to_prior
    return ((terms * exists).sum(0) / exists.sum(0).clamp(min=1)).mean()


class TrainingPass(NamedTuple):
    """State of a training pass."""

    available: torch.Tensor
    """``(B, M)`` bool, the modalities each case has."""


@register
class UHvedFusion(FusionDesign):
    """Per modality and scale a 1x1 convolution ``C -> 2C`` (mean, log-variance), then the product of the experts."""

    name = "uhved"
    summary = "product of one Gaussian per modality, sampled in training, with a KL term (U-HVED, MICCAI 2019)"
    publication = "U-HVED, MICCAI 2019"
    trainer = "UHVED"
    published_options: ClassVar[dict[str, Any]] = {
        "fusion_options": {"reconstruction_weight": 0.1},
        "mask_sampling": "uniform_count",
    }
    published_alone: ClassVar[dict[str, Any]] = {"modality_decoder_weight": 0.0}
    differences: ClassVar[tuple[str, ...]] = (
        (
            "a 1x1 convolution per modality makes the means and log-variances; the published encoders' own "
            "channels are they"
        ),
        "predictions use the mean; the published code samples in tests too",
        "log-variances within +-10 and starting at -2, without the published 1e-7 added to variances",
        (
            "the divergence is estimated on `kl_voxels` random voxels per scale, and on eight random subsets for "
            "more than four modalities"
        ),
        "image decoders of our own shape; modalities that a case lacks do not count",
    )
    default_options: ClassVar[dict[str, Any]] = {"kl_weight": 0.1, "kl_voxels": 4096, "reconstruction_weight": 0.0}
    weights_depend_on_modality = True
    hides_absent = True
    uses_context = False

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        m = spec.num_modalities
        self.scales = nn.ModuleList(spec.conv_op(m * width, 2 * m * width, 1, groups=m) for width in spec.channels)
        self.images = (
            nn.ModuleList(ImageDecoder(spec) for _ in range(m)) if self.options["reconstruction_weight"] > 0 else None
        )
        self.initialize()

    def initialize(self) -> None:
        """Start the log-variances below the prior's, so that the data outweighs it."""
        for head in self.scales:
            with torch.no_grad():
                bias = cast(torch.Tensor, head.bias).unflatten(0, (self.spec.num_modalities, 2, -1))
                bias[:, 1].fill_(_START_LOG_VARIANCE)

    def share(self, features: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """See `FusionDesign.share`: precision, and precision times mean, float32; nothing where samples are drawn."""
        if random_layers_act(self.training):
            return None
        everywhere = features[0].new_ones(features[0].shape[:2], dtype=torch.bool)
        experts = [self.experts(s, f, everywhere) for s, f in enumerate(features)]
        return [(precision, precision * mean) for mean, precision in experts]

    def begin_training(self, available: torch.Tensor) -> TrainingPass:
        """See `FusionDesign.begin_training`: the divergence counts all modalities a case has."""
        return TrainingPass(available)

    def experts(self, scale: int, features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean (any float) and precision (float32, 0 where absent), both ``(B, M, C, *spatial)``."""
        parameters = self.scales[scale](features.flatten(1, 2)).unflatten(1, (self.spec.num_modalities, 2, -1))
        log_variance = parameters[:, :, 1].clamp(-_MAX_LOG_VARIANCE, _MAX_LOG_VARIANCE)
        precision = (-at_least_float32(log_variance)).exp()
        return parameters[:, :, 0], precision * float_mask(mask, precision)

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        if isinstance(state, list):
            precision, weighted = (sum_present(part, mask) for part in state[scale])
            return FusedScale((weighted / (1 + precision)).to(features.dtype))
        available = state.available if isinstance(state, TrainingPass) else mask
        mean, precision = self.experts(scale, features, available)
        with torch.autocast(features.device.type, enabled=False):
            fused, variance = product_of_gaussians(mean, precision * float_mask(mask, precision))
            if not random_layers_act(self.training):
                return FusedScale(fused.to(features.dtype))
            fused = fused + variance.sqrt() * torch.randn_like(variance)
            divergence = self.divergence(mean.flatten(3), precision.flatten(3), mask, available)
        return FusedScale(fused.to(features.dtype), loss=divergence)

    @property
    def wants_images(self) -> bool:
        """Whether the reconstruction is on."""
        return self.images is not None

    def image_loss(self, fused: list[torch.Tensor], images: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """See `FusionDesign.image_loss`: the weighted reconstruction error."""
        if self.images is None:
            raise RuntimeError("There are no image decoders: reconstruction_weight is 0.")
        predicted = torch.cat([decoder(fused) for decoder in self.images], 1)
        weight: float = self.options["reconstruction_weight"]
        return weight * reconstruction_error(predicted, images, available)

    def divergence(
        self, mean: torch.Tensor, precision: torch.Tensor, visible: torch.Tensor, available: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted KL term of one scale, a scalar float32, on at most ``kl_voxels`` random voxels.

        Args:
            mean: ``(B, M, C, V)``.
            precision: ``(B, M, C, V)`` float32.
            visible: ``(B, M)`` bool.
            available: ``(B, M)`` bool.
        """
        if mean.shape[3] > self.options["kl_voxels"]:
            voxels = torch.randint(mean.shape[3], (self.options["kl_voxels"],), device=mean.device)
            mean, precision = mean.index_select(3, voxels), precision.index_select(3, voxels)
        patterns = subset_patterns(visible.shape[1], 15, visible.device)
        divergence = subset_kl(at_least_float32(mean), precision, visible, available, patterns)
        weight: float = self.options["kl_weight"]
        return weight / self.spec.num_scales * divergence
