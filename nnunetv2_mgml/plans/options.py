"""Every hyper-parameter of the plugin, documented, in frozen dataclasses: four groups, joined in `Options`.

Names of options are unique over all groups, and what users type and plans hold is flat: ``mgml plan --set
temperature=4`` needs no group. They are stored as the ``"mgml"`` block of the plans, which nnU-Net copies beside the
checkpoint; inference rebuilds the network from there. A field that is None leaves nnU-Net's own value. Equation and
section numbers are the paper's (Zou et al., MGML); where text and published code disagree, ``docs/method.md`` says what
we do and why.

Training, network and sampling are declared here (no torch is imported). The options of the loss terms are declared
beside the terms, in `nnunetv2_mgml.objective`, which says so to `declare_objective` when it is imported. So whoever
reads options imports that, most simply by ``from nnunetv2_mgml.objective import Options``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from nnunetv2_mgml.modalities import canonical_name

PLANS_KEY = "mgml"
FUSION_REVISION = 2
"""The present ``fusion_revision``."""
_BEFORE = {
    "fusion_revision": 1,
    "network_form": "multi_encoder",
    "modality_decoder_scale": 0,
    "conditional_norms": False,
    "complete_every": 1,
}
"""What plans and models are that were written before these options were there."""
EXACT_REPETITION = (
    "exact repetition needs nnUNet_n_proc_DA=0 in the training's environment, since nnU-Net's worker "
    "processes draw patches and masks without a seed"
)
INT_OR_NONE = (int, type(None))
FLOAT_OR_NONE = (float, type(None))
BOOL_OR_NONE = (bool, type(None))

G = TypeVar("G", bound="OptionGroup")


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    kinds: tuple[type, ...] | None = None,
) -> Any:
    """Declare a field of an `OptionGroup`.

    Args:
        default: its value where nobody sets it.
        doc: what it does, for ``mgml info --options``.
        choices: the only values allowed; None: any.
        low: smallest value allowed.
        high: largest value allowed.
        kinds: types allowed; None: that of the default.
    """
    kinds = kinds or (type(default),)
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "kinds": kinds}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class OptionGroup:
    """Base of the groups: fields made with `option`, whose values are checked when a group is built."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check(spec.name, getattr(self, spec.name), spec.metadata)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the option names, in the order of their declaration."""
        return tuple(spec.name for spec in fields(cls))

    def as_dict(self) -> dict[str, Any]:
        """Return the options as a JSON-ready dict."""
        return dataclasses.asdict(self)

    def check(self, options: Options) -> None:
        """Refuse values that do not go with those of other groups.

        Args:
            options: all of them, this group among them.

        Raises:
            ValueError: they do not; the message names both options and what is allowed.
        """


@dataclass(frozen=True)
class TrainerAttributes(OptionGroup):
    """nnU-Net's own trainer attributes; None keeps nnU-Net's value."""

    num_epochs: int | None = option(None, "epochs (nnU-Net: 1000)", low=1, kinds=INT_OR_NONE)
    num_iterations_per_epoch: int | None = option(
        None, "training steps per epoch (nnU-Net: 250)", low=1, kinds=INT_OR_NONE
    )
    num_val_iterations_per_epoch: int | None = option(
        None, "validation steps per epoch (nnU-Net: 50)", low=1, kinds=INT_OR_NONE
    )
    initial_lr: float | None = option(None, "initial learning rate (nnU-Net: 0.01)", low=0, kinds=FLOAT_OR_NONE)
    weight_decay: float | None = option(None, "weight decay (nnU-Net: 3e-5)", low=0, kinds=FLOAT_OR_NONE)
    oversample_foreground_percent: float | None = option(
        None,
        "share of a batch forced to contain foreground (nnU-Net: 0.33), rounded to whole samples: at batch size "
        "1 nnU-Net's 0.33 forces none, 0.5 and above every one",
        low=0,
        high=1,
        kinds=FLOAT_OR_NONE,
    )
    save_every: int | None = option(
        None, "epochs between checkpoint_latest.pth (nnU-Net: 50)", low=1, kinds=INT_OR_NONE
    )


