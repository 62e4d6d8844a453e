"""The interface every loss term implements, and the registry they join.

A term says what it wants of the network (`Term.needs`), gets what was computed (`Step`) and returns its part of the
total (`TermValue`). Parameters, optimiser, state and what happens between epochs are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.plans.options import FIXED_GROUPS, INT_OR_NONE, OptionGroup, Options, option
from nnunetv2_mgml.plans.plugins import load_plugins

if TYPE_CHECKING:
    from nnunetv2_mgml.objective.step import Step

GROUP = "nnunetv2_mgml.terms"
"""Entry points of other packages' terms, ``boundary = "my_term:Boundary"``."""
G = TypeVar("G", bound=OptionGroup)
OURS = "ours"
"""The reading every term has; see `nnunetv2_mgml.objective.published`."""


@dataclass(frozen=True)
class SharedOptions(OptionGroup):
    """What several terms read."""

    segmentation_weight: float = option(1.0, "lambda1 of eq. 10", low=0)
    temperature: float = option(6.0, "tau of eq. 9, also of the soft label", low=0.1)
    teaching: str = option(
        "everywhere",
        "everywhere (the paper); better: only voxels where the soft label or the "
        "teacher gives the true class more probability than the student",
        choices=("everywhere", "better"),
    )
    teacher_scale: int = option(
        0,
        "how many stages before full resolution the prediction from all modalities a case has ends in a training step, "
        "and with it the loss on it (complete_view_weight) and what the other prediction learns from it "
        "(consistency_weight): 0, as published, or 1, which makes a step faster (docs/speed.md). A prediction does not "
        "use it. Always 0 without deep supervision, with two stages, for rebalancing and for published readings of "
        "eq. 9",
        choices=(0, 1),
    )
    complete_every: int | None = option(
        None,
        "in every n-th step of an epoch all that a case has is encoded and taught, and predictions from all of it are "
        "made and learned from (complete_view_weight, consistency_weight); in the steps between, what is hidden stays "
        "out of everything, which makes them faster (docs/results.md). 1: in every step, as published; null: 4, or 1 "
        "for published readings and where a term, as rebalancing, acts in every step",
        low=1,
        kinds=INT_OR_NONE,
    )
    ramp_up_fraction: float = option(
        0.1, "share of the epochs over which these terms grow linearly to full weight", low=0, high=1
    )


@dataclass(frozen=True)
class TermSpec:
    """What a term is built from."""

    options: Options
    channels: tuple[str, ...]
    """Names of the ``M`` modalities in channel order."""
    num_classes: int
    """``K``: label classes with background."""
    regions: bool
    """Whether the fused heads are regions (sigmoid) rather than labels (softmax)."""
    segmentation_loss: Callable[[Any, Any], torch.Tensor]
    """nnU-Net's own loss, called with what its trainer would pass: lists under deep supervision, else tensors."""
    ignore_label: int | None = None
    batch_dice: bool = False
    """nnU-Net's ``batch_dice``, for Dice that is not nnU-Net's own."""

    @property
    def num_modalities(self) -> int:
        """``M``."""
        return len(self.channels)

    @classmethod
    def of_prediction(cls, options: Options, channels: tuple[str, ...], num_classes: int, regions: bool) -> TermSpec:
        """Return what serves to look at predictions, without ground truth."""

        def refuse(prediction: Any, target: Any) -> torch.Tensor:
            raise ValueError("There is no ground truth to compute a loss with.")

        return cls(options, channels, num_classes, regions, refuse)


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    epoch: int
    """From 0."""
    num_epochs: int
    step: int = 0
    """Steps done in this epoch."""
    steps_per_epoch: int = 1

    def ramp(self, fraction: float) -> float:
        """Return a weight that grows linearly from 0 to 1 over a share of all steps."""
        steps = fraction * self.num_epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step
        return 1.0 if steps <= 0 else min(1.0, done / steps)


class TermValue(NamedTuple):
    """What a term returns for one step."""

    loss: torch.Tensor
    """Scalar, weighted: what is added to the total."""
    parts: dict[str, torch.Tensor]
    """Scalars for the log, unweighted, in the column ``train_<name>``; names are unique over all terms."""
    noted: dict[str, torch.Tensor] = {}
    """Further scalars for the log, in the column ``<name>``."""


