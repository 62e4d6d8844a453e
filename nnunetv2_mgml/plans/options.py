"""`MGMLConfig`: every hyper-parameter of the plugin, documented, in one frozen dataclass (imports no torch).

It is stored as the ``"mgml"`` block of the plans, which nnU-Net copies beside the checkpoint; inference rebuilds the
network from there. A field that is None leaves nnU-Net's own value. Equation and section numbers are the paper's
(Zou et al., MGML); where text and published code disagree, ``docs/method.md`` says what we do and why.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, fields
from typing import Any

PLANS_KEY = "mgml"
FUSION_REVISION = 2
"""The present ``fusion_revision``."""
EXACT_REPETITION = (
    "exact repetition needs nnUNet_n_proc_DA=0 in the training's environment, since nnU-Net's worker "
    "processes draw patches and masks without a seed"
)


def _option(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    kinds: tuple[type, ...] | None = None,
) -> Any:
    kinds = kinds or (type(default),)
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "kinds": kinds}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_OF_PUBLISHED_READINGS = {
    "soft_label": ("meta_amf", "fixed", "none"),
    "teaching": ("everywhere",),
    "rebalancing": ("none",),
}
"""What ``reading=paper`` and ``reading=reference`` have of options with choices of ours."""
_INT = (int, type(None))
_FLOAT = (float, type(None))


@dataclass(frozen=True)
class MGMLConfig:
    """All settings of a training; build it with `from_plans`, change it with `updated`."""

    # --- nnU-Net's own trainer attributes; None keeps nnU-Net's value -------------------------------------------------
    num_epochs: int | None = _option(None, "epochs (nnU-Net: 1000)", low=1, kinds=_INT)
    num_iterations_per_epoch: int | None = _option(None, "training steps per epoch (nnU-Net: 250)", low=1, kinds=_INT)
    num_val_iterations_per_epoch: int | None = _option(
        None, "validation steps per epoch (nnU-Net: 50)", low=1, kinds=_INT
    )
    initial_lr: float | None = _option(None, "initial learning rate (nnU-Net: 0.01)", low=0, kinds=_FLOAT)
    weight_decay: float | None = _option(None, "weight decay (nnU-Net: 3e-5)", low=0, kinds=_FLOAT)
    oversample_foreground_percent: float | None = _option(
        None,
        "share of a batch forced to contain foreground (nnU-Net: 0.33), rounded to whole samples: at batch size "
        "1 nnU-Net's 0.33 forces none, 0.5 and above every one",
        low=0,
        high=1,
        kinds=_FLOAT,
    )
    save_every: int | None = _option(None, "epochs between checkpoint_latest.pth (nnU-Net: 50)", low=1, kinds=_INT)

    # --- optimisation -------------------------------------------------------------------------------------------------
    optimizer: str = _option(
        "sgd", "sgd (nnU-Net: Nesterov momentum 0.99) or adam (the paper's: amsgrad)", choices=("sgd", "adam")
    )
    seed: int | None = _option(
        None,
        "seed of weights, masks and augmentation; None: not seeded. With it the run is "
        "reproducible when nnUNet_n_proc_DA=0",
        low=0,
        kinds=_INT,
    )
    cpu_bfloat16: bool = _option(
        False, "train in bfloat16 autocast on a CPU (about twice as fast where it has AVX-512 BF16 or AMX)"
    )
    deterministic: bool = _option(
        False,
        "deterministic cuDNN and PyTorch algorithms (slower on a GPU; an operation "
        "without one warns). Set seed and nnUNet_n_proc_DA=0 too for a run that "
        "repeats",
    )

    # --- augmentation -------------------------------------------------------------------------------------------------
    augmentation: str = _option(
        "nnunet",
        "nnunet: nnU-Net's; paper: rotation in one plane by up to 10 degrees, intensity scale and shift of "
        "0.1, flips of all axes (section 4.1), nothing else",
        choices=("nnunet", "paper"),
    )

    # --- network ------------------------------------------------------------------------------------------------------
    fusion: str = _option("region_aware", "fusion design, one of `mgml info --fusions`")
    fusion_options: dict[str, Any] = _option({}, "options of the fusion design, a JSON object")
    fusion_revision: int = _option(
        FUSION_REVISION,
        "what a fusion design does where fusion_options say nothing: 2, as now; 1, as in plans and models written "
        "before there were revisions (docs/fusion.md)",
        choices=tuple(range(1, FUSION_REVISION + 1)),
    )
    network_form: str = _option(
        "multi_encoder",
        "multi_encoder: one encoder per modality, fused at every scale; early_fusion: one convolution per modality, "
        "fused at full resolution, and one U-Net for all (docs/fusion.md): smaller, with memory that hardly grows "
        "with the number of modalities",
        choices=("multi_encoder", "early_fusion"),
    )
    width_factor: float = _option(
        0.5,
        "feature channels as a multiple of the plan's (rounded to multiples of 8); one "
        "encoder per modality at full width would be four times the stock network",
        low=0.05,
        high=4,
    )
    decoder_width_ratio: float = _option(
        0.5,
        "feature channels of fusion and decoders as a multiple of the encoders' (rounded to multiples of 8). They "
        "run once per modality or subset, the encoders once per patch",
        low=0.1,
        high=1,
    )
    decoder_convs: int | None = _option(
        1, "convolutions per decoder stage, as in nnU-Net's residual encoder plans; null: the plan's", low=1, kinds=_INT
    )

    # --- which modalities a training sample sees ----------------------------------------------------------------------
    mask_sampling: str = _option(
        "uniform_subset",
        "uniform_subset: every non-empty subset alike (the paper); uniform_count: first how many; "
        "bernoulli: by modality_missing_rate; fixed: what the case has, no random removal",
        choices=("uniform_subset", "uniform_count", "bernoulli", "fixed"),
    )
    modality_missing_rate: dict[str, Any] = _option(
        {}, 'for bernoulli: chance of each modality to be removed, a JSON object {"t1": 0.2, ...}; 0.5 where not named'
    )

    # --- segmentation losses (L_seg of eq. 10) ------------------------------------------------------------------------
    segmentation_weight: float = _option(1.0, "lambda1 of eq. 10", low=0)
    modality_decoder_weight: float = _option(
        0.7, "weight of the shared decoder's Dice + CE per modality (reference code; not stated in the text)", low=0
    )
    auxiliary_weight: float = _option(1.0, "weight of the fusion design's auxiliary losses", low=0)

    # --- Meta-AMF (section 3.2, eq. 1-8) ------------------------------------------------------------------------------
    soft_label: str = _option(
        "meta_amf",
        "meta_amf: eq. 1-5; fixed: smooth max and min with fixed parameters (the "
        "paper's FPSLD); mean: mean of log-probabilities; none: no soft label",
        choices=("meta_amf", "fixed", "mean", "none"),
    )
    soft_label_weight: float = _option(
        0.5,
        "lambda2 of eq. 10, on a loss averaged over voxels and scaled by temperature^2 (the paper's 0.3 tau^2/10 "
        "is for a sum over voxels). At 1 its gradient was 0.18 to 0.54 of the modality loss's (ten BraTS cases, "
        "400 steps), so 0.5 keeps it at 0.1 to 0.3",
        low=0,
    )
    temperature: float = _option(6.0, "tau of eq. 9, also of the soft label", low=0.1)
    mask_ratio: float = _option(
        0.2, "expected share of voxels dropped from the soft-label loss at w_f = 0.5 (eq. 6)", low=0, high=0.95
    )
    mask_mode: str = _option(
        "confidence",
        "confidence: unsure voxels are dropped more often; uniform: all alike",
        choices=("confidence", "uniform"),
    )
    meta_objective: str = _option(
        "ground_truth",
        "what trains the MetaNetwork. ground_truth: segmentation loss of the soft label; soft_label: "
        "L_SL as in the paper (w_f ran to 0 or 1 within 100 steps in prototypes)",
        choices=("ground_truth", "soft_label"),
    )
    meta_hidden: int = _option(64, "width of the MetaNetwork's hidden layer", low=1)
    meta_lr: float = _option(2e-4, "learning rate of the MetaNetwork's Adam, poly schedule", low=0)
    sharpness_min: float = _option(0.5, "lower bound of beta and alpha (eq. 2)", low=1e-3)
    sharpness_max: float = _option(
        20.0, "upper bound of beta and alpha; above 20 smooth max equals max to 1e-3", low=1e-3
    )
    fixed_sharpness: float = _option(100.0, "beta = alpha of soft_label=fixed (the paper's Table 2)", low=1e-3)
    fixed_confidence: float = _option(0.5, "w_f of soft_label=fixed", low=0, high=1)

    # --- consistency regularisation (section 3.3, eq. 9) --------------------------------------------------------------
    consistency_weight: float = _option(
        0.03,
        "lambda3 of eq. 10, on a loss averaged over voxels and scaled by temperature^2; 0 switches the term off. "
        "Its gradient was 0.01 to 0.08 of the segmentation loss's (same run); 0.1 cost Dice in prototypes",
        low=0,
    )
    teacher_augmentation: bool = _option(
        False, "the teacher sees its own, stronger intensity augmentation (a second encoder pass)"
    )

    complete_view_weight: float = _option(
        1.0,
        "weight of nnU-Net's loss on the teacher's own prediction, from all modalities the case has. Not in the "
        "paper, whose teacher learns only when it is drawn as a student; 0: off. On phantoms it added 2.3 "
        "Dice points (docs/results.md)",
        low=0,
    )

    # --- where both terms teach ---------------------------------------------------------------------------------------
    teaching: str = _option(
        "everywhere",
        "everywhere (the paper); better: only voxels where the soft label or the "
        "teacher gives the true class more probability than the student",
        choices=("everywhere", "better"),
    )

    # --- rebalancing (PASSION, Shi et al., ACM MM 2024): training cases that lack modalities at unequal rates ---------
    rebalancing: str = _option(
        "none",
        "passion: modalities that lag behind the fused prediction learn more from it (M "
        "more passes of the fusion decoder in training); none: off",
        choices=("none", "passion"),
    )
    rebalancing_temperature: float = _option(4.0, "tau of its distillation", low=0.1)
    rebalancing_distillation_weight: float = _option(
        0.125, "weight of its distillation, a sum over classes (published: 0.5 on the mean over 4 classes)", low=0
    )
    rebalancing_prototype_weight: float = _option(0.1, "weight of its prototype term", low=0)
    rebalancing_rate: float = _option(
        0.01,
        "step of the balance weights per epoch (eta), times 1.5 from the start and "
        "again after each third of the training",
        low=0,
    )

    # --- schedule and reading -----------------------------------------------------------------------------------------
    ramp_up_fraction: float = _option(
        0.1, "share of the epochs over which these terms grow linearly to full weight", low=0, high=1
    )
    reading: str = _option(
        "ours",
        "ours; paper: the text taken literally; reference: what the published code does. "
        "The last two are for reproduction, without soft_label=mean, teaching=better and "
        "rebalancing",
        choices=("ours", "paper", "reference"),
    )

    # --- after training -----------------------------------------------------------------------------------------------
    validate_subsets: bool = _option(True, "the final validation ends with the table over all modality subsets")

    def __post_init__(self) -> None:
        for spec in fields(self):
            _check(spec.name, getattr(self, spec.name), spec.metadata)
        if self.sharpness_min >= self.sharpness_max:
            raise ValueError(
                f"sharpness_min ({self.sharpness_min}) must be below sharpness_max ({self.sharpness_max})."
            )
        for name, rate in self.modality_missing_rate.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise ValueError(f"modality_missing_rate of '{name}' must be a number in [0, 1), got {rate!r}.")
        if self.modality_missing_rate and self.mask_sampling != "bernoulli":
            raise ValueError(
                f"modality_missing_rate needs mask_sampling=bernoulli; with {self.mask_sampling} it would be ignored."
            )
        for name, allowed in _OF_PUBLISHED_READINGS.items() if self.reading != "ours" else ():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs reading=ours; got reading={self.reading}, which "
                    f"allows {name}={' or '.join(allowed)}."
                )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the option names."""
        return tuple(spec.name for spec in fields(cls))

    @classmethod
    def documentation(cls) -> list[tuple[str, str, str]]:
        """Return ``(name, default as JSON, explanation)`` per option, in declaration order."""
        default = cls()
        return [(spec.name, json.dumps(getattr(default, spec.name)), _explain(spec.metadata)) for spec in fields(cls)]

    @classmethod
    def from_plans(cls, plans: dict[str, Any]) -> MGMLConfig:
        """Return the configuration stored in a plans dict, or the defaults for stock plans.

        Plans that this package wrote before there were revisions of fusion designs are of ``fusion_revision`` 1.

        Raises:
            ValueError: an unknown option or a bad value in the ``"mgml"`` block.
        """
        block = plans.get(PLANS_KEY) or {}
        first = {"fusion_revision": 1} if "version" in block else {}
        return cls().updated({**first, **block.get("config", {})})

    def updated(self, changes: dict[str, Any]) -> MGMLConfig:
        """Return a copy with some options changed.

        Raises:
            ValueError: an unknown option (the message lists all) or a bad value (the message says what is allowed).
        """
        unknown = sorted(set(changes) - set(self.names()))
        if unknown:
            raise ValueError(f"Unknown option {', '.join(unknown)}. Allowed: {', '.join(self.names())}.")
        kinds = {spec.name: spec.metadata["kinds"] for spec in fields(self)}
        return dataclasses.replace(self, **{k: _coerce(v, kinds[k]) for k, v in changes.items()})

    def overridden(self, fixed: dict[str, Any]) -> MGMLConfig:
        """Return a copy with what a trainer fixes.

        Where that names a fusion design, ``fusion_options`` set here for this same design win over the trainer's, and
        those set for another design are dropped. Doing it twice changes nothing.

        Raises:
            ValueError: as `updated`.
        """
        if "fusion" in fixed:
            own = {} if self.options_dropped_by(fixed) else self.fusion_options
            fixed = {**fixed, "fusion_options": {**fixed.get("fusion_options", {}), **own}}
        return self.updated(fixed)

    def options_dropped_by(self, fixed: dict[str, Any]) -> dict[str, Any]:
        """Return the ``fusion_options`` that belong to another design than the one a trainer fixes."""
        return self.fusion_options if fixed.get("fusion", self.fusion) != self.fusion else {}

    def as_dict(self) -> dict[str, Any]:
        """Return all options as a JSON-ready dict."""
        return dataclasses.asdict(self)

    @property
    def uses_soft_label(self) -> bool:
        """Whether the soft-label distillation term is on."""
        return self.soft_label != "none" and self.soft_label_weight > 0

    @property
    def uses_teacher(self) -> bool:
        """Whether the consistency term is on; it would be 0 where the student sees all the teacher sees."""
        return self.consistency_weight > 0 and not (self.mask_sampling == "fixed" and self.reading == "ours")

    @property
    def supervises_teacher(self) -> bool:
        """Whether the prediction from all modalities has its own segmentation loss; not where it is the student's."""
        return self.complete_view_weight > 0 and self.mask_sampling != "fixed"

    @property
    def uses_rebalancing(self) -> bool:
        """Whether modalities are weighted by how far they lag behind."""
        return self.rebalancing != "none"


def _coerce(value: Any, kinds: tuple[type, ...]) -> Any:
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
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
    return metadata["doc"] + (f" [{'; '.join(limits)}]" if limits else "")


def _check(name: str, value: Any, metadata: Any) -> None:
    kinds = metadata["kinds"]
    expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    wrong_kind = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    out_of_range = False
    if not wrong_kind and isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = metadata["low"], metadata["high"]
        out_of_range = value != value or (low is not None and value < low) or (high is not None and value > high)
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
