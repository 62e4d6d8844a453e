"""Meta-AMF (section 3.2, eq. 1-8): every modality alone learns from the fusion of all, the soft label.

Equations: `meta_network` (1-2), `adaptive_fusion` (3-5), `voxel_masking` (6), `distillation` (7-8).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nnunetv2_mgml.network.interface import Needs, TrainingOutput, View, bare
from nnunetv2_mgml.objective.adaptive_fusion import adaptive_fusion, mean_fusion
from nnunetv2_mgml.objective.base import Progress, SharedOptions, Term, TermSpec, TermValue, find_term, register
from nnunetv2_mgml.objective.distillation import soft_label_loss
from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters
from nnunetv2_mgml.objective.reading import ReadingOptions
from nnunetv2_mgml.objective.segmentation import class_mass, segmentation_of_log_probabilities
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.objective.tensors import no_autocast
from nnunetv2_mgml.objective.voxel_masking import keep_map
from nnunetv2_mgml.plans.options import FLOAT_OR_NONE, OptionGroup, Options, option

_NO_PARAMETERS_CONFIDENCE = 0.5  # a mean has no w_f; at 0.5 the dropped share is mask_ratio itself


@dataclass(frozen=True)
class SoftLabelOptions(OptionGroup):
    """Of `SoftLabel`."""

    soft_label: str = option(
        "meta_amf",
        "meta_amf: eq. 1-5; fixed: smooth max and min with fixed parameters (the "
        "paper's FPSLD); mean: mean of log-probabilities; none: no soft label",
        choices=("meta_amf", "fixed", "mean", "none"),
    )
    soft_label_weight: float | None = option(
        0.5,
        "lambda2 of eq. 10, on a loss averaged over voxels and scaled by temperature^2 (the paper's 0.3 tau^2/10 "
        "is for a sum over voxels). At 1 its gradient was 0.18 to 0.54 of the modality loss's (ten BraTS cases, "
        "400 steps, one encoder each), so 0.5 keeps it at 0.1 to 0.3. null: 0.3 temperature^2 / 10, as published",
        low=0,
        kinds=FLOAT_OR_NONE,
    )
    mask_ratio: float = option(
        0.2, "expected share of voxels dropped from the soft-label loss at w_f = 0.5 (eq. 6)", low=0, high=0.95
    )
    mask_mode: str = option(
        "confidence",
        "confidence: unsure voxels are dropped more often; uniform: all alike; published, with reading=reference: "
        "its mask_ratio draws per voxel with replacement, a map per modality. That reading has no confidence: "
        "all alike instead",
        choices=("confidence", "uniform", "published"),
    )
    meta_objective: str = option(
        "ground_truth",
        "what trains the MetaNetwork. ground_truth: segmentation loss of the soft label; soft_label: "
        "L_SL as in the paper (w_f ran to 0 or 1 within 100 steps in prototypes), and in both published readings "
        "whatever is set here",
        choices=("ground_truth", "soft_label"),
    )
    meta_hidden: int = option(64, "width of the MetaNetwork's hidden layer", low=1)
    meta_lr: float = option(2e-4, "learning rate of the MetaNetwork's Adam, poly schedule", low=0)
    meta_form: str = option(
        "ours",
        "start and optimiser of the MetaNetwork. ours: its output layer starts so small that the start values hold for "
        "any input; published, as in the code: PyTorch's own spread, T1 and T2 in [0.05, 0.95], Adam with amsgrad at a "
        "constant rate",
        choices=("ours", "published"),
    )
    sharpness_min: float = option(0.5, "lower bound of beta and alpha (eq. 2)", low=1e-3)
    sharpness_max: float = option(
        20.0, "upper bound of beta and alpha; above 20 smooth max equals max to 1e-3", low=1e-3
    )
    fixed_sharpness: float = option(100.0, "beta = alpha of soft_label=fixed (the paper's Table 2)", low=1e-3)
    fixed_confidence: float = option(0.5, "w_f of soft_label=fixed", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpness_min >= self.sharpness_max:
            raise ValueError(
                f"sharpness_min ({self.sharpness_min}) must be below sharpness_max ({self.sharpness_max})."
            )

    @property
    def on(self) -> bool:
        """Whether modalities are taught by a soft label."""
        return self.soft_label != "none" and (self.soft_label_weight is None or self.soft_label_weight > 0)

    def weight(self, temperature: float) -> float:
        """Return lambda2 at a temperature."""
        return published_weight(temperature) if self.soft_label_weight is None else self.soft_label_weight

    @property
    def published_meta(self) -> bool:
        """Whether the MetaNetwork starts and is trained as in the published code."""
        return self.meta_form == "published"

    @property
    def has_meta_network(self) -> bool:
        """Whether the soft label's parameters are predicted by a MetaNetwork."""
        return self.on and self.soft_label == "meta_amf"


