"""Weights of another network for this one: what is taken from where, matched by the names of modalities.

A network can start from a stock nnU-Net of the same plans (an encoder for all modalities is the stock encoder itself,
one of a modality has its first convolution cut to the column of that one), from one of ours with other modalities or
labels, or from a self-supervised encoder of one channel. Nothing is matched by position: encoders, and the parts of a
fusion design that belong to a modality, go by name. Parts that belong to classes (heads, class maps) are taken only
where the labels are the same. What conditional norms learned of modalities that a network does not have, or cannot tell
apart, goes into their scale and shift (`folded_norms`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from nnunetv2_mgml.modalities import channel_index
from nnunetv2_mgml.network.conditional_norms import ConditionalNorm
from nnunetv2_mgml.network.design_layout import DesignLayout
from nnunetv2_mgml.network.early_fusion import EarlyFusionUNet, TrunkDecoder
from nnunetv2_mgml.network.folded_norms import PARTS, NormsOfDonor
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.network.shared_encoder import SharedEncoderUNet

Labels = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and values of labels or regions in the order of the network's heads; see `labels_of`."""

_FORMS = {
    "stock": "a stock nnU-Net",
    "multi_encoder": "the multi-encoder form",
    "shared_encoder": "the form with one encoder for all modalities",
    "early_fusion": "the early-fusion form",
}
_FUSES_AT_SCALES = ("multi_encoder", "shared_encoder")
"""Forms whose decoder is nnU-Net's, with fused skips."""
_OF_ALL = "encoders.of_all."
"""How the keys of an encoder for all modalities begin; nnU-Net's own follow."""


def labels_of(dataset_json: Mapping[str, Any]) -> Labels:
    """Return what the heads of a network mean: names and values, regions in their order, labels by value."""
    entries = [
        (str(name), tuple(value) if isinstance(value, (list, tuple)) else (value,))
        for name, value in dataset_json["labels"].items()
        if name != "ignore"
    ]
    if all(len(value) == 1 for _, value in entries):
        entries.sort(key=lambda entry: entry[1])
    else:
        entries.append(("order", tuple(dataset_json.get("regions_class_order", ()))))
    return tuple(entries)


@dataclass(frozen=True)
class Donor:
    """A trained network whose weights are on offer."""

    weights: Mapping[str, torch.Tensor]
    """Its state dict."""
    channels: tuple[str, ...] | None
    """Its modalities in channel order; None: one channel, of no modality in particular (self-supervised)."""
    labels: Labels | None = None
    """See `labels_of`; None: unknown, or none."""
    fusion: str | None = None
    """Name of its fusion design, where it is one of our networks."""

    @property
    def form(self) -> str:
        """``multi_encoder``, ``shared_encoder``, ``early_fusion``, or ``stock``.

        Raises:
            ValueError: these are weights of another kind of network.
        """
        for name, start in (
            ("multi_encoder", "encoders.0.encoder."),
            ("shared_encoder", "encoders.of_all.encoder."),
            ("early_fusion", "encoders.0.convolution."),
            ("stock", "encoder."),
        ):
            if any(key.startswith(start) for key in self.weights):
                return name
        raise ValueError(
            f"These are not weights of a U-Net of nnU-Net, or of ours: no name begins with 'encoder.', the first are "
            f"{', '.join(list(self.weights)[:3]) or 'missing'}."
        )


class Part(NamedTuple):
    """One part of the network and where it starts from."""

    name: str
    source: str
    """Whose weights, in words; empty where none were taken."""
    taken: int
    """Numbers taken."""
    total: int
    """Numbers the part has."""


@dataclass
class Transfer:
    """What a network takes."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Key of the network -> tensor of the same shape; a part of the network's own keys."""
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def taken(self) -> int:
        """Numbers taken."""
        return sum(part.taken for part in self.parts)

    def apply(self, network: nn.Module) -> None:
        """Write the weights into the network, in place."""
        network.load_state_dict(self.weights, strict=False)

    def lines(self) -> list[str]:
        """Return the table of parts and the notes, as lines for people."""
        width = max(len(part.name) for part in self.parts)
        table = [
            f"  {part.name:<{width}}  {part.taken / 1e6:8.3f} of {part.total / 1e6:8.3f} million numbers"
            f"  {'from ' + part.source if part.taken else 'starts anew'}"
            for part in self.parts
        ]
        return [*table, *(f"  {note}" for note in self.notes)]


