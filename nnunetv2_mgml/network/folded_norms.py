"""Conditional norms for a network that sees fewer modalities, or whose norms do not depend on what is visible.

A conditional norm (`conditional_norms`) is ``(w z + v) (1 + a) + b``, where ``z`` is the normalised input and ``a`` and
``b`` are sums over the modalities ``m`` of ``(visible_m - 1/2)`` times its parts ``A_m`` and ``B_m``. Where it is
settled for some modalities whether they are visible, their shares of the sums are constants ``s`` and ``t``, and::

    (w z + v) (1 + s + a) + t + b = (w' z + v') (1 + a') + b'
    w' = w (1 + s)    v' = v (1 + s) + t    A'_m = A_m / (1 + s)    B'_m = B_m - t A'_m

for whatever the others are. So a modality that a network does not have is one that is hidden, and a norm that depends
on nothing is one of which all is settled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

PARTS = ".of_modalities"
"""How the keys of what a modality adds to a norm end."""
_SMALLEST = 1e-3
"""Of ``|1 + s|`` where it is divided by: a channel nearer to 0 is off by at most this share of ``w z + v``."""

Weights = Mapping[str, torch.Tensor]


def fold(weights: Weights, visible: Mapping[int, float]) -> dict[str, torch.Tensor]:
    """Return weights in which the settled modalities have no part any more, theirs being in ``weight`` and ``bias``.

    Args:
        weights: a state dict; ``of_modalities`` of its norms are ``(M, 2, C)``, ``weight`` and ``bias`` ``(C,)``. Norms
            without the latter two (not affine) stay as they are.
        visible: the settled modalities: 1 visible, 0 hidden, between them a share of the cases.
    """
    folded = dict(weights)
    for key in _conditional(weights):
        norm = key.removesuffix("of_modalities")
        if f"{norm}weight" not in weights:
            continue
        parts = weights[key].double()
        others = [m for m in range(len(parts)) if m not in visible]
        signs = parts.new_tensor([visible.get(m, 0.5) - 0.5 for m in range(len(parts))])
        scale, shift = (signs[:, None, None] * parts).sum(0).unbind(0)
        scale = 1 + scale
        if others:
            scale = _not_0(scale)
        folded |= _taken_up(norm, weights, scale, shift)
        del folded[key]
        if others:
            rest = torch.zeros_like(parts)
            rest[others] = _beside(parts[others], scale, shift)
            folded[key] = rest.to(weights[key].dtype)
    return folded


def alone(weights: Weights, sources: Sequence[int | None]) -> dict[str, torch.Tensor]:
    """Return weights for other modalities where each pass sees one of them alone: each pass is as its source's was.

    Args:
        weights: as for `fold`.
        sources: per modality from now on, which of the donor's it starts from; None: the mean of all.
    """
    changed = dict(weights)
    for key in _conditional(weights):
        norm, parts = key.removesuffix("of_modalities"), weights[key].double()
        wanted = torch.stack([parts.mean(0) if j is None else parts[j] for j in sources])
        if f"{norm}weight" in weights:  # else nothing can take up what more or fewer hidden modalities make of it
            scale, shift = ((wanted.sum(0) - parts.sum(0)) / 2).unbind(0)
            scale = _not_0(1 + scale)
            changed |= _taken_up(norm, weights, scale, shift)
            wanted = _beside(wanted, scale, shift)
        changed[key] = wanted.to(weights[key].dtype)
    return changed


def _taken_up(norm: str, weights: Weights, scale: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a norm's own scale and shift with constants in them."""
    weight, bias = weights[f"{norm}weight"], weights[f"{norm}bias"]
    return {
        f"{norm}weight": (weight.double() * scale).to(weight.dtype),
        f"{norm}bias": (bias.double() * scale + shift).to(bias.dtype),
    }


