"""What a trained network holds inside for one case: the data behind the paper's figures 9, 11 and 12.

One patch of the network's own size around the tumour is run once through the encoders, the shared decoder and, for
several subsets, the fusion decoder; nothing slides and nothing is mirrored, so numbers differ a little from those of
a prediction. The soft label is built as in training, from the MetaNetwork's state in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from torch.nn import functional

from nnunetv2_mgml.inference.arguments import check_device
from nnunetv2_mgml.inference.inputs import Case, CaseError
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.inference.preprocessing import Item, prepare_case
from nnunetv2_mgml.io.volumes import VolumeError, check_file
from nnunetv2_mgml.modalities import Subset, subset_name
from nnunetv2_mgml.network.interface import bare
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.objective import Options, TermSpec
from nnunetv2_mgml.objective.terms.soft_label import soft_label_of
from nnunetv2_mgml.presentation.figures.slices import knows_sides, telling_slice
from nnunetv2_mgml.upstream.checkpoints import load_checkpoint

_TRAINING_STATE = "mgml"
"""The trainer's key for it in a checkpoint."""


@dataclass(frozen=True)
class Internals:
    """One axial slice of the patch, all arrays ``(y, x)`` in display orientation (see `figures.slices`)."""

    images: dict[str, NDArray[Any]]
    """Modality name -> preprocessed image, float32."""
    reference: NDArray[Any]
    """Label map."""
    single: dict[str, NDArray[Any]]
    """Modality name -> label map of the shared decoder; empty where the network has none."""
    soft_label: NDArray[Any] | None
    """Most probable label of the soft label; None where the model was trained without."""
    meta_parameters: dict[str, float]
    """``w_f``, ``beta``, ``alpha`` of this patch; empty where the soft label has none."""
    fused: NDArray[Any]
    """Label map of the fused prediction from all modalities the case has."""
    probabilities: dict[str, dict[str, NDArray[Any]]]
    """Subset name -> region or label name -> probability, float32; the key ``confidence`` is the network's certainty:
    the largest label probability, or for regions the mean over them of the probability of the more likely answer."""
    features: dict[str, NDArray[Any]]
    """Modality name -> encoder features ``(C, y, x)`` float32 at `scale`."""
    feature_reference: NDArray[Any]
    """``(y, x)`` bool at the features' resolution: where there is a label."""
    scale: int
    """Scale of the features, 0 is full resolution."""
    pixel_aspect: float
    """Height of a pixel divided by its width."""
    sides_known: bool = True
    """Whether the case's files say where the patient's left is (see `figures.slices.knows_sides`)."""


@dataclass(frozen=True)
class LoadedModel:
    """One fold of a trained model."""

    predictor: MGMLPredictor
    training_state: dict[str, Any]
    """What only training needs (the MetaNetwork); empty where the checkpoint does not hold it."""

    @property
    def network(self) -> MultiEncoderUNet:
        """The network without wrappers."""
        return cast(MultiEncoderUNet, bare(self.predictor.network))


def load_model(
    model_folder: Path, fold: int | str, checkpoint: str, device: str, trust_checkpoint: bool = False
) -> LoadedModel:
    """Load one fold of a trained model.

    Raises:
        FileNotFoundError: no such model, fold or checkpoint.
        ValueError: no such device, or a model whose inside cannot be shown: not ours, 2D, or a cascade's second stage.
    """
    check_device(device)
    predictor = MGMLPredictor(
        use_mirroring=False,
        device=torch.device(device),
        allow_tqdm=False,
        perform_everything_on_device=device == "cuda",
        missing_modalities=["auto"],
        trust_checkpoint=trust_checkpoint,
    )
    predictor.initialize_from_trained_model_folder(str(model_folder), (fold,), checkpoint)
    network = bare(predictor.network).to(predictor.device).eval()
    if not isinstance(network, MultiEncoderUNet):
        raise ValueError(
            f"{model_folder} holds a {type(network).__name__}; only models of nnUNetTrainerMGML and its "
            f"variants encode each modality alone, which is what is shown here."
        )
    if len(predictor.configuration_manager.patch_size) != 3:
        raise ValueError("The inside of a network is shown for 3D configurations only; this model is 2D.")
    if predictor.configuration_manager.previous_stage_name is not None:
        raise ValueError("The inside of a network is not shown for the second stage of a cascade; use its first stage.")
    content = load_checkpoint(model_folder / f"fold_{fold}" / checkpoint, trust_checkpoint)
    return LoadedModel(predictor, content.get(_TRAINING_STATE) or {})


