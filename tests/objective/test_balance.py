"""How strongly the terms pull at the logits, next to the segmentation losses they accompany, at the default weights.

The data: an ellipsoid tumour, class shares about 0.87, 0.01, 0.10, 0.02, and smooth errors that differ by modality.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from loss_cases import meta_network_of, nnunet_loss, objective_of
from torch.nn import functional as F

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.adaptive_fusion import adaptive_fusion, mean_fusion
from nnunetv2_mgml.objective.consistency import consistency_loss
from nnunetv2_mgml.objective.distillation import soft_label_loss
from nnunetv2_mgml.objective.segmentation import modality_segmentation_loss
from nnunetv2_mgml.objective.voxel_masking import keep_map

ALL = torch.ones(2, 4).bool()
SEEN = torch.tensor([[True, False, True, False], [False, True, False, False]])


def prediction(size: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels ``(2, size, size, size)`` and modality logits ``(2, 4, 4, size, size, size)``."""
    generator = torch.Generator().manual_seed(0)
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij")
    radius = (z / 0.65) ** 2 + (y / 0.6) ** 2 + (x / 0.61) ** 2
    labels = torch.zeros(2, size, size, size, dtype=torch.long)
    for label, limit in ((2, 1.0), (3, 0.36), (1, 0.11)):
        labels[:, radius < limit] = label
    noise = F.avg_pool3d(torch.randn(8, 4, size, size, size, generator=generator), 3, 1, 1).unflatten(0, (2, 4))
    truth = F.one_hot(labels, 4).movedim(-1, 1)[:, None]
    clarity = torch.rand(2, 4, 4, 1, 1, 1, generator=generator) * 0.8 + 0.4
    return labels, scale * (truth * clarity + 0.25 * noise / noise.std())


def as_regions(log_probabilities: torch.Tensor) -> torch.Tensor:
    """Logits of the three nested BraTS regions from label log-probabilities ``(B, 4, ...)``."""
    return torch.stack(
        [log_probabilities[:, k:].logsumexp(1) - log_probabilities[:, :k].logsumexp(1) for k in (1, 2, 3)], 1
    )


def pull(loss: torch.Tensor, at: torch.Tensor) -> float:
    return torch.autograd.grad(loss, at)[0].norm().item()


def ratios(labels: torch.Tensor, logits: torch.Tensor) -> tuple[float, float]:
    """Gradient of L_SL relative to the modality loss, and of L_CR relative to nnU-Net's loss, all weighted."""
    torch.manual_seed(0)
    config = SimpleNamespace(**Options().as_dict())
    target = torch.stack([labels >= k for k in (1, 2, 3)], 1)
    logits.requires_grad_()
    meta = meta_network_of(objective_of(Options()))(logits.detach().softmax(2).mean((3, 4, 5)), ALL)
    fused = adaptive_fusion(logits, ALL, meta).detach()
    keep = keep_map(fused.softmax(1), meta.w_f, config.mask_ratio, config.mask_mode)
    taught = config.soft_label_weight * soft_label_loss(logits, fused, ALL, keep, config.temperature)
    own = config.modality_decoder_weight * modality_segmentation_loss(logits, labels, None, ALL)
    student = as_regions(mean_fusion(logits, SEEN).log_softmax(1)).requires_grad_()
    teacher = as_regions(mean_fusion(logits, ALL).log_softmax(1))
    consistent = config.consistency_weight * consistency_loss(student, teacher, SEEN, ALL, config.temperature, True)
    return (
        pull(taught, logits) / pull(own, logits),
        pull(consistent, student) / pull(nnunet_loss(regions=True)(student, target), student),
    )


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_terms_accompany_and_do_not_drown(scale: float) -> None:
    """Bounds around what was measured here. On the weights of a network the ratios are 1.6 to 7 times smaller for
    L_SL: its gradients of neighbouring voxels cancel, those of the segmentation losses add up."""
    soft_label, consistency = ratios(*prediction(32, scale))
    assert 0.1 < soft_label < 2.5
    assert 0.005 < consistency < 0.4


def test_balance_does_not_depend_on_the_patch() -> None:
    """The published L_CR went from 0.013 to 1.5 of the segmentation gradient between 16^3 and 80^3."""
    labels, logits = prediction(16, 2.0)
    tiled = labels.repeat(1, 2, 2, 2), logits.repeat(1, 1, 1, 2, 2, 2)
    for small, large in zip(ratios(labels, logits), ratios(*tiled), strict=True):
        assert large == pytest.approx(small, rel=0.02)
