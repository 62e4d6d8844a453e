"""`MultiEncoderUNet`: an encoder per modality (`SharedEncoderUNet`: one for all), fused and decoded for any subset.

Encoders never see the mask, so one set of features serves the incomplete (student) pass, the complete (teacher) pass
and, in evaluation, all subsets. *Missing is exact*: absent channels are replaced by zero before the encoders and absent
features are left out of the fusion, so whatever an absent channel held cannot change the output by one bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, overload

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.network.conditional_norms import make_conditional
from nnunetv2_mgml.network.decoder import Decoded, FusionDecoder, SubsetDecoder
from nnunetv2_mgml.network.encoders import DROPOUTS
from nnunetv2_mgml.network.fusion.attention import StudentDropout
from nnunetv2_mgml.network.fusion.base import FusionDesign
from nnunetv2_mgml.network.interface import Logits, Needs, SingleModalities, TrainingOutput, View
from nnunetv2_mgml.network.silence import noise, random_layers_act, silence
from nnunetv2_mgml.network.subset_module import SubsetModule, zero_absent

_MEETS_OTHERS = (*DROPOUTS, nn.modules.batchnorm._BatchNorm)
"""Layers whose result for a sample depends on the rest of its batch, or on its place in it."""

_FEW_VOXELS = 2**14
"""Of a batch at a scale: up to so many, two passes together take less time, and memory does not count."""


def _drops(fusion: FusionDesign) -> bool:
    """Whether the pass a step learns from is noisy in the design, and that of the teacher is not."""
    return any(isinstance(layer, StudentDropout) and layer.rate > 0 for layer in fusion.modules())


def _coarse(features: list[torch.Tensor]) -> int:
    """Return the finest scale below full resolution that has few voxels; their number where none has."""
    voxels = (len(f) * math.prod(f.shape[3:]) for f in features)
    return next((scale for scale, count in enumerate(voxels) if scale and count <= _FEW_VOXELS), len(features))


class MultiEncoderUNet(SubsetModule):
    """See the module docstring; built by `nnunetv2_mgml.network.build.build_network`.

    Args:
        encoders: one per modality; input ``(B, 1 + P, *spatial)`` with ``P`` previous-stage channels of a cascade.
        fusion: the fusion design.
        decoder: the fusion decoder; ``decoder.deep_supervision`` is the switch nnU-Net sets.
        modality_decoder: decoder shared by all modalities, or None where no loss needs it.
        modality_scale: the finest scale this decoder is given.

    Attributes:
        gradient_checkpointing: whether a training step computes the encoders, and the decoder of the complete view,
            again for the backward pass instead of keeping what is inside them. A compiled network decides that itself.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        fusion: FusionDesign,
        decoder: SubsetDecoder,
        modality_decoder: nn.Module | None,
        modality_scale: int = 0,
    ) -> None:
        super().__init__()
        self.encoders: nn.Module = nn.ModuleList(encoders)
        self.fusion = fusion
        self.decoder = decoder
        self.modality_decoder = modality_decoder
        self.modality_scale = modality_scale
        self.gradient_checkpointing = False
        self._joins_passes = (
            isinstance(decoder, FusionDecoder)
            and fusion.joins_passes
            and not fusion.wants_images
            and not any(isinstance(layer, _MEETS_OTHERS) for layer in (*fusion.modules(), *decoder.modules()))
            and (type(fusion).joins is not FusionDesign.joins or not _drops(fusion))
        )

    @property
    def num_modalities(self) -> int:
        """``M``."""
        return len(cast(nn.ModuleList, self.encoders))

    def condition_norms(self) -> None:
        """Let the instance norms of fusion and decoder depend on what is visible; before anything else replaces them.

        Raises:
            ValueError: there are none.
        """
        decoder = cast(FusionDecoder, self.decoder)
        modules = (*(self.fusion.modules() if self.fusion.conditions_norms else ()), *decoder.modules())
        told = make_conditional(modules, self.num_modalities)
        if told is None:
            raise ValueError("Fusion and decoder have no instance norms, or theirs were replaced already.")
        decoder.told = told

    def encode(self, x: torch.Tensor, subset: tuple[bool, ...] | None = None) -> list[torch.Tensor]:
        """Run the encoders.

        Args:
            x: ``(B, M + P, *spatial)``.
            subset: run only these encoders; the features of the others are finite, and zero unless the fusion hides
                them itself. None: all.

        Returns:
            Per scale, full resolution first, ``(B, M, C_s, *spatial_s)``.
        """
        count = self.num_modalities
        previous_stage = x[:, count:]
        per_modality: list[list[torch.Tensor] | None] = [
            self._features(m, torch.cat((x[:, m : m + 1], previous_stage), 1)) if subset is None or subset[m] else None
            for m in range(count)
        ]
        present = next(features for features in per_modality if features is not None)
        if subset is not None and sum(subset) == 1 and self.fusion.hides_absent:  # what is hidden needs no memory
            return [f[:, None].expand(-1, count, *f.shape[1:]) for f in present]
        return [
            torch.stack([torch.zeros_like(present[s]) if f is None else f[s] for f in per_modality], 1)
            for s in range(len(present))
        ]

    def _features(self, modality: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Run an encoder; computed again in the backward pass it must meet the same randomness, so not where silent."""
        encoder = cast(nn.ModuleList, self.encoders)[modality]
        if self._checkpoints() and random_layers_act(self.training):
            random = any(isinstance(module, DROPOUTS) for module in encoder.modules())
            recomputed: list[torch.Tensor] = checkpoint(encoder, x, use_reentrant=False, preserve_rng_state=random)
            return recomputed
        own: list[torch.Tensor] = encoder(x)
        return own

    def _checkpoints(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def fuse_decode(self, features: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Fuse and decode for a mask ``(B, M)`` bool.

        Returns:
            Logits ``(B, R, *spatial)``, or with deep supervision a list of them, highest resolution first.
        """
        decoded = self.decoder(features, mask, self.fusion)
        return decoded.outputs if self.decoder.deep_supervision else decoded.outputs[0]

    def decode_subsets(
        self, features: list[torch.Tensor], subsets: torch.Tensor, voxels: int | None = None
    ) -> torch.Tensor:
        """Fuse and decode every sample for every subset.

        Args:
            features: as `encode` returns them.
            subsets: ``(S, M)`` bool.
            voxels: see `FusionDecoder.decode_masks`. Small tensors gain from going through a layer together; with large
                ones a batch gains nothing and takes memory. None: 2**19, and on a CPU, whose caches hold less, 2**16.

        Returns:
            Logits ``(B, S, R, *spatial)``.
        """
        if voxels is None:
            voxels = 2**16 if features[0].device.type == "cpu" else 2**19
        samples = [[f[b : b + 1] for f in features] for b in range(len(features[0]))]
        return torch.stack([self.decoder.decode_masks(own, subsets, self.fusion, voxels) for own in samples])

    def encode_places(self, x: torch.Tensor, places: torch.Tensor | None) -> list[torch.Tensor]:
        """Run the encoders where it is worth it: here every encoder on every sample, so that each has a gradient.

        Args:
            x: ``(B, M + P, *spatial)``.
            places: see `View.encoded`.

        Returns:
            What `encode` returns; elsewhere anything finite.
        """
        return self.encode(x)

    def decode_modalities(self, features: list[torch.Tensor], places: torch.Tensor | None = None) -> torch.Tensor:
        """Return the shared decoder's label logits from each modality alone, ``(B, M, K, *spatial_s)`` at its scale.

        Args:
            features: as `encode` returns them.
            places: see `View.encoded`; elsewhere the logits are 0. None: everywhere.

        Raises:
            RuntimeError: the network was built without this decoder (no loss needed it).
        """
        if self.modality_decoder is None:
            raise RuntimeError("This network has no modality decoder (modality_decoder_weight 0, soft_label none).")
        batch, modalities = features[0].shape[:2]
        rows = [f.flatten(0, 1) for f in features[self.modality_scale :]]
        logits: torch.Tensor = self.modality_decoder(rows if places is None else [f[places] for f in rows])
        if places is not None:
            logits = logits.new_zeros((batch * modalities, *logits.shape[1:])).index_copy(0, places, logits)
        own: torch.Tensor = logits.unflatten(0, (batch, modalities))
        return own

    @overload
    def forward(self, x: torch.Tensor, view: View, needs: Needs) -> TrainingOutput: ...

    @overload
    def forward(
        self,
        x: torch.Tensor,
        view: View | torch.Tensor | None = None,
        needs: None = None,
        *,
        modality_mask: torch.Tensor | None = None,
    ) -> Logits: ...

    def forward(
        self,
        x: torch.Tensor,
        view: View | torch.Tensor | None = None,
        needs: Needs | None = None,
        *,
        modality_mask: torch.Tensor | None = None,
    ) -> Logits | TrainingOutput:
        """Predict.

        Args:
            x: ``(B, M + P, *spatial)``: the modalities in channel order, then a cascade's previous-stage one-hot.
            view: what may be seen; a tensor ``(B, M)`` is what is visible. None: what `set_visible` was told, else read
                in-band (see `in_band_mask`).
            needs: what a training step's loss terms need; None: the prediction alone.
            modality_mask: ``(B, M)`` bool, another name for a view that is a tensor.

        Returns:
            Without ``needs``, what nnU-Net expects: logits ``(B, R, *spatial)``, or with deep supervision a list,
            highest resolution first. With them a `TrainingOutput`.
        """
        subset = None
        given = modality_mask if view is None else view
        # a compiled network that looked at the bools would be compiled anew for every subset
        if given is None and needs is None and not torch.compiler.is_compiling():
            subset = self._visible_subset
        view = self._view(x, given)
        available = view.visible if view.available is None else view.available
        shown = zero_absent(x, available)
        if needs is None:
            return self.fuse_decode(self.encode(shown, subset), view.visible)
        features = self.encode_places(shown, view.encoded)
        images = shown[:, : self.num_modalities] if self.fusion.wants_images else None
        student, complete = self._decode_views(features, images, available, view, needs)
        modality = self.decode_modalities(features, view.encoded) if needs.modality else None
        single = None
        if needs.single:
            teacher = complete or student
            if complete is not None and (view.own_images is not None or needs.noisy or needs.teacher_scale):
                # that one is another term's
                teacher = self._decode_complete(features, available, View(view.visible), Needs(complete="target"))
            single = self._decode_single(features, teacher)
        return TrainingOutput(
            student.outputs,
            student.auxiliary,
            student.loss,
            modality,
            None if complete is None else complete.outputs,
            single,
            None if view.subsets is None else self._decode_further(features, view.subsets),
        )

    def _decode_views(
        self,
        features: list[torch.Tensor],
        images: torch.Tensor | None,
        available: torch.Tensor,
        view: View,
        needs: Needs,
    ) -> tuple[Decoded, Decoded | None]:
        """Predict from what is visible and, where it is needed, from all that a case has."""
        learns = needs.complete == "learns" and torch.is_grad_enabled()
        apart = _coarse(features) if learns and view.own_images is None and not needs.noisy else len(features)
        if self._joins_passes and apart < len(features):
            return cast(FusionDecoder, self.decoder).both(
                features,
                view.visible,
                available,
                self.fusion,
                finest=min(needs.teacher_scale, self.decoder.coarsest_output),
                apart=apart,
                again=self._checkpoints(),
            )
        # first, so that the backward pass meets it last, when what the others kept is gone
        complete = self._decode_complete(features, available, view, needs) if needs.complete != "no" else None
        return self.decoder(features, view.visible, self.fusion, images, available), complete

    def _decode_complete(
        self, features: list[torch.Tensor], available: torch.Tensor, view: View, needs: Needs
    ) -> Decoded:
        """Predict from all that a case has, without dropout unless asked: a target, also where it learns itself.

        Args:
            features: the student's; not used where the view has images of its own.
            available: ``(B, M)`` bool.
            view: whose ``own_images`` count, nothing else.
            needs: whether it learns and is noisy, and where it ends.
        """
        learns = needs.complete == "learns"
        randomness = noise if needs.noisy else silence
        finest = min(needs.teacher_scale, self.decoder.coarsest_output)

        def decode(*features: torch.Tensor) -> Decoded:
            with randomness():  # also where it is run again
                return self.decoder(list(features), available, self.fusion, finest=finest)

        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            if view.own_images is not None:
                with randomness():
                    features = self.encode(zero_absent(view.own_images, available))
            if self._checkpoints():
                again: Decoded = checkpoint(decode, *features, use_reentrant=False, preserve_rng_state=needs.noisy)
                return again
            return decode(*(features if learns else [f.detach() for f in features]))

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

    def _decode_further(self, features: list[torch.Tensor], subsets: torch.Tensor) -> list[torch.Tensor]:
        """Predict from ``(B, S, M)`` subsets as one batch; returns ``(B, S, R, *spatial_s)`` per resolution."""
        batch, count = subsets.shape[:2]
        repeated = [f[:, None].expand(-1, count, *f.shape[1:]).flatten(0, 1) for f in features]
        decoded = self.decoder(repeated, subsets.flatten(0, 1), self.fusion)
        return [output.unflatten(0, (batch, count)) for output in decoded.outputs]


if not TYPE_CHECKING:
    __getattr__ = forward(__name__)