def compute_internals(
    model: LoadedModel, case: Case, label_file: Path, subsets: Sequence[Subset], scale: int = 1
) -> Internals:
    """Run one patch of a case through a network.

    Args:
        model: what `load_model` returned.
        case: the input files; modalities whose file does not exist are absent.
        label_file: reference label map on the grid of the images.
        subsets: for which to return probabilities; those the case lacks a modality of are left out.
        scale: which scale's features to return; limited to what the network has.

    Raises:
        CaseError: the case cannot be read or preprocessed.
        FileNotFoundError: no label map.
    """
    predictor = model.predictor
    available = tuple(channel in case.files for channel in range(len(predictor.channels)))
    item = prepare_case(
        case, available, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    reference = _reference_on_network_grid(predictor, item, label_file)
    patch_of = _patch_around(reference, tuple(predictor.configuration_manager.patch_size))
    x = torch.from_numpy(np.stack([patch_of(channel) for channel in item.data]))[None].to(predictor.device)
    found = _Patch(model, item, x, patch_of(reference)).internals(subsets, scale)
    return replace(found, sides_known=knows_sides(label_file))


class _Patch:
    """One patch inside the network; methods return arrays in network axes ``(..., z, y, x)``."""

    def __init__(self, model: LoadedModel, item: Item, x: torch.Tensor, reference: NDArray[Any]) -> None:
        self.model = model
        self.predictor = model.predictor
        self.item = item
        self.x = x
        self.reference = reference
        self.channels = self.predictor.channels
        self.available: Subset = item.available
        self.network = model.network

    @torch.inference_mode()
    def internals(self, subsets: Sequence[Subset], scale: int) -> Internals:
        """Run everything and cut the most telling axial slice."""
        features = self.network.encode(self.x)  # all, as in training: a published reading fuses absent ones, too
        scale = min(scale, len(features) - 1)
        single, soft, parameters = self._modality_predictions(features)
        possible = [s for s in subsets if all(a or not v for a, v in zip(self.available, s, strict=True))]
        probabilities = {subset_name(s, self.channels): self._probabilities(features, s) for s in possible}
        fused = self.predictor.label_manager.convert_logits_to_segmentation(self._logits(features, self.available))
        display = _Display(self.predictor, self.item)
        reference = display(self.reference)
        z = telling_slice(reference)
        names = [name for name, available in zip(self.channels, self.available, strict=True) if available]
        per_modality = {
            name: display(features[scale][0, self.channels.index(name)].float().cpu().numpy()) for name in names
        }
        shape = next(iter(per_modality.values())).shape[1:]
        feature_z = min(int((z + 0.5) * shape[0] / len(reference)), shape[0] - 1)
        feature_reference = nearest(reference > 0, shape)[feature_z]
        return Internals(
            {name: display(self.x[0, self.channels.index(name)].cpu().numpy())[z] for name in names},
            reference[z],
            {name: display(labels)[z] for name, labels in single.items()},
            None if soft is None else display(soft)[z],
            parameters,
            display(np.asarray(fused))[z],
            {
                name: {region: display(volume)[z] for region, volume in volumes.items()}
                for name, volumes in probabilities.items()
            },
            {name: volume[:, feature_z] for name, volume in per_modality.items()},
            feature_reference,
            scale,
            display.pixel_aspect,
        )

    def _logits(self, features: list[torch.Tensor], subset: Subset) -> torch.Tensor:
        mask = torch.tensor([subset], device=self.x.device)
        return self.network.fuse_decode(features, mask)[0].float().cpu()

    def _probabilities(self, features: list[torch.Tensor], subset: Subset) -> dict[str, NDArray[Any]]:
        manager = self.predictor.label_manager
        values = np.asarray(manager.apply_inference_nonlin(self._logits(features, subset)))
        labels = self.predictor.dataset_json["labels"]
        names = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0])]
        if manager.has_regions:
            return dict(zip(names, values, strict=True)) | {"confidence": np.maximum(values, 1 - values).mean(0)}
        names.sort(key=lambda name: labels[name])
        return dict(zip(names, values[1:], strict=True)) | {"confidence": values.max(0)}

    def _modality_predictions(
        self, features: list[torch.Tensor]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[Any] | None, dict[str, float]]:
        """Return label maps per modality, that of the soft label (or None), and the meta-parameters."""
        if self.network.modality_decoder is None:
            return {}, None, {}
        logits = self.network.decode_modalities(features)
        if logits.shape[3:] != self.x.shape[2:]:
            mode = "bilinear" if self.x.ndim == 4 else "trilinear"
            logits = functional.interpolate(logits[0].float(), self.x.shape[2:], mode=mode)[None]
        values = self._label_values(logits.shape[2])
        predicted = logits[0].float().argmax(1).cpu().numpy()
        single = {
            name: values[classes]
            for name, classes, available in zip(self.channels, predicted, self.available, strict=True)
            if available
        }
        spec = TermSpec.of_prediction(
            Options.from_plans(self.predictor.plans_manager.plans),
            self.channels,
            logits.shape[2],
            self.predictor.label_manager.has_regions,
        )
        mask = torch.tensor([self.available], device=self.x.device)
        fused = soft_label_of(spec, self.model.training_state, logits, mask)
        if fused is None:
            return single, None, {}
        parameters = {}
        if fused.parameters is not None:
            parameters = {name: float(getattr(fused.parameters, name)[0]) for name in ("w_f", "beta", "alpha")}
        return single, values[fused.scores[0].argmax(0).cpu().numpy()], parameters

    def _label_values(self, classes: int) -> NDArray[Any]:
        """Return the label value of each class of the shared decoder (see `objective.segmentation.label_target`)."""
        manager = self.predictor.label_manager
        values = [0, *manager.regions_class_order] if manager.has_regions else list(manager.all_labels)
        return np.array(values[:classes])