def published_weight(temperature: float) -> float:
    """Return the published lambda2, ``0.3 tau^2 / 10``."""
    return 0.3 * temperature**2 / 10


class Fused(NamedTuple):
    """A soft label before its softmax."""

    scores: torch.Tensor
    """``S``, log-scores ``(B, K, *spatial)``; ``softmax(S / tau)`` is the soft label."""
    w_f: torch.Tensor
    """``(B,)``, how confident the fusion is."""
    parameters: MetaParameters | None
    """What it was fused with; None for a mean."""


@register
class SoftLabel(Term):
    """Trains the encoders and the shared decoder; beside them, and through nothing else, the MetaNetwork, its own."""

    name = "soft_label"
    order = 50
    summary = "distillation from the fusion of all modalities' predictions (Meta-AMF, eq. 1-8)"
    option_group = SoftLabelOptions

    def __init__(self, spec: TermSpec) -> None:
        super().__init__(spec)
        self.options = spec.options.objective[SoftLabelOptions]
        shared = spec.options.objective[SharedOptions]
        self.temperature = shared.temperature
        self.weight = self.options.weight(shared.temperature)
        self.only_where_better = shared.teaching == "better"
        self.meta_network: MetaNetwork | None = None
        if self.options.has_meta_network:
            self.meta_network = self.build_meta_network()
            self.optimizer = torch.optim.Adam(
                self.meta_network.parameters(), self.options.meta_lr, amsgrad=self.options.published_meta
            )

    @classmethod
    def active(cls, options: Options) -> bool:
        """With a soft label and a weight."""
        return options.objective[SoftLabelOptions].on

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """See `Term.needs`."""
        return Needs(modality=True)

    def build_meta_network(self) -> MetaNetwork:
        """Return a new MetaNetwork."""
        sharpness = (self.options.sharpness_min, self.options.sharpness_max)
        return MetaNetwork(
            self.spec.num_modalities,
            self.spec.num_classes,
            self.options.meta_hidden,
            sharpness,
            published_start=self.options.published_meta,
        )

    def present(self, step: Step) -> torch.Tensor:
        """Return which (sample, modality) pairs take part, ``(B, M)`` bool."""
        return step.available

    def parameters_of(self, step: Step) -> MetaParameters:
        """Return the fusion's parameters: the MetaNetwork's, or fixed ones."""
        means = step.mean_probabilities
        if self.meta_network is None:
            return MetaParameters.fixed(
                len(means), self.options.fixed_confidence, self.options.fixed_sharpness, means.device
            )
        parameters: MetaParameters = self.meta_network(self.meta_input(means), self.present(step))
        return parameters

    def meta_input(self, means: torch.Tensor) -> torch.Tensor:
        """Return what the MetaNetwork sees of the mean probabilities ``(B, M, K)``: no gradient passes."""
        return means.detach()

    def fuse(self, step: Step) -> Fused:
        """Return the soft label of a step, which needs the shared decoder's predictions only."""
        if self.options.soft_label == "mean":
            scores = mean_fusion(step.log_probabilities, self.present(step), normalised=True)
            return Fused(scores, torch.full_like(step.mean_probabilities[:, 0, 0], _NO_PARAMETERS_CONFIDENCE), None)
        parameters = self.parameters_of(step)
        scores = adaptive_fusion(step.log_probabilities, self.present(step), parameters, normalised=True)
        return Fused(scores, parameters.w_f, parameters)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        with no_autocast(step.log_probabilities):
            present = self.present(step)
            fused = self.fuse(step)
            log_soft = fused.scores.log_softmax(1)[:, None]
            keep = keep_map(
                log_soft[:, 0].detach().exp(),
                fused.w_f,
                self.options.mask_ratio,
                self.options.mask_mode,
                valid=step.modality_valid,
            )
            trains_meta = self.meta_network is not None and self.options.meta_objective == "soft_label"
            loss = soft_label_loss(
                step.log_probabilities,
                fused.scores,
                present,
                keep,
                self.temperature,
                step.modality_valid,
                train_target=trains_meta,
                labels=step.modality_labels if self.only_where_better else None,
            )
            parts, total = {"soft_label": loss}, self.weighted(loss, step)
            if self.meta_network is not None and not trains_meta:
                parts["meta"] = self._loss_of_soft_label(log_soft, step)
                total = total + parts["meta"]
            return TermValue(total, parts, self.noted(fused.parameters))

    def _loss_of_soft_label(self, log_soft: torch.Tensor, step: Step) -> torch.Tensor:
        """L_meta: Dice + cross-entropy of the soft label; only the fusion's parameters get a gradient from it."""
        return segmentation_of_log_probabilities(
            log_soft,
            class_mass(log_soft, step.modality_valid),
            step.modality_labels,
            step.modality_valid,
            torch.ones_like(step.available[:, :1]),
            self.spec.batch_dice,
        )

    def weighted(self, loss: torch.Tensor, step: Step) -> torch.Tensor:
        """Return the distillation loss as it enters the total."""
        return step.ramp * self.weight * loss

    def noted(self, parameters: MetaParameters | None) -> dict[str, torch.Tensor]:
        """Return the batch means of what the MetaNetwork said, for the log."""
        if self.meta_network is None or parameters is None:
            return {}
        return {name: value.mean() for name, value in zip(MetaParameters._fields, parameters, strict=True)}

    def begin_epoch(self, progress: Progress) -> None:
        """Put the MetaNetwork's learning rate on the same poly schedule as the network's; the published is constant."""
        if self.options.published_meta:
            return
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = self.options.meta_lr * (1 - progress.epoch / progress.num_epochs) ** 0.9

    state_options = ("reading", "meta_form", "meta_hidden", "sharpness_min", "sharpness_max")

    def training_state(self) -> dict[str, Any]:
        """See `Term.training_state`."""
        if self.meta_network is None or self.optimizer is None:
            return {}
        return {"meta_network": bare(self.meta_network).state_dict(), "meta_optimizer": self.optimizer.state_dict()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """See `Term.load_training_state`."""
        if self.meta_network is not None and self.optimizer is not None:
            bare(self.meta_network).load_state_dict(state["meta_network"])
            # a copy, since on a CPU the optimiser would keep the tensors, and with them the mapped file
            self.optimizer.load_state_dict(copy.deepcopy(state["meta_optimizer"]))
            if self.options.published_meta:  # constant, and what came with the state is what it was then
                for group in self.optimizer.param_groups:
                    group["lr"] = self.options.meta_lr


def soft_label_of(
    spec: TermSpec, training_state: Mapping[str, Any], logits: torch.Tensor, available: torch.Tensor
) -> Fused | None:
    """Return the soft label a trained model teaches its modalities, in the reading it was trained with.

    Args:
        spec: of the model's objective.
        training_state: what the checkpoint keeps of the objective (`Objective.training_state`).
        logits: of the decoder shared by all modalities, ``(B, M, K, *spatial)``.
        available: ``(B, M)`` bool.

    Returns:
        None where it was trained without, or where the checkpoint does not hold the MetaNetwork.
    """
    kind = find_term(SoftLabel.name, spec.options.objective[ReadingOptions].reading)
    if not issubclass(kind, SoftLabel) or not kind.active(spec.options):
        return None
    term = kind(spec).to(logits.device)
    if term.meta_network is not None:
        if training_state.get("meta_network") is None:
            return None
        term.meta_network.load_state_dict(training_state["meta_network"])
    output = TrainingOutput([], [], logits.new_zeros(()), logits)
    with no_autocast(logits):
        return term.fuse(Step(spec, output, View(available), None))
