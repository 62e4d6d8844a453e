"""Cases given as arrays, or by modality name, to the Python API."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.inference.geometry import check_writable
from nnunetv2_mgml.inference.inputs import Case, CaseError, parse_missing
from nnunetv2_mgml.inference.preprocessing import Item, Model, prepare_case, preprocess_volumes
from nnunetv2_mgml.io.volumes import VolumeError, check_finite
from nnunetv2_mgml.modalities import channel_index


def on_host(image: Any) -> Any:
    """Return an image of the array API with its tensors in main memory, so that a worker can be sent it.

    Args:
        image: a tensor or array ``(M, z, y, x)``, or a sequence of ``M`` volumes; what is no tensor stays as it is.
    """
    if isinstance(image, tuple):
        return tuple(map(on_host, image))
    return image.detach().cpu() if hasattr(image, "detach") else image


def as_array(what: str, values: Any) -> NDArray[Any]:
    """Return what the array API was given as an array: anything `numpy.asarray` takes, and tensors of any device.

    Args:
        what: case and modality, for the message.
        values: numbers of any shape.

    Raises:
        CaseError: no numbers, or nested lists of unequal lengths.
    """
    values = on_host(values)
    if str(getattr(values, "dtype", "")) == "torch.bfloat16":  # NumPy has no such type
        values = values.float()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CaseError(f"{what} cannot be made an array of ({' '.join(str(error).split())}).") from error
    if array.dtype.kind not in "biuf":
        raise CaseError(
            f"{what} must be an array of real numbers, got {type(values).__name__} of type {array.dtype.name}."
        )
    return array


def prepare_image(
    name: str,
    image: Any,
    properties: dict[str, Any],
    previous_stage: NDArray[Any] | None,
    missing: Sequence[str] | None,
    model: Model,
    ofile: str | None,
) -> Item:
    """Preprocess an image of nnU-Net's array API.

    Args:
        name: case name, for messages.
        image: ``(M, z, y, x)``, or ``M`` volumes ``(z, y, x)`` with None for a missing one; see `as_array`.
        properties: nnU-Net's image properties, at least ``spacing`` (mm, ordered as the array axes), and with
            ``ofile`` what `geometry.check_writable` asks for; not changed.
        previous_stage: ``(1, z, y, x)`` or ``(z, y, x)`` labels of a cascade's previous stage.
        missing: as for `inputs.parse_missing`; what it names is not looked at.
        model: the model.
        ofile: output file without ending, handed through.

    Raises:
        ValueError: no spacing.
        CaseError: the number of channels is not ``M``, properties from which no file can be written, or see
            `preprocessing.preprocess_volumes`.
    """
    channels = model.channels
    if len(image) != len(channels):
        raise CaseError(
            f"Case {name}: {len(image)} channels given, the model has {len(channels)} "
            f"({', '.join(channels)}). Give None in the place of a missing one."
        )
    _check_spacing(properties)
    if ofile is not None:
        check_writable(name, properties, model.plans_manager.image_reader_writer_class)
    allowed = parse_missing(missing, channels).allowed
    volumes = {c: volume for c, volume in enumerate(image) if volume is not None and allowed[c]}
    return _from_volumes(name, volumes, properties, previous_stage, model, ofile)


def prepare_named(
    name: str,
    images: Mapping[str, Any],
    properties: dict[str, Any] | None,
    previous_stage: Any,
    missing: Sequence[str] | None,
    model: Model,
) -> Item:
    """Preprocess a case given by modality names, all as paths or all as arrays.

    Args:
        name: case name, for messages.
        images: modality name (aliases accepted) -> path or ``(z, y, x)`` array (see `as_array`); names left out or None
            are missing.
        properties: for arrays, nnU-Net's image properties, at least ``spacing`` (mm, ordered as the array axes).
        previous_stage: path or array of a cascade's previous-stage labels, or None.
        missing: as for `inputs.parse_missing`.
        model: the model.

    Raises:
        ValueError: an unknown name, one modality twice, paths mixed with arrays, or arrays without spacing.
        CaseError: see `preprocessing.prepare_case`.
    """
    channels = model.channels
    allowed = parse_missing(missing, channels).allowed
    given: dict[int, Any] = {}
    for key, image in images.items():
        channel = channel_index(key, channels)
        if channel in given:
            raise ValueError(f"{channels[channel]} is given twice ({', '.join(images)}).")
        if image is not None:
            given[channel] = image
    used = {c: image for c, image in given.items() if allowed[c]}
    if not used:
        raise CaseError(f"Case {name}: no modality is left. At least one of {', '.join(channels)} is needed.")
    are_paths = {isinstance(image, (str, Path)) for image in used.values()}
    if len(are_paths) > 1:
        raise ValueError("Give either paths or arrays for all modalities, not both.")
    if are_paths.pop():
        files = {c: os.fspath(path) for c, path in used.items()}
        subset = [c in files for c in range(len(channels))]
        return prepare_case(
            Case(name, files),
            subset,
            model.plans_manager,
            model.configuration_manager,
            model.dataset_json,
            None if previous_stage is None else os.fspath(previous_stage),
        )
    _check_spacing(properties)
    assert properties is not None
    return _from_volumes(name, used, properties, previous_stage, model, None)


def _check_spacing(properties: Any) -> None:
    """Raise a ValueError unless properties of an array hold its spacing."""
    spacing = properties.get("spacing") if isinstance(properties, Mapping) else None
    try:
        good = spacing is not None and len(spacing) == 3 and all(0 < float(s) < np.inf for s in spacing)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"Arrays need their spacing, three numbers above 0 in mm and in the order of the array axes: spacing=(z, "
            f'y, x), or properties={{"spacing": (z, y, x)}}; got {spacing!r}.'
        )


def _from_volumes(
    name: str,
    given: dict[int, Any],
    properties: dict[str, Any],
    previous_stage: Any,
    model: Model,
    ofile: str | None,
) -> Item:
    if not given:
        raise CaseError(f"Case {name}: no modality is left. At least one of {', '.join(model.channels)} is needed.")
    volumes = {c: as_array(f"Case {name}: {model.channels[c]}", image) for c, image in given.items()}
    shapes = {model.channels[c]: volumes[c].shape for c in sorted(volumes)}
    if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
        raise CaseError(
            f"Case {name}: every modality must be a 3-D array of one shape, got "
            f"{', '.join(f'{c} {shape}' for c, shape in shapes.items())}."
        )
    for channel in sorted(volumes):
        try:
            check_finite(model.channels[channel], volumes[channel])
        except VolumeError as error:
            raise CaseError(f"Case {name}: {error}") from error
    if previous_stage is not None:  # signed: nnU-Net marks what lies outside the image with -1
        previous_stage = as_array(f"Case {name}: the previous stage's labels", previous_stage).astype(np.float32)
        previous_stage = previous_stage[None] if previous_stage.ndim == 3 else previous_stage
    properties = {**copy.deepcopy(properties), "spacing": [float(s) for s in properties["spacing"]]}
    return preprocess_volumes(name, volumes, properties, previous_stage, ofile, model)
