"""`SharedEncoderUNet`: one encoder for all modalities, which sees each of them alone and knows which it is.

Every modality has its own column of the first convolution, and a scale and a shift of its own in each instance norm;
all other weights are those of every modality (modality-specific normalisation: Karani et al., MICCAI 2018; Dou et al.,
IEEE TMI 2020). So the encoder is nnU-Net's own for all channels, shown one channel at a time. It has a part of the
weights of an encoder per modality, each learns from every modality, and small volumes of all modalities go through it
as one batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_mgml.network.conditional_norms import make_conditional
from nnunetv2_mgml.network.decoder import SubsetDecoder
from nnunetv2_mgml.network.encoders import DROPOUTS
from nnunetv2_mgml.network.fusion.base import FusionDesign
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.network.silence import random_layers_act
from nnunetv2_mgml.network.subset_module import zero_absent
from nnunetv2_mgml.upstream import cpu_layers

_AT_ONCE = {"cpu": 2**17, "other": 2**20}
"""Voxels of several modalities that go through the encoder as one batch. Small tensors gain from that; large ones gain
nothing, and on a CPU, whose caches hold less, they lose."""


def voxels_at_once(device: torch.device | str) -> int:
    """Return how many voxels of several modalities go through a shared encoder as one batch on a device."""
    return _AT_ONCE["cpu" if torch.device(device).type == "cpu" else "other"]


class _Pass(threading.local):
    """Which modality one thread's pass is of, where it is of one."""

    modality: int | None = None


class _Alone:
    """What the first convolution is told: its input is one modality, and which."""

    def __init__(self) -> None:
        self._pass = _Pass()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pass = _Pass()

    @property
    def modality(self) -> int | None:
        """None: the input has the channels of all."""
        return self._pass.modality

    @contextmanager
    def tell(self, modality: int | None) -> Iterator[None]:
        """Say so for a while."""
        self._pass.modality = modality
        try:
            yield
        finally:
            self._pass.modality = None