class _Display:
    """Turns arrays in network axes to ``(z, y, x)`` in LPS, as `figures.slices.read_axial` does with files."""

    def __init__(self, predictor: MGMLPredictor, item: Item) -> None:
        self.back = list(predictor.plans_manager.transpose_backward)
        self.direction = _direction(item.properties)
        spacing = [predictor.configuration_manager.spacing[axis] for axis in self.back]
        image = self._oriented(np.zeros((2, 2, 2), np.uint8), spacing[::-1])
        self.pixel_aspect = image.GetSpacing()[1] / image.GetSpacing()[0]

    def __call__(self, volume: NDArray[Any]) -> NDArray[Any]:
        if volume.ndim == 4:
            return np.stack([self(channel) for channel in volume])
        transposed = np.ascontiguousarray(np.asarray(volume).transpose(self.back))
        transposed = transposed.astype(np.float32 if np.issubdtype(transposed.dtype, np.floating) else np.int16)
        return sitk.GetArrayFromImage(self._oriented(transposed))

    def _oriented(self, array: NDArray[Any], spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> sitk.Image:
        image = sitk.GetImageFromArray(array)
        image.SetDirection(self.direction)
        image.SetSpacing([float(s) for s in spacing])
        oriented: sitk.Image = sitk.DICOMOrient(image, "LPS")
        return oriented


def _direction(properties: Mapping[str, Any]) -> list[float]:
    """Return the direction matrix of the reader's arrays, row by row; the identity where the format has none."""
    if "sitk_stuff" in properties and len(properties["sitk_stuff"]["direction"]) == 9:
        return list(properties["sitk_stuff"]["direction"])
    if "nibabel_stuff" in properties:
        geometry = properties["nibabel_stuff"]
        axes = np.asarray(geometry.get("reoriented_affine", geometry["original_affine"]), dtype=float)[:3, :3]
        return list((np.diag([-1.0, -1.0, 1.0]) @ (axes / np.linalg.norm(axes, axis=0))).ravel())  # RAS to LPS
    return list(np.eye(3).ravel())


def nearest(volume: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Return a volume resampled to another shape by its nearest voxels (same field of view, any rank)."""
    index = [
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(int), old - 1)
        for new, old in zip(shape, volume.shape, strict=True)
    ]
    return volume[np.ix_(*index)]


def _reference_on_network_grid(predictor: MGMLPredictor, item: Item, label_file: Path) -> NDArray[Any]:
    """Read a label map and bring it through nnU-Net's transposing, cropping and resampling."""
    try:
        check_file(label_file)
    except (FileNotFoundError, VolumeError) as error:
        raise CaseError(f"Case {item.case}: {error}") from error
    labels, _ = predictor.plans_manager.image_reader_writer_class().read_seg(str(label_file))
    labels = labels[0].transpose(predictor.plans_manager.transpose_forward)
    box = item.properties["bbox_used_for_cropping"]
    return nearest(labels[tuple(slice(low, high) for low, high in box)], item.data.shape[1:]).astype(np.int16)


def _patch_around(reference: NDArray[Any], size: tuple[int, ...]) -> Any:
    """Return a function that cuts a patch centred on the labels (inside the volume, padded with zeros if smaller)."""
    found = np.argwhere(reference > 0)
    centre = found.mean(0) if len(found) else np.array(reference.shape) / 2
    starts = [
        int(np.clip(round(c - n / 2), 0, max(full - n, 0)))
        for c, n, full in zip(centre, size, reference.shape, strict=True)
    ]

    def cut(volume: NDArray[Any]) -> NDArray[Any]:
        part = volume[tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))]
        return np.pad(part, [(0, n - have) for n, have in zip(size, part.shape, strict=True)])

    return cut