def transfer(
    network: nn.Module,
    channels: Sequence[str],
    labels: Labels,
    donor: Donor,
    stands_for: Mapping[str, str] | None = None,
) -> Transfer:
    """Work out what a network takes from a donor; nothing is changed yet.

    Args:
        network: one of ours, or the stock network.
        channels: its ``M`` modalities in channel order.
        labels: its `labels_of`.
        donor: whose weights are on offer.
        stands_for: modality -> the donor's modality it starts from, where that is not the one of its name.

    Raises:
        ValueError: an unknown modality, a donor of a form this network cannot start from, or one of which nothing fits.
    """
    form = _form(network)
    if donor.form not in (form, "stock"):
        raise ValueError(
            f"The checkpoint is {_FORMS[donor.form]}, this network {_FORMS[form]}; it can start from a checkpoint of "
            f"its own form or from a stock nnU-Net. Plan with the network_form of the checkpoint."
        )
    pairs = _pairs(channels, donor.channels, stands_for or {})
    result = Transfer()
    source_of = _Rules(network, channels, labels, donor, pairs)
    keys: dict[str, dict[str, int]] = defaultdict(dict)
    sources: dict[str, str] = {}
    for key, own in unique_tensors(network).items():
        part, source, found = source_of(key, own)
        keys[part][key] = own.numel()
        if found is not None and found.shape == own.shape:
            result.weights[key] = found.to(own.dtype)
            sources[part] = source
    if donor.form != form and form in _FUSES_AT_SCALES:  # a decoder of another width of which a layer fits by chance
        for part in ("decoder", "modality decoder"):
            needed = {key for key in keys[part] if not key.endswith(PARTS)}  # which a plain checkpoint lacks
            if not needed <= set(result.weights):
                result.weights = {key: found for key, found in result.weights.items() if key not in keys[part]}
    for part, sizes in keys.items():
        taken = sum(size for key, size in sizes.items() if key in result.weights)
        result.parts.append(Part(part, sources.get(part, ""), taken, sum(sizes.values())))
    if not any(part.taken for part in result.parts if part.name.startswith(("encoder", "stem"))):
        raise ValueError(_nothing_fits(network, form, donor))
    result.notes = source_of.notes(result)
    return result