@dataclass(frozen=True)
class TrainingOptions(TrainerAttributes):
    """How it is trained: nnU-Net's attributes, optimisation, augmentation, what comes after."""

    optimizer: str = option(
        "sgd", "sgd (nnU-Net: Nesterov momentum 0.99) or adam (the paper's: amsgrad)", choices=("sgd", "adam")
    )
    seed: int | None = option(
        None,
        "seed of weights, masks and augmentation; None: not seeded. With it the run is "
        "reproducible when nnUNet_n_proc_DA=0",
        low=0,
        kinds=INT_OR_NONE,
    )
    cpu_bfloat16: bool = option(
        False, "train in bfloat16 autocast on a CPU (about twice as fast where it has AVX-512 BF16 or AMX)"
    )
    deterministic: bool = option(
        False,
        "deterministic cuDNN and PyTorch algorithms (slower on a GPU; an operation "
        "without one warns). Set seed and nnUNet_n_proc_DA=0 too for a run that "
        "repeats",
    )
    gradient_checkpointing: bool = option(
        True,
        "in a training step compute what is encoded (of network_form early_fusion: passes of single modalities) and "
        "the complete view's decoder twice instead of keeping what is inside them: the same losses and gradients in "
        "half the memory and a tenth more time; a compiled network (nnUNet_compile, on by default on a GPU) ignores it",
    )
    augmentation: str = option(
        "nnunet",
        "nnunet: nnU-Net's; paper: rotation in one plane by up to 10 degrees, intensity scale and shift of "
        "0.1, flips of all axes (section 4.1), nothing else",
        choices=("nnunet", "paper"),
    )
    validate_subsets: bool = option(True, "the final validation ends with the table over all modality subsets")

    def trainer_attributes(self) -> dict[str, Any]:
        """Return nnU-Net's trainer attributes that are set here."""
        return {name: value for name in TrainerAttributes.names() if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class NetworkOptions(OptionGroup):
    """What the network is built from: models that differ here have other weights."""

    fusion: str = option("region_aware", "fusion design, one of `mgml info --fusions`")
    fusion_options: dict[str, Any] = option({}, "options of the fusion design, a JSON object")
    fusion_revision: int = option(
        FUSION_REVISION,
        "what a fusion design does where fusion_options say nothing: 2, as now; 1, as in plans and models written "
        "before there were revisions (docs/fusion.md)",
        choices=tuple(range(1, FUSION_REVISION + 1)),
    )
    network_form: str = option(
        "shared_encoder",
        "shared_encoder: one encoder that sees each modality alone, whose first convolution and instance norms have "
        "weights of each, fused at every scale; multi_encoder: an encoder per modality, as published, fused likewise; "
        "early_fusion: one convolution per modality, fused at full resolution, and one U-Net for all, with memory that "
        "hardly grows with the number of modalities (docs/fusion.md)",
        choices=("multi_encoder", "shared_encoder", "early_fusion"),
    )
    width_factor: float = option(
        0.5,
        "feature channels as a multiple of the plan's (rounded to multiples of 8); at full width each modality alone "
        "would cost what the stock network does",
        low=0.05,
        high=4,
    )
    decoder_width_ratio: float = option(
        0.5,
        "feature channels of fusion and decoders as a multiple of the encoders' (rounded to multiples of 8). They "
        "run once per modality or subset, the encoders once per patch",
        low=0.1,
        high=1,
    )
    decoder_convs: int | None = option(
        1,
        "convolutions per decoder stage, as in nnU-Net's residual encoder plans; null: the plan's",
        low=1,
        kinds=INT_OR_NONE,
    )
    conditional_norms: bool | None = option(
        None,
        "true: instance norms of fusion and decoder get a scale and a shift that depend on which modalities are "
        "visible, learned and without effect at the start, as in nnUNetTrainerModalityDropout_conditional; false: not, "
        "as published; null: true, or false where that cannot be (network_form early_fusion, plans with other norms)",
        kinds=BOOL_OR_NONE,
    )
    modality_decoder_scale: int | None = option(
        None,
        "how many stages before full resolution the decoder shared by all modalities ends, and with it what modalities "
        "alone are taught: 0, as published, or more, which makes a training step faster (docs/speed.md); null: 1, or 0 "
        "where that cannot be (two stages, network_form early_fusion). A prediction does not use it. With "
        "reading=paper the soft-label loss, a sum over voxels, shrinks with their number",
        low=0,
        kinds=INT_OR_NONE,
    )


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """Which modalities a training sample sees."""

    mask_sampling: str = option(
        "uniform_subset",
        "uniform_subset: every non-empty subset alike (the paper); uniform_count: first how many; "
        "bernoulli: by modality_missing_rate; fixed: what the case has, no random removal",
        choices=("uniform_subset", "uniform_count", "bernoulli", "fixed"),
    )
    modality_missing_rate: dict[str, Any] = option(
        {}, 'for bernoulli: chance of each modality to be removed, a JSON object {"t1": 0.2, ...}; 0.5 where not named'
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(map(canonical_name, self.modality_missing_rate))) < len(self.modality_missing_rate):
            raise ValueError(
                f"modality_missing_rate names a modality twice: {', '.join(self.modality_missing_rate)}. Give each one "
                f"rate."
            )
        for name, rate in self.modality_missing_rate.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f"modality_missing_rate of '{name}' must be a number in [0, 1), got {rate!r}.")
        if self.modality_missing_rate and self.mask_sampling != "bernoulli":
            raise ValueError(
                f"modality_missing_rate needs mask_sampling=bernoulli; with {self.mask_sampling} it would be ignored."
            )