class Term(nn.Module):
    """Base class: subclass it, set ``name`` and ``summary``, implement `active` and `forward`, decorate by `register`.

    Args:
        spec: what it is built from.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    """One line, with the source where it has one."""
    reading: ClassVar[str] = OURS
    """Other than `OURS`: it takes the place of the term of this name where the option ``reading`` has this value."""
    in_every_step: ClassVar[bool] = False
    """Whether it has to see all that a case has in every step, so that ``complete_every`` is 1."""
    option_group: ClassVar[type[OptionGroup] | None] = None
    """Its options, declared beside it; several terms may share them."""
    state_options: ClassVar[tuple[str, ...]] = ()
    """Options by which the term's state in a checkpoint means what it means: training goes on with the same alone."""
    order: ClassVar[int] = 100
    """Terms are computed and shown in this order; only one that weighs the modalities for others must be early."""

    def __init__(self, spec: TermSpec) -> None:
        super().__init__()
        self.spec = spec
        self.optimizer: torch.optim.Optimizer | None = None
        """Of the term's own parameters; None where it has none."""

    @classmethod
    def active(cls, options: Options) -> bool:
        """Return whether the options switch the term on."""
        raise NotImplementedError(f"{cls.__name__} must implement active")

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """Return what the term wants of the network, where it is active."""
        return Needs()

    def draw_subsets(self, visible: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Draw the further subsets a step predicts from, as many as ``needs(options).subsets``.

        Args:
            visible: ``(B, M)`` bool.
            available: ``(B, M)`` bool, a superset.

        Returns:
            ``(B, S, M)`` bool, no row empty; by default any non-empty subset of ``available`` alike.
        """
        return random_subsets(available, self.needs(self.spec.options).subsets)

    def forward(self, step: Step) -> TermValue:
        """Compute the term; no Python branch on values of tensors."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def begin_training(self, availability: Iterable[Subset]) -> None:
        """Called once, before the first epoch, with what each training case has."""

    def begin_epoch(self, progress: Progress) -> None:
        """Called before each epoch."""

    def end_epoch(self, progress: Progress, ramp: float) -> dict[str, float]:
        """Called after each epoch, on all processes of a multi-GPU training.

        Args:
            progress: the epoch that ends, all its steps done.
            ramp: weight of the terms that grow, in [0, 1].

        Returns:
            Columns for the log.
        """
        return {}

    def training_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps so that training resumes exactly; keys are unique over all terms."""
        return {}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `training_state` returned.

        Raises:
            ValueError: it does not fit this training.
        """


def random_subsets(available: torch.Tensor, count: int) -> torch.Tensor:
    """Draw subsets of what each case has, every non-empty one alike.

    Args:
        available: ``(B, M)`` bool, at least one True per row.
        count: ``S``.

    Returns:
        ``(B, S, M)`` bool, drawn on the device of ``available``: a step that read it would wait for a GPU and could not
        be captured as a graph.
    """
    choices = (2 ** available.sum(1) - 1)[:, None]
    drawn = torch.rand(len(available), count, device=available.device)
    code = 1 + (drawn * choices).long().minimum(choices - 1)  # in 1 .. 2^n - 1
    place = (available.cumsum(1) - 1).clamp_min(0)  # the bit of each modality the case has
    return ((code[:, :, None] >> place[:, None]) & 1 > 0) & available[:, None]


@dataclass
class _Registry:
    """The terms, and the groups of options that belong to no single one."""

    terms: dict[tuple[str, str], type[Term]] = field(default_factory=dict)
    """(name, reading) -> term."""
    groups: list[type[OptionGroup]] = field(default_factory=list)
    problems: list[str] | None = None
    """What was wrong with terms of other packages; None before they were looked for."""


_REGISTRY = _Registry(groups=[SharedOptions])


T = TypeVar("T", bound=Term)


def register(cls: type[T]) -> type[T]:
    """Class decorator that adds a term to the objective.

    Raises:
        ValueError: no name, or a name or an option that is already taken.
    """
    if not cls.name:
        raise ValueError(f"{cls.__name__} needs a class attribute 'name' to be registered as a loss term.")
    key = (cls.name, cls.reading)
    taken = _REGISTRY.terms.get(key)
    if taken is not None and taken is not cls:
        raise ValueError(f"Loss term '{cls.name}' ({cls.reading}) is already registered by {taken.__name__}.")
    _check_options(cls.option_group)
    _REGISTRY.terms[key] = cls
    return cls


def register_options(group: type[G]) -> type[G]:
    """Class decorator for a group of options that belongs to no single term.

    Raises:
        ValueError: an option that is already taken.
    """
    _check_options(group)
    _REGISTRY.groups.append(group)
    return group


def _check_options(group: type[OptionGroup] | None) -> None:
    if group is None:
        return
    for other in (*FIXED_GROUPS, *_own_groups()):
        doubles = sorted(set(group.names()) & set(other.names())) if other is not group else []
        if doubles:
            raise ValueError(
                f"Option {', '.join(doubles)} of {group.__name__} is already declared by {other.__name__}."
            )


def _own_groups() -> tuple[type[OptionGroup], ...]:
    of_terms = [term.option_group for term in _in_order() if term.option_group is not None]
    return tuple(dict.fromkeys((*_REGISTRY.groups, *of_terms)))


def term_options() -> Sequence[type[OptionGroup]]:
    """Return every group of options of the objective; the first call loads the terms of other packages."""
    look_for_installed_terms()
    return _own_groups()


def loss_terms() -> dict[str, type[Term]]:
    """Return the registered terms by name, in the order in which they are computed; published readings are left out."""
    look_for_installed_terms()
    return {term.name: term for term in _in_order() if term.reading == OURS}


def _in_order() -> list[type[Term]]:
    return sorted(_REGISTRY.terms.values(), key=lambda term: (term.order, term.name))


def look_for_installed_terms() -> list[str]:
    """Load the terms of other packages once; return what is wrong with those that cannot be used."""
    if _REGISTRY.problems is None:
        _REGISTRY.problems = []  # a package that asks for the terms while it is loaded gets those there are
        _REGISTRY.problems = load_plugins(GROUP, "Loss term", _accept, _REGISTRY.terms)
    return _REGISTRY.problems


def _accept(term: Any) -> None:
    if not (isinstance(term, type) and issubclass(term, Term)):
        raise TypeError(f"{term!r} is not a subclass of Term")
    register(term)


def find_term(name: str, reading: str = OURS) -> type[Term]:
    """Return the term of a name in a reading, ours where that reading has none of its own.

    Raises:
        ValueError: no such term; the message lists those there are, and those of other packages that are broken.
    """
    terms = loss_terms()
    if name not in terms:
        raise ValueError(
            " ".join([f"Unknown loss term '{name}'. Allowed: {', '.join(terms)}.", *look_for_installed_terms()])
        )
    return _REGISTRY.terms.get((name, reading), terms[name])
