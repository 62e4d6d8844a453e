"""`MultiEncoderUNet`: one encoder per modality, fused and decoded for any subset of them.

Encoders never see the mask, so one set of features serves the incomplete (student) pass, the complete (teacher) pass
and, in evaluation, all subsets. *Missing is exact*: absent channels are replaced by zero before the encoders and absent
features are left out of the fusion, so whatever an absent channel held cannot change the output by one bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

from nnunetv2_mgml.network.decoder import Decoded, FusionDecoder
from nnunetv2_mgml.network.fusion.base import FusionDesign, beside
from nnunetv2_mgml.network.outputs import SingleModalities, TrainingOutput
from nnunetv2_mgml.network.silence import silence


class MultiEncoderUNet(nn.Module):
    """See the module docstring; built by `nnunetv2_mgml.network.build.build_network`.

    Args:
        encoders: one per modality; input ``(B, 1 + P, *spatial)`` with ``P`` previous-stage channels of a cascade.
        fusion: the fusion design.
        decoder: the fusion decoder; ``decoder.deep_supervision`` is the switch nnU-Net sets.
        modality_decoder: decoder shared by all modalities, or None where no loss needs it.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        fusion: FusionDesign,
        decoder: FusionDecoder,
        modality_decoder: UNetDecoder | None,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.fusion = fusion
        self.decoder = decoder
        self.modality_decoder = modality_decoder
        self._availability: tuple[bool, ...] | torch.Tensor | None = None
        self._stored_mask: torch.Tensor | None = None

    @property
    def num_modalities(self) -> int:
        """``M``."""
        return len(self.encoders)

    def set_availability(self, subset: Sequence[bool] | torch.Tensor | None) -> None:
        """Set the mask every later `forward` uses when it is given none (a whole case, or a validation batch).

        Args:
            subset: ``M`` bools (absent encoders are then not run), a ``(B, M)`` bool tensor, or None to forget it.

        Raises:
            ValueError: wrong shape or dtype, or a sample without any modality.
        """
        if subset is None:
            self._availability = self._stored_mask = None
            return
        is_batch = isinstance(subset, torch.Tensor)
        mask = subset if is_batch else torch.tensor([[bool(present) for present in subset]])
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != self.num_modalities or not mask.any(1).all():
            shown = mask.tolist() if is_batch else tuple(subset)
            raise ValueError(
                f"Expected {self.num_modalities} bools with at least one True, or a bool tensor "
                f"(batch, {self.num_modalities}) with such rows, got {shown}. Leave samples without any "
                f"modality out."
            )
        self._availability = subset if is_batch else tuple(mask[0].tolist())
        self._stored_mask = mask

    def encode(self, x: torch.Tensor, subset: tuple[bool, ...] | None = None) -> list[torch.Tensor]:
        """Run the encoders.

        Args:
            x: ``(B, M + P, *spatial)``.
            subset: run only these encoders; the features of the others are zero. None: all.

        Returns:
            Per scale, full resolution first, ``(B, M, C_s, *spatial_s)``.
        """
        count = self.num_modalities
        previous_stage = x[:, count:]
        per_modality: list[list[torch.Tensor] | None] = [
            self.encoders[m](torch.cat((x[:, m : m + 1], previous_stage), 1)) if subset is None or subset[m] else None
            for m in range(count)
        ]
        present = next(features for features in per_modality if features is not None)
        return [
            torch.stack([torch.zeros_like(present[s]) if f is None else f[s] for f in per_modality], 1)
            for s in range(len(present))
        ]

    def fuse_decode(self, features: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Fuse and decode for a mask ``(B, M)`` bool.

        Returns:
            Logits ``(B, R, *spatial)``, or with deep supervision a list of them, highest resolution first.
        """
        outputs = self.decoder(features, mask, self.fusion).outputs
        return outputs if self.decoder.deep_supervision else outputs[0]

    def decode_subsets(self, features: list[torch.Tensor], subsets: torch.Tensor, voxels: int = 2**19) -> torch.Tensor:
        """Fuse and decode every sample for every subset.

        Args:
            features: as `encode` returns them.
            subsets: ``(S, M)`` bool.
            voxels: see `FusionDecoder.decode_masks`. On a CPU, PyTorch's convolutions are several times slower on one
                small tensor than on two at once; with large ones a batch gains nothing and takes memory.

        Returns:
            Logits ``(B, S, R, *spatial)``.
        """
        samples = [[f[b : b + 1] for f in features] for b in range(len(features[0]))]
        return torch.stack([self.decoder.decode_masks(own, subsets, self.fusion, voxels) for own in samples])

    def decode_modalities(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Return the shared decoder's label logits from each modality alone, ``(B, M, K, *spatial)``.

        Raises:
            RuntimeError: the network was built without this decoder (no loss needed it).
        """
        if self.modality_decoder is None:
            raise RuntimeError("This network has no modality decoder (modality_decoder_weight 0, soft_label none).")
        batch, modalities = features[0].shape[:2]
        logits = self.modality_decoder([f.flatten(0, 1) for f in features])
        return logits.unflatten(0, (batch, modalities))

    def forward(
        self,
        x: torch.Tensor,
        modality_mask: torch.Tensor | None = None,
        available: torch.Tensor | None = None,
        return_aux: bool = False,
        with_teacher: bool = False,
        teacher_input: torch.Tensor | None = None,
        with_single: bool = False,
        teacher_learns: bool = False,
    ) -> torch.Tensor | list[torch.Tensor] | TrainingOutput:
        """Predict.

        Args:
            x: ``(B, M + P, *spatial)``: the modalities in channel order, then a cascade's previous-stage one-hot.
            modality_mask: ``(B, M)`` bool, True = present for the prediction. None: what `set_availability` was told,
                else read in-band (see `in_band_mask`).
            available: ``(B, M)`` bool, the modalities each case has at all; None: ``modality_mask``.
            return_aux: return a `TrainingOutput` instead of the logits.
            with_teacher: with ``return_aux``, also predict from all available modalities, without gradient.
            teacher_input: the teacher's own augmented view, shaped as ``x``; None: it reuses the student's features.
            with_single: with ``return_aux``, also run the fusion decoder on each modality alone (rebalancing); their
                teacher is that of ``with_teacher``, without it the prediction from ``modality_mask``.
            teacher_learns: with ``with_teacher``, keep the teacher's gradient (``TrainingOutput.complete``).

        Returns:
            What nnU-Net expects: logits ``(B, R, *spatial)``, or with deep supervision a list highest resolution first.
        """
        subset = None
        if modality_mask is None:
            stored = self._stored_mask
            modality_mask = (
                in_band_mask(x, self.num_modalities) if stored is None else stored.to(x.device).expand(x.shape[0], -1)
            )
            # a compiled network that looked at the bools would be compiled anew for every subset
            if not torch.compiler.is_compiling() and isinstance(self._availability, tuple):
                subset = self._availability
        if available is None:
            available = modality_mask
        if not return_aux:
            return self.fuse_decode(self.encode(zero_absent(x, available), subset), modality_mask)
        features = self.encode(zero_absent(x, available))
        images = zero_absent(x, available)[:, : self.num_modalities] if self.fusion.wants_images else None
        student = self.decoder(features, modality_mask, self.fusion, images, available)
        modality = None if self.modality_decoder is None else self.decode_modalities(features)
        teacher = self._teach(features, available, teacher_input, teacher_learns) if with_teacher else None
        single = self._decode_single(features, student if teacher is None else teacher) if with_single else None
        return TrainingOutput(
            student.outputs,
            modality,
            None if teacher is None else teacher.outputs[0].detach(),
            student.auxiliary,
            student.loss,
            single,
            teacher.outputs if teacher and teacher_learns else None,
        )

    def _teach(
        self, features: list[torch.Tensor], available: torch.Tensor, own_input: torch.Tensor | None, learns: bool
    ) -> Decoded:
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()), silence():
            if own_input is not None:
                features = self.encode(zero_absent(own_input, available))
            return self.decoder(features if learns else [f.detach() for f in features], available, self.fusion)

    def _decode_single(self, features: list[torch.Tensor], teacher: Decoded) -> SingleModalities:
        """Run every modality for every sample, also where it is absent: which those are is the loss's business."""
        alone = torch.eye(self.num_modalities, dtype=torch.bool, device=features[0].device)
        students = [self.decoder(features, row.expand(len(features[0]), -1), self.fusion) for row in alone]
        return SingleModalities(
            students=[torch.stack([s.outputs[scale] for s in students], 1) for scale in range(len(teacher.outputs))],
            features=torch.stack([s.features for s in students], 1),
            teacher=[output.detach() for output in teacher.outputs],
            teacher_features=teacher.features.detach(),
        )


def zero_absent(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return ``x (B, M + P, *spatial)`` with the channels of absent modalities zero, NaN included.

    Args:
        x: any float dtype; the ``P`` previous-stage channels of a cascade stay as they are.
        mask: ``(B, M)`` bool, True = present, on the device of ``x``.
    """
    extra = x.shape[1] - mask.shape[1]
    keep = torch.cat((mask, mask.new_ones(len(mask), extra)), 1) if extra else mask
    return torch.where(beside(keep, x), x, 0)


def in_band_mask(x: torch.Tensor, num_modalities: int) -> torch.Tensor:
    """Read a ``(B, M)`` bool mask off a patch ``(B, M + P, *spatial)``: the fallback when nobody passed one.

    A channel that is zero all over the patch while another is not counts as absent. A patch in which every channel is
    zero lies outside the brain and counts as all present.
    """
    occupied = (x[:, :num_modalities].flatten(2) != 0).any(-1)
    return occupied | ~occupied.any(1, keepdim=True)