class ObjectiveOptions:
    """The options of the loss terms: one frozen group per term (or for several), each declared in the term's file.

    ``options.objective[ConsistencyOptions].consistency_weight`` reads one, fully typed.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[OptionGroup] | None = None) -> None:
        parts = [kind() for kind in objective_groups()] if parts is None else parts
        self._parts = {type(part): part for part in parts}

    def __getitem__(self, kind: type[G]) -> G:
        part = self._parts.get(kind)
        if not isinstance(part, kind):
            raise KeyError(f"{kind.__name__} belongs to no registered loss term.")
        return part

    def __iter__(self) -> Iterator[OptionGroup]:
        return iter(self._parts.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectiveOptions) and self._parts == other._parts

    __hash__ = None  # type: ignore[assignment]  # as every group with a dict among its options

    def __repr__(self) -> str:
        return f"ObjectiveOptions({list(self._parts.values())})"


def missing_options(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the ``"mgml"`` block of plans does not say since it is older than the option; empty of a new one.

    Args:
        block: of plans or of a model; without ``version`` nobody wrote it but the user.
    """
    config = block.get("config", {})
    return {name: value for name, value in _BEFORE.items() if "version" in block and name not in config}


_objective_groups: Callable[[], Sequence[type[OptionGroup]]] | None = None


def declare_objective(groups: Callable[[], Sequence[type[OptionGroup]]]) -> None:
    """Say where the options of the loss terms are found; `nnunetv2_mgml.objective` does so when it is imported.

    Args:
        groups: returns the groups, whenever options are read.
    """
    global _objective_groups
    _objective_groups = groups


def objective_groups() -> Sequence[type[OptionGroup]]:
    """Return the groups of the loss terms.

    Raises:
        RuntimeError: `nnunetv2_mgml.objective` was not imported.
    """
    if _objective_groups is None:
        raise RuntimeError(
            "Options of the loss terms are declared in nnunetv2_mgml.objective: import it before options are read."
        )
    return _objective_groups()


FIXED_GROUPS: tuple[type[OptionGroup], ...] = (TrainingOptions, NetworkOptions, SamplingOptions)
"""The groups that do not depend on which loss terms there are."""


def all_groups() -> tuple[type[OptionGroup], ...]:
    """Return every group of options, those of the loss terms last."""
    return (*FIXED_GROUPS, *objective_groups())


@dataclass(frozen=True)
class Options:
    """All settings of a training; build it with `from_plans`, change it with `updated`."""

    training: TrainingOptions = field(default_factory=TrainingOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)

    def __post_init__(self) -> None:
        for group in self.groups():
            group.check(self)

    def groups(self) -> tuple[OptionGroup, ...]:
        """Return the groups, those of the loss terms last."""
        return (self.training, self.network, self.sampling, *self.objective)

    @staticmethod
    def names() -> tuple[str, ...]:
        """Return the names of all options."""
        return tuple(name for group in all_groups() for name in group.names())

    @staticmethod
    def documentation() -> list[tuple[str, str, str]]:
        """Return ``(name, default as JSON, explanation)`` per option, group by group."""
        return [
            (spec.name, json.dumps(getattr(default, spec.name)), _explain(spec.metadata))
            for default in (group() for group in all_groups())
            for spec in fields(default)
        ]

    @classmethod
    def from_plans(cls, plans: dict[str, Any]) -> Options:
        """Return the options stored in a plans dict, or the defaults for stock plans.

        Plans and models that this package wrote before an option was there have what they had without it.

        Raises:
            ValueError: an unknown option or a bad value in the ``"mgml"`` block.
        """
        block = plans.get(PLANS_KEY) or {}
        stored = {**missing_options(block), **block.get("config", {})}
        unknown = _unknown(stored)
        if unknown:
            raise ValueError(
                f"{_unknown_text(unknown)} These plans were written by version {block.get('version', '(not noted)')} "
                f"of nnunetv2_mgml, possibly with a loss term of another package: install that package, or that "
                f"version."
            )
        return cls().updated(stored)

    def value(self, name: str) -> Any:
        """Return an option by its name.

        Raises:
            ValueError: no such option.
        """
        for group in self.groups():
            if name in group.names():
                return getattr(group, name)
        raise ValueError(_unknown_text([name]))

    def updated(self, changes: dict[str, Any]) -> Options:
        """Return a copy with some options changed.

        Args:
            changes: flat, option name -> value.

        Raises:
            ValueError: an unknown option (the message lists all) or a bad value (the message says what is allowed).
        """
        unknown = _unknown(changes)
        if unknown:
            raise ValueError(_unknown_text(unknown))
        return Options(
            _changed(self.training, changes),
            _changed(self.network, changes),
            _changed(self.sampling, changes),
            ObjectiveOptions([_changed(group, changes) for group in self.objective]),
        )

    def overridden(self, fixed: dict[str, Any]) -> Options:
        """Return a copy with what a trainer fixes.

        Where that names a fusion design, ``fusion_options`` set here for this same design win over the trainer's, and
        those set for another design are dropped. Where it fixes another sampling than bernoulli, so are the rates set
        here for that. Doing it twice changes nothing.

        Raises:
            ValueError: as `updated`.
        """
        if "fusion" in fixed:
            kept = {} if self.options_dropped_by(fixed) else self.network.fusion_options
            fixed = {**fixed, "fusion_options": {**fixed.get("fusion_options", {}), **kept}}
        if fixed.get("mask_sampling", "bernoulli") != "bernoulli":
            fixed = {"modality_missing_rate": {}, **fixed}
        return self.updated(fixed)

    def options_dropped_by(self, fixed: dict[str, Any]) -> dict[str, Any]:
        """Return the ``fusion_options`` that belong to another design than the one a trainer fixes."""
        network = self.network
        return network.fusion_options if fixed.get("fusion", network.fusion) != network.fusion else {}

    def as_dict(self) -> dict[str, Any]:
        """Return the options as a flat, JSON-ready dict.

        Those of a loss term from another package are left out while they have their defaults, so that plans ask for the
        package only where it is used.
        """
        return {
            name: value
            for group in self.groups()
            if _is_ours(group) or group != type(group)()
            for name, value in group.as_dict().items()
        }


