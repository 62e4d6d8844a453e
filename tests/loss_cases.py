"""Inputs for the loss tests, and slow, obvious float64 versions of the formulas (numpy, loops over voxels)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunetv2_mgml.objective import Objective, Options, TermSpec
from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters
from nnunetv2_mgml.objective.terms.soft_label import SoftLabel


def randn(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def bools(*shape: int, seed: int = 0, chance: float = 0.5) -> torch.Tensor:
    """Random booleans with at least one True per row of the last axis."""
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < chance
    drawn[..., 0] |= ~drawn.any(-1)
    return drawn


def labels_of(*shape: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def parameters(
    batch: int,
    seed: int = 0,
    low: float = 0.5,
    high: float = 20.0,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
) -> MetaParameters:
    drawn = torch.rand(5, batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    drawn[3:] = drawn[3:] * (high - low) + low
    return MetaParameters(*(row.clone().requires_grad_(requires_grad) for row in drawn))


def nnunet_loss(regions: bool, ignore_label: int | None = None) -> nn.Module:
    """The stock loss without deep supervision."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss(
            {}, dice, use_ignore_label=ignore_label is not None, dice_class=MemoryEfficientSoftDiceLoss
        )
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


def objective_of(options: Options, modalities: int = 4, classes: int = 4, **changes: Any) -> Objective:
    """An objective for regions, or for what ``changes`` of `TermSpec` say."""
    spec = {"regions": True, "segmentation_loss": nnunet_loss(True), **changes}
    return Objective(TermSpec(options, tuple(f"m{m}" for m in range(modalities)), classes, **spec))


def meta_network_of(objective: Objective) -> MetaNetwork | None:
    """The MetaNetwork of an objective, None where it has none."""
    term = dict(objective.terms).get("soft_label")
    return term.meta_network if isinstance(term, SoftLabel) else None


def softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max()
    return shifted - math.log(np.exp(shifted).sum())


def kl(target: np.ndarray, other: np.ndarray) -> float:
    """Divergence of two distributions given as log-probabilities."""
    return float(sum(math.exp(t) * (t - o) for t, o in zip(target, other, strict=True)))


def log_mean_exp(values: list[float], sharpness: float) -> float:
    """Smooth max of a list of numbers (smooth min for a negative sharpness)."""
    scaled = [sharpness * v for v in values]
    top = max(scaled)
    return (top + math.log(sum(math.exp(v - top) for v in scaled) / len(scaled))) / sharpness


def slow_fusion(logits: torch.Tensor, available: torch.Tensor, p: MetaParameters) -> np.ndarray:
    """Eq. 3-5 with loops; ``(B, M, K, *spatial)`` -> ``(B, K, N)``."""
    values = logits.double().flatten(3).numpy()
    batch, modalities, classes, voxels = values.shape
    result = np.zeros((batch, classes, voxels))
    for b in range(batch):
        w_f, beta, alpha = (float(x[b]) for x in (p.w_f, p.beta, p.alpha))
        for v in range(voxels):
            per_modality = [log_softmax(values[b, m, :, v]) for m in range(modalities) if available[b, m]]
            for k in range(classes):
                scores = [float(modality[k]) for modality in per_modality]
                result[b, k, v] = w_f * log_mean_exp(scores, beta) + (1 - w_f) * log_mean_exp(scores, -alpha)
    return result


def slow_soft_label_loss(
    logits: torch.Tensor,
    fused: torch.Tensor,
    available: torch.Tensor,
    keep: torch.Tensor,
    temperature: float,
    labels: torch.Tensor | None = None,
) -> float:
    """Eq. 7-8 as implemented, with loops; with labels only where the soft label is nearer to them."""
    values, scores = logits.double().flatten(3).numpy(), fused.double().flatten(2).numpy()
    kept = keep.flatten(2)[:, 0].numpy()
    pairs = []
    for b, m in np.argwhere(available.numpy()):
        voxels = np.flatnonzero(kept[b])
        divergences = []
        for v in voxels:
            soft, own = (log_softmax(x / temperature) for x in (scores[b, :, v], values[b, m, :, v]))
            true = None if labels is None else labels[b].flatten()[v]
            divergences.append(kl(soft, own) if true is None or soft[true] > own[true] else 0.0)
        pairs.append(temperature**2 * sum(divergences) / max(len(voxels), 1))
    return float(np.mean(pairs))


