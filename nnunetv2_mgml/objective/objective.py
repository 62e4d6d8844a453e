"""`Objective`: the total loss (eq. 10), the sum of the terms that are on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.interface import Needs, TrainingOutput, View
from nnunetv2_mgml.objective.base import OURS, Progress, SharedOptions, Term, TermSpec, find_term, loss_terms
from nnunetv2_mgml.objective.reading import ReadingOptions
from nnunetv2_mgml.objective.step import Step, Target
from nnunetv2_mgml.plans.options import Options, differing

_COMPLETE_EVERY = 4
"""``complete_every`` where it is null."""
_ALWAYS_STORED = ("meta_network", "meta_optimizer")  # None without a MetaNetwork; version 0.1 looks for them


class ObjectiveValue(NamedTuple):
    """Result of `Objective`; all but the total without gradient."""

    total: torch.Tensor
    """Scalar for backward."""
    parts: dict[str, torch.Tensor]
    """Scalars, unweighted, of the terms that are on."""
    noted: dict[str, torch.Tensor]
    """Further scalars, such as the batch means of the meta-parameters."""
    columns: dict[str, torch.Tensor]
    """All of them under the names of their columns in the log, in the order of the terms."""


def active_terms(options: Options) -> list[type[Term]]:
    """Return the terms the options switch on, in the order in which they are computed."""
    reading = options.objective[ReadingOptions].reading
    terms = (find_term(name, reading) for name in loss_terms())
    return [term for term in terms if term.active(options)]


def needs_of(options: Options) -> Needs:
    """Return what the terms that are on want of the network, in a full step."""
    return _union(active_terms(options), options)


def complete_every(options: Options) -> int:
    """Return which steps are full: every how many.

    Raises:
        ValueError: more than 1 is asked for where a term acts in every step.
    """
    asked = options.objective[SharedOptions].complete_every
    always = [term.name for term in active_terms(options) if term.in_every_step]
    if asked is not None and asked > 1 and always:
        raise ValueError(
            f"complete_every is {asked}, but {', '.join(always)} needs all that a case has in every step. Set it to 1 "
            "or null."
        )
    if asked is not None:
        return asked
    return 1 if always or options.objective[ReadingOptions].reading != OURS else _COMPLETE_EVERY


def _union(terms: Iterable[type[Term] | Term], options: Options) -> Needs:
    needs = Needs()
    for term in terms:
        needs = needs.union(term.needs(options))
    return needs


class Objective(nn.Module):
    """The terms that are on, what they want of the network, and their total.

    Its parameters are the terms' own (the MetaNetwork); they are trained by `optimizers`, not by the network's.

    A step is *full* unless ``complete_every`` leaves that to others (`is_full`). In the steps between, terms that want
    predictions from all a case has are left out, and for the others it has what is visible.

    Args:
        spec: what the terms are built from.
    """

    def __init__(self, spec: TermSpec) -> None:
        super().__init__()
        self.spec = spec
        self.terms = nn.ModuleDict({term.name: term(spec) for term in active_terms(spec.options)})
        self.needs = needs_of(spec.options)
        """Of a full step."""
        self.complete_every = complete_every(spec.options)

    def each(self, full: bool = True) -> Iterator[Term]:
        """Yield the terms; ``full=False``: those of the steps between."""
        for term in self.terms.values():
            if full or cast(Term, term).needs(self.spec.options).complete == "no":
                yield cast(Term, term)

    def is_full(self, progress: Progress) -> bool:
        """Return whether the next step is a full one; the first of every epoch is."""
        return progress.step % self.complete_every == 0

    def needs_in(self, full: bool) -> Needs:
        """Return what is wanted of the network in a full step, or in one between."""
        return self.needs if full else _union(self.each(full), self.spec.options)

    def draw_view(
        self,
        visible: torch.Tensor,
        available: torch.Tensor,
        own_images: torch.Tensor | None = None,
        full: bool = True,
    ) -> View:
        """Return what the network is shown in a step, with the further subsets that terms draw.

        Args:
            visible: ``(B, M)`` bool, what the student sees.
            available: ``(B, M)`` bool, what each case has.
            own_images: see `View`.
            full: whether the step is; else what is hidden is not shown to anything.
        """
        available = available if full else visible
        drawn = [term.draw_subsets(visible, available) for term in self.each(full) if self._count(term)]
        return View(visible, available, own_images if full else None, torch.cat(drawn, 1) if drawn else None)

    def _count(self, term: Term) -> int:
        return term.needs(self.spec.options).subsets

    def _places(self, full: bool) -> dict[str, slice]:
        places, start = {}, 0
        for term in self.each(full):
            count = self._count(term)
            places[term.name] = slice(start, start + count)
            start += count
        return places

    def forward(
        self, output: TrainingOutput, target: Target, view: View, ramp: float = 1.0, full: bool = True
    ) -> ObjectiveValue:
        """Compute all terms of a step.

        Args:
            output: of the network, called with this view and the needs of such a step (`needs_in`).
            target: nnU-Net's target, a list (highest resolution first) under deep supervision.
            view: what the network was shown.
            ramp: weight in [0, 1] of the terms that grow over the first epochs, see `ramp`.
            full: whether the step is, see `is_full`.

        Raises:
            ValueError: the output lacks what a term needs, or has another number of classes.
        """
        needs = self.needs_in(full)
        lacking = output.lacks(needs)
        if lacking:
            raise ValueError(
                f"The network returned no {', '.join(lacking)}. Call it with the needs of the objective: {needs}."
            )
        step = Step(self.spec, output, view, target, ramp, self._places(full))
        total: torch.Tensor | None = None
        parts: dict[str, torch.Tensor] = {}
        noted: dict[str, torch.Tensor] = {}
        columns: dict[str, torch.Tensor] = {}
        for term in self.each(full):
            value = term(step)
            total = value.loss if total is None else total + value.loss
            doubles = sorted(({*value.parts} & {*parts}) | ({*value.noted} & {*noted}))
            if doubles:
                raise ValueError(f"Loss term '{term.name}' logs {', '.join(doubles)}, which another term logs too.")
            noted.update({name: scalar.detach() for name, scalar in value.noted.items()})
            columns.update({name: scalar.detach() for name, scalar in value.noted.items()})
            parts.update({name: scalar.detach() for name, scalar in value.parts.items()})
            columns.update({f"train_{name}": scalar.detach() for name, scalar in value.parts.items()})
        if total is None:
            raise ValueError("No loss term is on.")
        return ObjectiveValue(total, parts, noted, columns)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimisers of the terms' own parameters."""
        return [term.optimizer for term in self.each() if term.optimizer is not None]

    def distribute(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Wrap each module with parameters that a term owns, as DistributedDataParallel does, in place."""
        for term in self.each():
            for name, module in list(term.named_children()):
                if any(parameter.requires_grad for parameter in module.parameters()):
                    setattr(term, name, wrap(module))

    def ramp(self, progress: Progress) -> float:
        """Return the weight in [0, 1] of the terms that grow over the first epochs."""
        return progress.ramp(self.spec.options.objective[SharedOptions].ramp_up_fraction)

    def begin_training(self, availability: Iterable[Subset]) -> None:
        """Tell the terms, before the first epoch, what each training case has."""
        subsets = list(availability)
        for term in self.each():
            term.begin_training(subsets)

    def begin_epoch(self, progress: Progress) -> None:
        """Tell the terms that an epoch begins."""
        for term in self.each():
            term.begin_epoch(progress)

    def end_epoch(self, progress: Progress) -> dict[str, float]:
        """Tell the terms that an epoch ends; return their columns for the log."""
        ramp = self.ramp(progress)
        return {name: value for term in self.each() for name, value in term.end_epoch(progress, ramp).items()}

    def training_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the terms so that training resumes exactly."""
        state: dict[str, Any] = dict.fromkeys(_ALWAYS_STORED)
        for term in self.each():
            state |= term.training_state()
        return state

    def load_training_state(self, state: Mapping[str, Any], options: Options) -> None:
        """Take over the state of a checkpoint.

        Args:
            state: what `training_state` returned.
            options: those the checkpoint was trained with.

        Raises:
            ValueError: it was trained with terms that keep another state, or one of another meaning; the message names
                the options that differ.
        """
        stored, own = (
            {name for name, value in some.items() if value is not None} for some in (state, self.training_state())
        )
        if stored != own:
            raise ValueError(self._mismatch(options, stored ^ own))
        decisive = {name for term in self.each() if term.training_state() for name in term.state_options}
        if any(options.value(name) != self.spec.options.value(name) for name in decisive):
            raise ValueError(self._mismatch(options, stored))
        for term in self.each():
            term.load_training_state(state)

    def _mismatch(self, options: Options, keys: Iterable[str]) -> str:
        pairs = zip(options.objective, self.spec.options.objective, strict=True)
        names = [name for before, now in pairs for name in differing(before, now)]
        if not names:
            return f"The checkpoint was trained with other loss terms (state of {', '.join(sorted(keys))})."
        then, now = (", ".join(f"{n}={o.value(n)}" for n in names) for o in (options, self.spec.options))
        return f"The checkpoint was trained with {then}, this trainer has {now}; use the same plans and trainer."