def differing(before: OptionGroup, now: OptionGroup) -> list[str]:
    """Return the names of the options in which two groups of a kind differ."""
    return [name for name in now.names() if getattr(before, name) != getattr(now, name)]


def differences(before: OptionGroup, now: OptionGroup) -> list[str]:
    """Return one readable entry per option in which two groups of a kind differ."""
    return [f"{name} was {getattr(before, name)!r}, is now {getattr(now, name)!r}" for name in differing(before, now)]


def _is_ours(group: OptionGroup) -> bool:
    return type(group).__module__.split(".")[0] == __name__.split(".")[0]


def _unknown(changes: dict[str, Any]) -> list[str]:
    return sorted(set(changes) - set(Options.names()))


def _unknown_text(unknown: Sequence[str]) -> str:
    return f"Unknown option {', '.join(unknown)}. Allowed: {', '.join(Options.names())}."


def _changed(group: G, changes: dict[str, Any]) -> G:
    kinds = {spec.name: spec.metadata["kinds"] for spec in fields(group)}
    own = {name: _coerce(value, kinds[name]) for name, value in changes.items() if name in kinds}
    return dataclasses.replace(group, **own) if own else group


def _coerce(value: Any, kinds: tuple[type, ...]) -> Any:
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _explain(metadata: Any) -> str:
    limits = []
    if metadata["choices"]:
        limits.append(f"one of {', '.join(map(str, metadata['choices']))}")
    if metadata["low"] is not None:
        limits.append(f">= {metadata['low']:g}")
    if metadata["high"] is not None:
        limits.append(f"<= {metadata['high']:g}")
    return str(metadata["doc"]) + (f" [{'; '.join(limits)}]" if limits else "")


def _check(name: str, value: Any, metadata: Any) -> None:
    kinds = metadata["kinds"]
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    wrong_kind = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    out_of_range = False
    if not wrong_kind and isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = metadata["low"], metadata["high"]
        infinite = isinstance(value, float) and not math.isfinite(value)
        out_of_range = infinite or (low is not None and value < low) or (high is not None and value > high)
    bad_choice = not wrong_kind and metadata["choices"] is not None and value not in metadata["choices"]
    if wrong_kind or out_of_range or bad_choice:
        raise ValueError(f"Bad value for option {name}: {value!r}. Expected {expected}: {_explain(metadata)}.")


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """Parse ``["key=value", ...]`` of ``mgml plan --set``; values are JSON, or a string where that fails.

    Raises:
        ValueError: an entry without ``=`` or a key given twice.
    """
    result: dict[str, Any] = {}
    for entry in assignments:
        key, separator, text = entry.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"'{entry}' is not of the form key=value.")
        if key.strip() in result:
            raise ValueError(f"Option {key.strip()} is given twice.")
        try:
            result[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            result[key.strip()] = text
    return result