def slow_consistency_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    available: torch.Tensor,
    temperature: float,
    regions: bool,
    valid: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
) -> float:
    """Eq. 9 as implemented, with loops; with ``truth`` only where the teacher is nearer to it."""
    students, teachers = (x.double().flatten(2).numpy() / temperature for x in (student, teacher))
    samples = []
    for b in range(len(students)):
        if torch.equal(mask[b], available[b]):
            continue
        voxels = range(students.shape[2]) if valid is None else np.flatnonzero(valid[b].flatten().numpy())
        total = 0.0
        for v in voxels:
            if regions:
                for r, (t, s) in enumerate(zip(teachers[b, :, v], students[b, :, v], strict=True)):
                    if truth is None or (t > s) == bool(truth[b, r].flatten()[v]):
                        total += kl(log_softmax(np.array([t, 0])), log_softmax(np.array([s, 0])))
            else:
                log_t, log_s = log_softmax(teachers[b, :, v]), log_softmax(students[b, :, v])
                true = None if truth is None else truth[b].flatten()[v]
                total += kl(log_t, log_s) if true is None or log_t[true] > log_s[true] else 0.0
        samples.append(total / max(len(voxels), 1))
    return temperature**2 * float(np.mean(samples)) if samples else 0.0


def slow_segmentation_loss(
    logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor, present: torch.Tensor
) -> float:
    """Dice + cross-entropy per present pair, with loops."""
    values, truth, counted = logits.double().flatten(3).numpy(), labels.flatten(1).numpy(), valid.flatten(1).numpy()
    pairs = []
    for b, m in np.argwhere(present.numpy()):
        voxels = np.flatnonzero(counted[b])
        probabilities = [softmax(values[b, m, :, v]) for v in voxels]
        entropy = sum(-math.log(p[truth[b, v]]) for p, v in zip(probabilities, voxels, strict=True))
        dice = []
        for k in range(1, values.shape[2]):
            overlap = sum(p[k] for p, v in zip(probabilities, voxels, strict=True) if truth[b, v] == k)
            sizes = sum(p[k] for p in probabilities) + sum(truth[b, v] == k for v in voxels)
            dice.append((2 * overlap + 1e-5) / (sizes + 1e-5))
        pairs.append(entropy / max(len(voxels), 1) - np.mean(dice))
    return float(np.mean(pairs))


def slow_divergence(
    students: list[torch.Tensor],
    teacher: list[torch.Tensor],
    temperature: float,
    regions: bool,
    valid: list[torch.Tensor] | None = None,
) -> np.ndarray:
    """PASSION's KL per sample and modality, with loops: all but the lowest resolution, halved from one to the next."""
    batch, modalities = students[0].shape[:2]
    result = np.zeros((batch, modalities))
    for scale in range(max(1, len(students) - 1)):
        everywhere = torch.ones(batch, *students[scale].shape[3:]).bool()
        counted = (everywhere if valid is None else valid[scale]).flatten(1).numpy()
        s = students[scale].double().flatten(3).numpy() / temperature
        t = teacher[scale].double().flatten(2).numpy() / temperature
        for b, m in np.ndindex(batch, modalities):
            values = []
            for v in np.flatnonzero(counted[b]):
                if regions:
                    values.append(
                        sum(
                            kl(log_softmax(np.array([x, 0])), log_softmax(np.array([y, 0])))
                            for x, y in zip(t[b, :, v], s[b, m, :, v], strict=True)
                        )
                    )
                else:
                    values.append(kl(log_softmax(t[b, :, v]), log_softmax(s[b, m, :, v])))
            result[b, m] += temperature**2 / 2**scale * np.mean(values)
    return result


def slow_prototype_distances(
    features: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared and mean absolute difference of the cosine maps, with loops."""
    students, fused = features.double().flatten(3).numpy(), teacher.double().flatten(2).numpy()
    truth = labels.flatten(1).numpy()
    counted = np.ones_like(truth, dtype=bool) if valid is None else valid.flatten(1).numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    squared, absolute = np.zeros(students.shape[:2]), np.zeros(students.shape[:2])
    for b, m in np.ndindex(students.shape[:2]):
        voxels = np.flatnonzero(counted[b])
        differences = []
        for k in set(truth[b, voxels]):
            inside = [v for v in voxels if truth[b, v] == k]
            own, other = students[b, m][:, inside].mean(1), fused[b][:, inside].mean(1)
            differences += [cosine(students[b, m][:, v], own) - cosine(fused[b][:, v], other) for v in voxels]
        squared[b, m], absolute[b, m] = np.mean(np.square(differences)), np.mean(np.abs(differences))
    return squared, absolute