def _beside(parts: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return the parts ``(M, 2, C)`` of the modalities beside such constants."""
    scales = parts[:, 0] / scale
    return torch.stack((scales, parts[:, 1] - shift * scales), 1)


def _not_0(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() < _SMALLEST, scale.new_tensor(_SMALLEST).copysign(scale), scale)


class NormsOfDonor:
    """The weights of a donor as each part of a network takes them; of a donor without conditional norms, as they are.

    Args:
        weights: the donor's.
        offered: its modalities by name; None: one, of no modality in particular.
        pairs: the network's channel -> the donor's, None where it has none for it.
        conditional: whether the network's own norms depend on what is visible.

    Raises:
        ValueError: conditional norms of another number of modalities or channels.
    """

    def __init__(
        self, weights: Weights, offered: Sequence[str] | None, pairs: Mapping[int, int | None], conditional: bool
    ) -> None:
        self.weights, self.offered, self.conditional = weights, offered, conditional
        self.count = 1 if offered is None else len(offered)
        self.kept = {j for j in pairs.values() if j is not None}
        self.keys = _conditional(weights)
        for key in self.keys:
            _check(key, weights, self.count)
        self.trunk = self._folded(self._settled())
        """For what sees all that the network has."""
        self.plain = self._folded(self._only(self.kept) if self.kept else self._share())
        """For norms that depend on nothing, as with all that the network has visible."""
        self.alone = alone(weights, [pairs[m] for m in sorted(pairs)]) if self.keys else weights
        """For an encoder of all modalities, which sees one of the network's at a time."""
        self._of_encoders: dict[int | None, Weights] = {}

    def of_encoder(self, j: int | None) -> Weights:
        """Return the weights for an encoder of one modality: as with the donor's ``j`` alone visible.

        Args:
            j: None: an encoder that starts from the mean of all, whose norms do so too.
        """
        if j not in self._of_encoders:
            self._of_encoders[j] = self._folded(self._share() if j is None else self._only({j}))
        return self._of_encoders[j]

    def _folded(self, visible: Mapping[int, float]) -> Weights:
        return fold(self.weights, visible) if self.keys else self.weights

    def _settled(self) -> dict[int, float]:
        """Return what is settled for the part of the network that sees all it has."""
        if not self.kept:
            return self._share()
        visible = self._only(self.kept)
        remain = self.kept if self.conditional and self.offered is not None else set()
        return {m: value for m, value in visible.items() if m not in remain}

    def _only(self, seen: set[int]) -> dict[int, float]:
        return {m: float(m in seen) for m in range(self.count)}

    def _share(self) -> dict[int, float]:
        return dict.fromkeys(range(self.count), 1 / self.count)

    def notes(self, of_encoders: bool) -> list[str]:
        """Return what a user should know: which modalities the norms count as visible from now on.

        Args:
            of_encoders: whether the network has an encoder, or a stem, per modality and the donor has not.
        """
        settled = self._settled()
        told = self._parts_of(range(self.count) if of_encoders else settled)
        if not told:
            return []
        if any(f"{key.removesuffix('of_modalities')}weight" not in self.weights for key in told):
            return [
                "The checkpoint's norms depend on what is visible and have no scale and shift of their own (affine "
                "false), which could take that up: it is left out."
            ]
        seen, hidden = self._names(self.kept), self._names(set(range(self.count)) - self.kept)
        if self.conditional and len(settled) < self.count:
            notes = []
            if self._parts_of(settled):
                notes.append(
                    f"{hidden}, of which the checkpoint's norms know, is not here and counts as hidden: its part is in "
                    f"their scale and shift, for every subset of {seen}."
                )
            if of_encoders:
                notes.append(
                    f"The checkpoint's norms depend on what is visible, those of encoders and of the decoder shared by "
                    f"all modalities do not: each encoder starts as with its modality alone visible, that decoder as "
                    f"with {seen} visible."
                )
            return notes
        whole = f"{seen or 'one of all'} visible" + (f" and {hidden} hidden" if seen and hidden else "")
        alone = "in each encoder or stem as with its modality alone visible, elsewhere " if of_encoders else ""
        return [f"The checkpoint's norms depend on what is visible, these do not: they start {alone}as with {whole}."]

    def _parts_of(self, modalities: Iterable[int]) -> list[str]:
        """Return the keys of norms that depend on any of these of the donor's modalities."""
        wanted = list(modalities)
        return [key for key in self.keys if self.weights[key][wanted].any()]

    def _names(self, indices: Iterable[int]) -> str:
        if self.offered is None:
            return "its one channel" if set(indices) else ""
        return ", ".join(self.offered[m] for m in sorted(indices))


def _conditional(weights: Weights) -> list[str]:
    return [key for key in weights if key.endswith(PARTS)]


def _check(key: str, weights: Weights, count: int) -> None:
    """Refuse parts that do not go with the modalities, or with the norm's own weights."""
    norm, found = key.removesuffix("of_modalities"), tuple(weights[key].shape)
    own = weights.get(f"{norm}weight")
    channels = found[-1:] if own is None else tuple(own.shape)
    if found != (count, 2, *channels) or len(channels) != 1 or (own is None) != (f"{norm}bias" not in weights):
        raise ValueError(
            f"'{key}' of the checkpoint has shape {found}; for its {count} modalities and norms of "
            f"{'x'.join(map(str, channels))} channels it must be {(count, 2, *channels)}. Name the modalities it was "
            f"trained with (mgml warmstart --channels), or use a checkpoint that is whole."
        )
