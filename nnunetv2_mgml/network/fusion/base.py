"""The interface every fusion design implements, and the registry they join.

The decoder calls a design once per scale, deepest first. The features of absent modalities are zero, unless the design
says that it hides them itself (``hides_absent``); the mask says which those are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.network.fusion.installed import load_installed_designs
from nnunetv2_mgml.network.pointwise import pointwise
from nnunetv2_mgml.plans.options import FUSION_REVISION


@dataclass(frozen=True)
class FusionSpec:
    """What a fusion design is built from. Lists have one entry per scale, highest resolution first."""

    num_modalities: int
    num_classes: int
    """``K``: label classes with background (what auxiliary heads predict)."""
    channels: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]
    """Network input in voxels, plan axis order; a design must still accept any other input size."""
    conv_op: type[nn.Module]
    norm_op: type[nn.Module] | None
    norm_op_kwargs: dict[str, Any]
    nonlin: type[nn.Module] | None
    nonlin_kwargs: dict[str, Any]
    conv_bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    """The plan's ``fusion_options``; a design refuses keys it does not know (`FusionDesign.take_options`)."""
    revision: int = FUSION_REVISION
    """The plan's ``fusion_revision``: whose defaults count where an option is not set."""

    @property
    def num_scales(self) -> int:
        """Number of scales, bottleneck included."""
        return len(self.channels)

    @property
    def dimension(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    def feature_size(self, scale: int) -> tuple[int, ...]:
        """Spatial size of the features at a scale, in voxels of that scale, for the plan's patch."""
        size = self.patch_size
        for stride in self.strides[: scale + 1]:
            size = tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
        return size


class FusedScale(NamedTuple):
    """What a design returns for one scale."""

    fused: torch.Tensor
    """``(B, C_s, *spatial_s)``."""
    auxiliary: torch.Tensor | None = None
    """Label logits ``(B, K, *spatial_s)`` with a loss of their own, or None."""
    loss: torch.Tensor | None = None
    """A scalar float32 term to add to the training loss, or None."""


class FusionDesign(nn.Module):
    """Base class: subclass it, set ``name`` and ``summary``, implement `fuse_scale`, decorate with `register`."""

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    """One line with the source, shown by ``mgml info --fusions``."""
    default_options: ClassVar[dict[str, Any]] = {}
    """Options a plan may set through ``fusion_options`` and their defaults."""
    trainer: ClassVar[str] = ""
    """Name of the publication, ``"RFNet"``: ``nnUNetTrainerRFNet`` trains the design alone, ``nnUNetTrainerRFNet_MGML``
    with MGML (see ``training/variants.py``). Empty: no trainers of its own. A subclass does not inherit it."""
    published_options: ClassVar[dict[str, Any]] = {}
    """What these trainers fix beside the design, by option name: what the publication has, where it is not a default.
    ``fusion_options`` among them give way to those that the plans set for this design, and ``mask_sampling`` to any
    that is not the default. Published sums of losses over
    four modalities, or over heads, are means here: the weights are the number of addends."""
    published_alone: ClassVar[dict[str, Any]] = {}
    """What the trainer of the design alone fixes on top: terms of ours that the publication does not have."""
    defaults_before: ClassVar[dict[int, dict[str, Any]]] = {}
    """Revision -> defaults that were others in it (options that are newer: what stands for the design as it was).
    A change of a design that gives old weights another meaning is an option with an entry here, so that plans and
    models of that revision keep theirs."""
    publication: ClassVar[str] = ""
    """Where the design was published, ``"RFNet, ICCV 2021"``; empty: it stands for no publication."""
    differences: ClassVar[tuple[str, ...]] = ()
    """What differs from the published code with the trainers named after it, a clause each; shown in the docs
    (`nnunetv2_mgml.network.fusion.published`). Encoders, decoder, widths, optimiser and augmentation are nnU-Net's for
    every design and are not repeated."""
    option_choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What an option that is a string may be."""
    weights_depend_on_modality: ClassVar[bool] = False
    """Whether a parameter's shape depends on ``num_modalities``. Without such, hiding a modality must give what a
    network without it gives."""
    order_matters: ClassVar[bool] = False
    """Whether the order of the channels itself means something to the design, so that weights trained with another
    order mean something else (`nnunetv2_mgml.network.transfer`)."""
    reads_zeros: ClassVar[bool] = False
    """Whether the mask is not used: absent modalities are read as the zeros they are. Any other design must hide them
    by the mask itself, so that a mask used for the wrong modality or sample shows."""
    hides_absent: ClassVar[bool] = False
    """Whether every scale hides absent modalities by the mask, so that the decoder need not zero them first, which
    takes a copy of all features. What they hold is finite."""

    uses_context: ClassVar[bool] = True
    """Whether the decoder's features are read; where not, they are not made for it, and `fuse_scale` gets None. A class
    that has a `fuse_scale` of its own and does not say reads them, whatever its base class does."""

    joins_passes: ClassVar[bool] = False
    """Whether two passes of a training step, the prediction from what is visible and that from all that a case has, may
    be one batch: nothing is drawn at random, nothing depends on the other samples of a batch, `begin` and
    `begin_training` return what `FusionDesign`'s do, and `fuse_scale` returns no loss. A class that has one of the
    three of its own and does not say does not join them, whatever its base class does."""

    conditions_norms: ClassVar[bool] = False
    """Whether the design's instance norms may depend on what is visible (``conditional_norms``): `fuse_scale` calls
    them, and `share` does not, with a batch as long as the mask. A class that has one of the two of its own and does
    not say keeps plain norms, whatever its base class does."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = set(vars(cls))
        if "fuse_scale" in own:
            cls.uses_context |= not {"uses_context", "reads_context"} & own
        if own & {"fuse_scale", "begin", "begin_training"}:
            cls.joins_passes &= "joins_passes" in own
        if own & {"fuse_scale", "share"}:
            cls.conditions_norms &= "conditions_norms" in own

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.options = self.take_options(spec.options, spec.revision)

    @classmethod
    def take_options(cls, options: dict[str, Any], revision: int = FUSION_REVISION) -> dict[str, Any]:
        """Return the defaults of a revision updated by ``options``.

        Raises:
            ValueError: an option this design does not have, or a value of another kind than its default; integers must
                be at least 1 and other numbers at least 0, rates of dropout below 1.
        """
        unknown = sorted(set(options) - set(cls.default_options))
        if unknown:
            allowed = ", ".join(sorted(cls.default_options)) or "none"
            raise ValueError(f"Fusion design '{cls.name}' has no option {', '.join(unknown)}. Allowed: {allowed}.")
        for name, value in options.items():
            expected = _expected(cls.default_options[name], value, cls.option_choices.get(name))
            if name.endswith("dropout") and not expected and not value < 1:
                expected = "a number in [0, 1)"
            if expected:
                raise ValueError(f"Option {name} of fusion design '{cls.name}' is {value!r}; it must be {expected}.")
        defaults = dict(cls.default_options)
        for earlier in sorted(cls.defaults_before, reverse=True):
            if earlier >= revision:
                defaults.update(cls.defaults_before[earlier])
        return {**defaults, **options}

    @classmethod
    def acting(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Return those of all options that make a difference to the network, given the others."""
        return options

    def share(self, features: list[torch.Tensor]) -> Any:
        """Return what passes over the same features can use again whatever their mask, handed to `begin`; or None.

        Args:
            features: per scale, full resolution first, ``(B, M, C_s, *spatial_s)``; nothing in them is hidden.
        """
        return None

    def begin(self, shared: Any = None) -> Any:
        """Return the state handed to every `fuse_scale` of one pass: what is shared, unless a design needs another."""
        return shared

    def begin_training(self, available: torch.Tensor) -> Any:
        """Return the state of the pass a training step learns from; that of `begin`, unless a design needs more.

        Args:
            available: ``(B, M)`` bool, the modalities each case has, also those the mask hides. Their features hold
                what the encoders made of them.
        """
        return self.begin()

    def reads_context(self, scale: int) -> bool:
        """Whether `fuse_scale` is to be handed the decoder's features there; see ``uses_context``."""
        return self.uses_context

    def joins(self, scale: int) -> bool:
        """Whether two passes are one batch there; see ``joins_passes``."""
        return self.joins_passes

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """Fuse the modalities at one scale.

        Args:
            scale: 0 is full resolution; called from ``spec.num_scales - 1`` (the bottleneck) down to 0.
            features: ``(B, M, C_s, *spatial_s)``; zero where the mask is False, unless ``hides_absent``.
            mask: ``(B, M)`` bool, True = visible, at least one True per row.
            context: upsampled decoder feature ``(B, C_s, *spatial_s)``; None at the bottleneck and where
                `reads_context` says that it is not needed.
            state: what `begin` returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fuse_scale")

    @property
    def wants_images(self) -> bool:
        """Whether a training step is to call `image_loss`."""
        return False

    def image_loss(self, fused: list[torch.Tensor], images: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """Return a scalar float32 loss that compares the fused features with the images.

        Args:
            fused: what `fuse_scale` returned at each scale, full resolution first.
            images: ``(B, M, *spatial)`` normalised intensities, zero where not available.
            available: ``(B, M)`` bool, the modalities each case has, also those the mask hides.
        """
        raise NotImplementedError(f"{type(self).__name__} wants images and must implement image_loss")

    def initialize(self) -> None:
        """Called after Kaiming initialisation, for parameters that need other start values."""


def _expected(default: Any, value: Any, choices: tuple[str, ...] | None = None) -> str | None:
    """Return what an option with this default allows, or None where the value is fine."""
    if choices is not None:
        return None if value in choices else f"one of {', '.join(choices)}"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, int):
        return None if is_number and isinstance(value, int) and value >= 1 else "an integer of at least 1"
    if isinstance(default, float):
        return None if is_number and 0 <= value < math.inf else "a finite number of at least 0"
    return None if isinstance(value, type(default)) else f"a {type(default).__name__}"


_REGISTRY: dict[str, type[FusionDesign]] = {}
_PROBLEMS: list[str] | None = None
"""What was wrong with designs of other packages; None before they were looked for."""


def register(cls: type[FusionDesign]) -> type[FusionDesign]:
    """Class decorator that makes a design available as ``mgml plan --set fusion=<name>``.

    Raises:
        ValueError: no name, or a name already taken by another class; a ``trainer`` that no class can be called by.
    """
    if not cls.name:
        raise ValueError(f"{cls.__name__} needs a class attribute 'name' to be registered as a fusion design.")
    if not f"nnUNetTrainer{cls.trainer}".isidentifier():
        raise ValueError(
            f"The trainers of fusion design '{cls.name}' cannot be called nnUNetTrainer{cls.trainer}: its class "
            f"attribute 'trainer' must consist of letters, digits and underscores."
        )
    if _REGISTRY.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"Fusion design '{cls.name}' is already registered by {_REGISTRY[cls.name].__name__}.")
    return cls


def fusion_designs() -> dict[str, type[FusionDesign]]:
    """Return the registered designs by name, in alphabetical order; the first call loads those of other packages."""
    _look_for_installed_designs()
    return dict(sorted(_REGISTRY.items()))


def _look_for_installed_designs() -> list[str]:
    global _PROBLEMS
    if _PROBLEMS is None:
        _PROBLEMS = []  # a package that asks for the designs while it is loaded gets those there are
        _PROBLEMS = load_installed_designs(_accept, _REGISTRY)
    return _PROBLEMS


def _accept(design: Any) -> None:
    if not (isinstance(design, type) and issubclass(design, FusionDesign)):
        raise TypeError(f"{design!r} is not a subclass of FusionDesign")
    register(design)


def find_design(name: str) -> type[FusionDesign]:
    """Return a design by name.

    Raises:
        ValueError: no such design; the message lists those there are, and those of other packages that are broken.
    """
    designs = fusion_designs()
    if name not in designs:
        raise ValueError(
            " ".join(
                [
                    f"Unknown fusion design '{name}'. Allowed: {', '.join(designs)}. If it comes with "
                    f"another package, install that here.",
                    *_look_for_installed_designs(),
                ]
            )
        )
    return designs[name]


def build_fusion(name: str, spec: FusionSpec) -> FusionDesign:
    """Build a design by name.

    Raises:
        ValueError: no such design (`find_design`), or options it does not have.
    """
    return find_design(name)(spec)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def expand_mask(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape a mask ``(B, M)`` to broadcast against features ``(B, M, ...)`` of ``like``'s rank; same dtype."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - 2))


def float_mask(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a mask ``(B, M)`` as ones and zeros of the features' rank and dtype; see `expand_mask`."""
    return expand_mask(mask, like).to(like.dtype)


def can_be_read(mask: torch.Tensor) -> bool:
    """Return whether what a mask says may decide what is computed.

    Not on a GPU, which would have to be waited for, nor where a graph is made for every mask, nor where the mask has a
    shape but no data.
    """
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # PyTorch does not export its type
    has_data = type(mask) is torch.Tensor and mask.device.type == "cpu"
    return has_data and not traced and not torch.compiler.is_compiling()


def span(mask: torch.Tensor) -> slice:
    """Return the modalities from the first to the last that a sample sees: the others need not be read at all.

    All of them in training and where the mask cannot be read (`can_be_read`).

    Args:
        mask: ``(B, M)`` bool.
    """
    everything = slice(0, mask.shape[1])
    if torch.is_grad_enabled() or not can_be_read(mask):
        return everything
    seen = mask.any(0).tolist()
    if not any(seen):  # of pairs, where each sample sees one
        return everything
    return slice(seen.index(True), len(seen) - seen[::-1].index(True))


def sum_present(parts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the visible modalities, ``(B, ...)`` in dtype and layout of the parts, without a copy of them.

    Args:
        parts: ``(B, M, ...)``, or ``(1, M, ...)``: one sample for all masks.
        mask: ``(B, M)`` bool.
    """
    seen = span(mask)
    parts, mask = parts[:, seen], mask[:, seen]
    last = parts.ndim > 3 and parts.stride(2) == 1
    if last:  # as it lies
        parts = parts.movedim(2, -1)
    flat = parts.flatten(2)
    weights = mask.to(parts.dtype)
    with torch.autocast(parts.device.type, enabled=False):
        total = weights @ flat[0] if len(parts) == 1 else torch.bmm(weights[:, None], flat)[:, 0]
    summed: torch.Tensor = total.unflatten(1, parts.shape[2:])
    return summed.movedim(-1, 1) if last else summed


def conv_block(
    spec: FusionSpec, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...] = 1
) -> nn.Sequential:
    """Convolution, norm, nonlinearity as the plan has them; "same" padding, stride 1."""
    kernel = (kernel_size,) * spec.dimension if isinstance(kernel_size, int) else tuple(kernel_size)
    conv_op = pointwise(spec.conv_op) if set(kernel) == {1} else spec.conv_op
    layers: list[nn.Module] = [
        conv_op(in_channels, out_channels, kernel, padding=tuple(k // 2 for k in kernel), bias=spec.conv_bias)
    ]
    if spec.norm_op is not None:
        layers.append(spec.norm_op(out_channels, **(spec.norm_op_kwargs or {})))
    if spec.nonlin is not None:
        layers.append(spec.nonlin(**(spec.nonlin_kwargs or {})))
    return nn.Sequential(*layers)


if not TYPE_CHECKING:
    __getattr__ = forward(__name__)
