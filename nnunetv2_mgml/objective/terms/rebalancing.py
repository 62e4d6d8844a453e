"""PASSION's rebalancing, for training cases that lack modalities at unequal rates. The losses: `rebalancing`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.objective.balance import ModalityBalance
from nnunetv2_mgml.objective.base import Progress, SharedOptions, Term, TermSpec, TermValue, register
from nnunetv2_mgml.objective.rebalancing import rebalancing_terms
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.plans.options import OptionGroup, Options, option


@dataclass(frozen=True)
class RebalancingOptions(OptionGroup):
    """Of `Rebalancing`."""

    rebalancing: str = option(
        "none",
        "passion: modalities that lag behind the fused prediction learn more from it (M "
        "more passes of the fusion decoder in training); none: off",
        choices=("none", "passion"),
    )
    rebalancing_temperature: float = option(4.0, "tau of its distillation", low=0.1)
    rebalancing_distillation_weight: float = option(
        0.125, "weight of its distillation, a sum over classes (published: 0.5 on the mean over 4 classes)", low=0
    )
    rebalancing_prototype_weight: float = option(0.1, "weight of its prototype term", low=0)
    rebalancing_rate: float = option(
        0.01,
        "step of the balance weights per epoch (eta), times 1.5 from the start and "
        "again after each third of the training",
        low=0,
    )

    def check(self, options: Options) -> None:
        """Refuse steps of which what is hidden is no part: every modality is weighed in each."""
        every = options.objective[SharedOptions].complete_every
        if self.rebalancing != "none" and every is not None and every > 1:
            raise ValueError(
                f"complete_every is {every}, but rebalancing={self.rebalancing} needs all that a case has in every "
                "step. Set it to 1 or null."
            )


@register
class Rebalancing(Term):
    """Teaches the fusion decoder on each modality alone, and weighs the modalities for the terms after it."""

    name = "rebalancing"
    order = 30
    summary = "modalities that lag behind the fused prediction learn more from it (Shi et al., ACM MM 2024)"
    option_group = RebalancingOptions
    in_every_step = True

    def __init__(self, spec: TermSpec) -> None:
        super().__init__(spec)
        self.options = spec.options.objective[RebalancingOptions]
        self.balance = ModalityBalance(spec.channels, self.options.rebalancing_rate)

    @classmethod
    def active(cls, options: Options) -> bool:
        """Where it is chosen."""
        return options.objective[RebalancingOptions].rebalancing != "none"

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """The teacher has all that is available; where nothing is hidden, that is the prediction there is anyway."""
        return Needs(complete="no" if options.sampling.mask_sampling == "fixed" else "target", single=True)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        balance = self.balance.weights(step.available.device)
        terms = rebalancing_terms(
            step.single,
            step.labels,
            step.valid_per_resolution,
            step.available,
            balance,
            num_classes=self.spec.num_classes,
            temperature=self.options.rebalancing_temperature,
            regions=self.spec.regions,
        )
        self.balance.observe(terms.distance, step.available)
        step.modality_weights = (1 + step.ramp * (terms.switch - 1)) * balance.beta * balance.count
        loss = step.ramp * (
            self.options.rebalancing_distillation_weight * terms.distillation
            + self.options.rebalancing_prototype_weight * terms.prototype
        )
        return TermValue(loss, {"distillation": terms.distillation, "prototype": terms.prototype})

    def begin_training(self, availability: Iterable[Subset]) -> None:
        """Count how many training cases have each modality."""
        self.balance.count_cases(availability)

    def end_epoch(self, progress: Progress, ramp: float) -> dict[str, float]:
        """Weigh the modalities anew once the warm-up is over."""
        return self.balance.end_epoch(progress.epoch, progress.num_epochs, ramp >= 1)

    def training_state(self) -> dict[str, Any]:
        """See `Term.training_state`."""
        return {"balance": self.balance.state_dict()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """See `Term.load_training_state`; the checkpoint may be of other modalities."""
        self.balance.load_state_dict(state["balance"])