def unique_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict with every tensor once, under its first name (nnU-Net's blocks list theirs twice)."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for key, tensor in network.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        found[key] = tensor
    return found


def _form(network: nn.Module) -> str:
    if isinstance(network, EarlyFusionUNet):
        return "early_fusion"
    if isinstance(network, SharedEncoderUNet):
        return "shared_encoder"
    return "multi_encoder" if isinstance(network, MultiEncoderUNet) else "stock"


def _is_conditional(module: nn.Module) -> bool:
    return any(isinstance(part, ConditionalNorm) for part in module.modules())


def _pairs(
    channels: Sequence[str], offered: Sequence[str] | None, stands_for: Mapping[str, str]
) -> dict[int, int | None]:
    """Return channel -> the donor's channel it starts from, or None where the donor has none for it."""
    if offered is None:
        if stands_for:
            raise ValueError(
                f"The checkpoint has one channel, of no modality in particular, from which every modality starts; "
                f"there is nothing to choose for {', '.join(stands_for)} (--use)."
            )
        return dict.fromkeys(range(len(channels)), 0)
    chosen = {
        channel_index(name, channels): channel_index(source, offered, "The checkpoint")
        for name, source in stands_for.items()
    }
    by_name = {name: index for index, name in enumerate(offered)}
    return {m: chosen.get(m, by_name.get(name)) for m, name in enumerate(channels)}


class _Rules:
    """Which of the donor's tensors a tensor of the network starts from: ``(part, source, tensor or None)``."""

    def __init__(
        self,
        network: nn.Module,
        channels: Sequence[str],
        labels: Labels,
        donor: Donor,
        pairs: dict[int, int | None],
    ) -> None:
        self.network, self.channels, self.donor, self.pairs = network, tuple(channels), donor, pairs
        self.form = _form(network)
        self.same_labels = donor.labels is not None and donor.labels == labels
        self.classes_skipped = False
        self.first = next((key for key in unique_tensors(network) if self._is_first(key)), None)
        self.design = self._design()
        self.norms = NormsOfDonor(donor.weights, donor.channels, pairs, _is_conditional(network))

    def __call__(self, key: str, own: torch.Tensor) -> tuple[str, str, torch.Tensor | None]:
        modality = re.fullmatch(r"encoders\.(\d+)\.(.+)", key)
        if modality:
            return self._of_encoder(int(modality[1]), modality[2], own)
        if key.startswith(_OF_ALL):
            return self._of_shared_encoder(key, own)
        if key.startswith("fusion."):
            return "fusion design", f"its {self.donor.fusion}", self._of_fusion(key.removeprefix("fusion."), own)
        part, source, head = self._of_trunk(key)
        if head:
            part = "heads"
            self.classes_skipped |= not self.same_labels
            return part, "its heads (same labels)", self.donor.weights.get(source) if self.same_labels else None
        found = self._trunk_of(part).get(source)
        if self.form == "stock" and key == self.first and found is not None:
            found = self._columns(found, own, list(range(len(self.channels))))
        if key.endswith(PARTS) and found is not None:
            found = self._rows(found)
        return part, f"its {part}", found

    def _trunk_of(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return the donor's weights for a part whose norms may depend on what is visible: do they here?"""
        module = self.network if self.form == "stock" else getattr(self.network, part.replace(" ", "_"), None)
        return self.norms.trunk if module is not None and _is_conditional(module) else self.norms.plain

    # --- encoders -----------------------------------------------------------------------------------------------------
    def _of_encoder(self, m: int, rest: str, own: torch.Tensor) -> tuple[str, str, torch.Tensor | None]:
        part = f"{'stem' if self.form == 'early_fusion' else 'encoder'} of {self.channels[m]}"
        j = self.pairs[m]
        if self.donor.form != "stock":
            if j is None:
                return part, "", None
            assert self.donor.channels is not None
            return part, f"its {self.donor.channels[j]}", self.donor.weights.get(f"encoders.{j}.{rest}")
        if self.donor.channels is None:
            source = "its one channel"
        else:
            source = f"its column {self.donor.channels[j]}" if j is not None else "the mean of its columns"
        stock = self._stock_key(rest)
        found = self.norms.of_encoder(j).get(stock)
        if found is not None and self._is_first_donor(stock):
            found = self._columns(found, own, [m])
        return part, source, found

    def _of_shared_encoder(self, key: str, own: torch.Tensor) -> tuple[str, str, torch.Tensor | None]:
        """Take over what a stock encoder, or one like this, has for these modalities."""
        source = key.removeprefix(_OF_ALL) if self.donor.form == "stock" else key
        told = _is_conditional(cast(nn.Module, self.network.encoders))
        found = (self.norms.alone if told else self.norms.plain).get(source)
        if found is not None and self._is_first_donor(source):
            found = self._columns(found, own, list(range(len(self.channels))))
        return "encoder of all modalities", "its encoder", found

    def _stock_key(self, rest: str) -> str:
        if self.form == "multi_encoder":
            return rest
        layer = re.fullmatch(r"convolution\.([01])\.(.+)", rest)
        if layer is None:
            return ""
        name = f"{('conv', 'norm')[int(layer[1])]}.{layer[2]}"
        stem = f"encoder.stem.convs.0.{name}"
        return stem if stem in self.donor.weights else f"encoder.stages.0.0.convs.0.{name}"

    def _is_first(self, key: str) -> bool:
        return key.startswith("encoder.") and self.network.state_dict()[key].ndim >= 4

    def _is_first_donor(self, key: str) -> bool:
        weights = self.donor.weights
        start = f"{_OF_ALL}encoder." if self.donor.form == "shared_encoder" else "encoder."
        own = [k for k in weights if k.startswith((f"{start}stem.", f"{start}stages.0.")) and weights[k].ndim >= 4]
        return bool(own) and key == own[0]

    def _columns(self, found: torch.Tensor, own: torch.Tensor, wanted: list[int]) -> torch.Tensor | None:
        """Return the first convolution of the network, ``(O, len(wanted) + P, ...)``, from the donor's columns."""
        if found.shape[0] != own.shape[0] or found.shape[2:] != own.shape[2:]:
            return None
        images = 1 if self.donor.channels is None else len(self.donor.channels)
        mean = found[:, :images].mean(1)
        indices = [self.pairs[m] for m in wanted]
        columns = torch.stack([mean if j is None else found[:, j] for j in indices], 1)
        previous, offered = own[:, len(wanted) :], found[:, images:]
        if self.same_labels and offered.shape == previous.shape:
            previous = offered
        return torch.cat((columns, previous.to(columns)), 1)

    def _rows(self, found: torch.Tensor) -> torch.Tensor:
        """Return a conditional norm's parts ``(M, 2, C)``; nothing is added for a modality that the donor lacks."""
        indices = [self.pairs[m] for m in range(len(self.channels))]
        return torch.stack([torch.zeros_like(found[0]) if j is None else found[j] for j in indices])

    # --- fusion -------------------------------------------------------------------------------------------------------
    def _design(self) -> DesignLayout | None:
        if not isinstance(self.network, MultiEncoderUNet) or self.donor.form != self.form:
            return None
        fusion = self.network.fusion
        return DesignLayout.of(fusion) if self.donor.fusion == fusion.name else None

    def _of_fusion(self, key: str, own: torch.Tensor) -> torch.Tensor | None:
        if self.design is None:
            return None
        norm = key.removesuffix(PARTS)
        asked = key if norm == key else f"{norm}.weight"  # a norm's parts go the way of its weight, if it has one
        if asked in self.design.shapes and self.design.of_classes(asked) and not self.same_labels:
            self.classes_skipped = True
            return None
        if norm != key:
            place = self.design.place(asked, self.pairs)
            found = (
                None
                if place is None
                else self._trunk_of("fusion").get(f"fusion.{place.removesuffix('.weight')}{PARTS}")
            )
            return None if found is None else self._rows(found)
        assert self.donor.channels is not None
        return self.design.take(key, own, self._trunk_of("fusion"), self.pairs, len(self.donor.channels))

    # --- decoder ------------------------------------------------------------------------------------------------------
    def _of_trunk(self, key: str) -> tuple[str, str, bool]:
        """Return part, the donor's key and whether it is a head."""
        is_head = ".seg_layers." in key or key.startswith("decoder.heads.")
        if self.donor.form == self.form:
            alone = key.startswith("modality_decoder.")
            is_head = is_head or (alone and self.form == "early_fusion")
            part = "modality decoder" if alone else "encoder" if key.startswith("encoder.") else "decoder"
            return part, key, is_head
        if self.form in _FUSES_AT_SCALES:
            if not key.startswith("modality_decoder."):
                return "decoder", key, is_head
            return "modality decoder", key.removeprefix("modality_"), is_head
        return "decoder", self._stock_key_of_trunk(key), is_head

    def _stock_key_of_trunk(self, key: str) -> str:
        layer = re.fullmatch(r"decoder\.(down|up|merge|heads)\.(\d+)\.(.+)", key)
        if layer is None:
            return ""
        kind, scale, rest = layer[1], int(layer[2]), layer[3]
        trunk = self.network.decoder
        assert isinstance(trunk, TrunkDecoder)
        mirrored = len(trunk.up) - 1 - scale
        if kind == "up":
            return f"decoder.transpconvs.{mirrored}.{rest}"
        if kind == "heads":
            return f"decoder.seg_layers.{mirrored}.{rest}"
        block = re.fullmatch(r"(0|1\.0)\.([01])\.(.+)", rest)
        if block is None:  # the channel shuffle
            return ""
        stage = f"encoder.stages.{scale + 1}.0" if kind == "down" else f"decoder.stages.{mirrored}"
        return f"{stage}.convs.{int(block[1] != '0')}.{('conv', 'norm')[int(block[2])]}.{block[3]}"

    # --- words --------------------------------------------------------------------------------------------------------
    def notes(self, result: Transfer) -> list[str]:
        """Return what a user should know beside the table."""
        notes = []
        missing = [name for m, name in enumerate(self.channels) if self.pairs[m] is None]
        if missing and self.donor.form != "stock":
            offered = ", ".join(self.donor.channels or ())
            start = "a mean of the others" if self.form == "shared_encoder" else "new encoders"
            notes.append(
                f"The checkpoint has no {', '.join(missing)} (it has {offered}): {start}. Another one can stand "
                f"in: mgml warmstart --use {missing[0]}=MODALITY."
            )
        if self.classes_skipped:
            notes.append("The labels are others, or unknown, there: what belongs to classes starts anew.")
        taken = {part.name for part in result.parts if part.taken}
        if self.donor.form == "stock" and self.form in _FUSES_AT_SCALES and "decoder" not in taken:
            notes.append(
                "The decoder is narrower than the checkpoint's and starts anew; mgml plan --set decoder_width_ratio=1 "
                "decoder_convs=null makes it fit, and the network larger."
            )
        if self.design is not None and self.design.order_matters and self._order_differs():
            notes.append("The fusion design reads the order of the modalities, which differs: it has to learn it anew.")
        apart = self.form in ("multi_encoder", "early_fusion")  # an encoder, or a stem, per modality
        return notes + self.norms.notes(of_encoders=self.donor.form == "stock" and apart)

    def _order_differs(self) -> bool:
        return self.donor.channels is not None and tuple(self.donor.channels) != self.channels


def _nothing_fits(network: nn.Module, form: str, donor: Donor) -> str:
    def widths(weights: Mapping[str, torch.Tensor]) -> str:
        first = [tensor for key, tensor in weights.items() if key.startswith("encoder") and tensor.ndim >= 4]
        return f"{first[0].shape[0]} channels wide with kernel {'x'.join(map(str, first[0].shape[2:]))}"

    advice = "the same plans (-p) as the checkpoint's"
    if form != "stock" and donor.form == "stock":
        ratio = " decoder_width_ratio=1" if form == "early_fusion" else ""
        advice += f", and encoders of their width: mgml plan --set width_factor=1{ratio}"
    return (
        f"Nothing of the checkpoint fits this network: its first convolution is {widths(donor.weights)}, the network's "
        f"{widths(network.state_dict())}. Use {advice}."
    )