class _FirstConvolution:
    """Mixed into a convolution, which then does without the channels that would be zero."""

    alone: _Alone
    modalities: int

    def of_pass(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight for what this pass is of: all channels, or one modality's and a previous stage's."""
        m = self.alone.modality
        if m is None:
            return weight
        own, previous = weight[:, m : m + 1], weight[:, self.modalities :]
        return torch.cat((own, previous), 1) if previous.shape[1] else own


class _FirstConv2d(_FirstConvolution, nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, M + P, y, x)``, or ``(B, 1 + P, y, x)`` in a pass of one modality."""
        convolved: torch.Tensor = self._conv_forward(input, self.of_pass(self.weight), self.bias)
        return convolved


class _FirstConv3d(_FirstConvolution, cpu_layers.Conv3d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, M + P, z, y, x)``, or ``(B, 1 + P, z, y, x)`` in a pass of one modality."""
        return self.with_weight(input, self.of_pass(self.weight))


_FIRST: dict[type[nn.Module], Any] = {nn.Conv2d: _FirstConv2d, nn.Conv3d: _FirstConv3d}


class SharedEncoder(nn.Module):
    """The encoder and what its norms are told.

    Args:
        encoder: returns ``(B, C_s, *spatial_s)`` per scale of ``(B, M + P, *spatial)``, with ``P`` channels of a
            cascade's previous stage. Its instance norms become conditional; where it has others, the first convolution
            alone is each modality's own.
        modalities: ``M``.
    """

    def __init__(self, encoder: nn.Module, modalities: int) -> None:
        super().__init__()
        self.of_all = encoder
        self.modalities = modalities
        self._told = make_conditional(encoder.modules(), modalities)
        self._alone = _Alone()
        first: Any = next(module for module in encoder.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d)))
        self._skips_zeros = type(first) in _FIRST and cpu_layers.is_plain(first)
        if self._skips_zeros:
            first.__class__ = _FIRST[type(first)]
            first.alone, first.modalities = self._alone, modalities

    def forward(self, x: torch.Tensor, modalities: Sequence[int]) -> list[torch.Tensor]:
        """Return features of one modality per row, per scale ``(N, C_s, *spatial_s)``, full resolution first.

        Args:
            x: ``(N, M + P, *spatial)``.
            modalities: of each row.
        """
        each = torch.eye(self.modalities, dtype=torch.bool, device=x.device)
        alone = torch.stack([each[m] for m in modalities])  # a list as index would be copied to the device
        only = modalities[0] if self._skips_zeros and len(set(modalities)) == 1 else None
        previous = x[:, self.modalities :]
        x = zero_absent(x, alone) if only is None else torch.cat((x[:, only : only + 1], previous), 1)
        told = nullcontext() if self._told is None else self._told.tell(alone)
        with told, self._alone.tell(only):  # here, since a backward pass may run this again
            features: list[torch.Tensor] = self.of_all(x)
        return features


class SharedEncoderUNet(MultiEncoderUNet):
    """`MultiEncoderUNet` with a `SharedEncoder` in place of an encoder per modality.

    Args:
        encoder: with ``M + P`` input channels, see `SharedEncoder`.
        modalities: ``M``.
        fusion: the fusion design.
        decoder: the fusion decoder.
        modality_decoder: see `MultiEncoderUNet`.
        modality_scale: see `MultiEncoderUNet`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        modalities: int,
        fusion: FusionDesign,
        decoder: SubsetDecoder,
        modality_decoder: nn.Module | None,
        modality_scale: int = 0,
    ) -> None:
        super().__init__([], fusion, decoder, modality_decoder, modality_scale)
        self.encoders = SharedEncoder(encoder, modalities)
        self._random = any(isinstance(module, DROPOUTS) for module in encoder.modules())
        self.voxels_at_once: int | None = None
        """See `_AT_ONCE`; None: by the device."""
        self._mixes = any(getattr(module, "track_running_stats", False) for module in encoder.modules())

    @property
    def num_modalities(self) -> int:
        """``M``."""
        return cast(SharedEncoder, self.encoders).modalities

    def encode(self, x: torch.Tensor, subset: tuple[bool, ...] | None = None) -> list[torch.Tensor]:
        """Run the encoder on each modality alone; see `MultiEncoderUNet.encode`."""
        count = self.num_modalities
        wanted = [m for m in range(count) if subset is None or subset[m]]
        most = self._at_once(x)
        parts = [self._encode_some(x, wanted[start : start + most]) for start in range(0, len(wanted), most)]
        features = [torch.cat(of_scale, 1) if len(parts) > 1 else of_scale[0] for of_scale in zip(*parts, strict=True)]
        if len(wanted) == count:
            return features
        if len(wanted) == 1 and self.fusion.hides_absent:  # what is hidden needs no memory
            return [f.expand(-1, count, *f.shape[2:]) for f in features]
        return [_at_their_places(f, wanted, count) for f in features]

    def encode_places(self, x: torch.Tensor, places: torch.Tensor | None) -> list[torch.Tensor]:
        """Run the encoder where it is worth it, zeros elsewhere; see `MultiEncoderUNet.encode_places`."""
        if places is None:
            return self.encode(x)
        batch, count = len(x), self.num_modalities
        rows = places.tolist()
        alone = [[row for row in rows if row % count == m] for m in range(count)]
        groups = [rows] if self._at_once(x) >= count else [group for group in alone if group]
        features: list[torch.Tensor] = []
        for group in groups:
            found = self._run(x[[row // count for row in group]], [row % count for row in group])
            features = features or [f.new_zeros((batch * count, *f.shape[1:])) for f in found]
            at = torch.tensor(group)
            features = [whole.index_copy(0, at, f) for whole, f in zip(features, found, strict=True)]
        return [f.unflatten(0, (batch, count)) for f in features]

    def _at_once(self, x: torch.Tensor) -> int:
        """Return how many modalities of a batch go through the encoder together.

        In training all, where norms keep statistics of what they see: those of a batch have to be of what the kept ones
        are of, which a prediction goes by.
        """
        if self._mixes and self.training:
            return self.num_modalities
        limit = self.voxels_at_once or voxels_at_once(x.device)
        return max(1, limit // (len(x) * math.prod(x.shape[2:])))

    def _encode_some(self, x: torch.Tensor, wanted: Sequence[int]) -> list[torch.Tensor]:
        """Return the features of some modalities, per scale ``(B, len(wanted), C, *spatial)``."""
        batch = len(x)
        rows = x[:, None].expand(-1, len(wanted), *x.shape[1:]).flatten(0, 1)
        return [f.unflatten(0, (batch, len(wanted))) for f in self._run(rows, [*wanted] * batch)]

    def _run(self, x: torch.Tensor, modalities: Sequence[int]) -> list[torch.Tensor]:
        """Return the features of one modality per row, see `SharedEncoder.forward`; a training keeps little of it."""
        if not (self._checkpoints() and random_layers_act(self.training)):
            own: list[torch.Tensor] = self.encoders(x, modalities)
            return own
        again: list[torch.Tensor] = checkpoint(
            self.encoders, x, modalities, use_reentrant=False, preserve_rng_state=self._random
        )
        return again


def _at_their_places(features: torch.Tensor, wanted: list[int], count: int) -> torch.Tensor:
    """Return ``(B, count, C, *spatial)`` with the features of some modalities, and zeros for the others."""
    absent = torch.zeros_like(features[:, 0])
    return torch.stack([features[:, wanted.index(m)] if m in wanted else absent for m in range(count)], 1)
