"""Preprocess a case once for as many subsets as possible, with exactly what each would get alone.

nnU-Net crops to the voxels where any channel is not zero and takes the z-score inside them. Whether subsets share their
preprocessing therefore depends on one mask: those with the same one are preprocessed together, the others apart. In
skull-stripped data the masks are the same for nearly all subsets; where every modality has its own zeros, every subset
is a group of its own and the encoders run more often. So is every subset in a cascade's second stage, which is also fed
what the first stage predicted from that subset. Where only preprocessed data are left, all subsets share those.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_mgml.inference.inputs import Case, CaseError, EmptyCaseError, beyond
from nnunetv2_mgml.inference.preprocessing import Model, preprocess_volumes, read_previous_stage, varying
from nnunetv2_mgml.inference.reading import read_case
from nnunetv2_mgml.modalities import Subset


@dataclass(frozen=True)
class SubsetGroup:
    """Subsets of a case that share their preprocessed data."""

    subsets: list[Subset]
    channels: list[int]
    """Channel indices of ``data``."""
    data: npt.NDArray[Any]
    """``(len(channels), z, y, x)`` float32; modalities no subset of the group uses are not kept."""
    properties: dict[str, Any]
    """nnU-Net's properties, needed to put a prediction back on the image grid."""
    previous: npt.NDArray[Any] | None = None
    """``(P, z, y, x)`` float32, one-hot labels of a cascade's previous stage."""

    def full_data(self, num_modalities: int) -> npt.NDArray[Any]:
        """Return ``(M + P, z, y, x)`` float32 with zeros for the modalities that are not kept."""
        data = np.zeros((num_modalities, *self.data.shape[1:]), dtype=np.float32)
        data[self.channels] = self.data
        return data if self.previous is None else np.concatenate((data, self.previous))


@dataclass(frozen=True)
class SubsetGroups:
    """One case, preprocessed for all its subsets."""

    case: str
    groups: list[SubsetGroup]
    lacking: list[Subset]
    """Subsets it cannot be evaluated on."""


def prepare_subset_groups(
    case: Case,
    subsets: Sequence[Subset],
    model: Model,
    shared: bool,
    previous: Mapping[Subset, Path] | None = None,
) -> SubsetGroups:
    """Read a case and preprocess it for subsets; runs in a worker.

    Args:
        case: its files.
        subsets: the subsets wanted.
        model: the model.
        shared: crop and normalise once from all modalities that exist, whatever the masks and ``subsets``.
        previous: in a cascade's second stage, subset -> label map of the first.

    Returns:
        The groups, and the subsets the case cannot be evaluated on: a file is absent, or a volume has one value
        everywhere, as it is or once it is normalised.

    Raises:
        CaseError: a file that is wrong, or no file at all.
    """
    channels = model.channels
    problems = [text for _, text in case.problems] + beyond(case, channels)
    if problems:
        raise CaseError(f"Case {case.name}: {'; '.join(problems)}.")
    wanted = [c for c in range(len(channels)) if c in case.files and (shared or any(s[c] for s in subsets))]
    if not case.files:
        raise CaseError(f"Case {case.name}: no file for any of {', '.join(channels)}.")
    if not wanted:
        return SubsetGroups(case.name, [], list(subsets))
    volumes, properties = read_case(
        case.name, {c: case.files[c] for c in wanted}, channels, model.plans_manager.image_reader_writer_class()
    )
    volumes = varying(volumes)
    groups = []
    for members in _group(_possible(subsets, volumes), volumes, model, shared, previous is not None):
        used = {c: v for c, v in volumes.items() if shared or any(s[c] for s in members)}
        labels = None
        if previous is not None:
            labels = read_previous_stage(
                case.name, str(previous[members[0]]), model.plans_manager.image_reader_writer_class()
            )
        group = _preprocess(case.name, members, used, copy.deepcopy(properties), model, labels)
        if group is not None:
            groups.append(group)
    evaluated = {s for group in groups for s in group.subsets}
    return SubsetGroups(case.name, groups, [s for s in subsets if s not in evaluated])


def preprocessed_group(case: Case, subsets: Sequence[Subset], folder: Path, num_modalities: int) -> SubsetGroups:
    """Take a case from a preprocessed folder, cropped and normalised from all its modalities; runs in a worker.

    Args:
        case: which modalities it has; what lies in its files is not looked at.
        subsets: the subsets wanted.
        folder: nnU-Net's preprocessed data of a configuration.
        num_modalities: ``M``.

    Returns:
        As `prepare_subset_groups`.
    """
    data, _, _, properties = infer_dataset_class(str(folder))(str(folder), [case.name]).load_case(case.name)
    members = _possible(subsets, case.files)
    kept = sorted(c for c in case.files if any(s[c] for s in members))
    groups = [SubsetGroup(members, kept, np.asarray(data[:num_modalities])[kept], properties)] if members else []
    return SubsetGroups(case.name, groups, [s for s in subsets if s not in members])


def _preprocess(
    name: str,
    members: Sequence[Subset],
    volumes: dict[int, npt.NDArray[Any]],
    properties: dict[str, Any],
    model: Model,
    previous: npt.NDArray[Any] | None,
) -> SubsetGroup | None:
    """Return the group of the members whose modalities still vary once they are normalised; None if there is none."""
    try:
        item = preprocess_volumes(name, volumes, properties, previous, None, model)
    except EmptyCaseError:
        return None
    available = {c for c in volumes if item.available[c]}
    members = _possible(members, available)
    kept = sorted(c for c in available if any(s[c] for s in members))
    one_hot = None if previous is None else item.data[len(model.channels) :]
    return SubsetGroup(members, kept, item.data[kept], item.properties, one_hot) if members else None


def _possible(subsets: Sequence[Subset], channels: Container[int]) -> list[Subset]:
    """Return the subsets that need no other channels than these."""
    return [s for s in subsets if all(c in channels for c, visible in enumerate(s) if visible)]


def _group(
    subsets: Sequence[Subset], volumes: dict[int, npt.NDArray[Any]], model: Model, shared: bool, cascade: bool
) -> list[list[Subset]]:
    if cascade:
        return [[s] for s in subsets]
    if shared:
        return [list(subsets)] if subsets else []
    if model.configuration_manager.preprocessor_class is not DefaultPreprocessor:
        return [[s] for s in subsets]  # another preprocessor may let the modalities influence each other
    nonzero = {c: v != 0 for c, v in volumes.items()}
    filled: dict[bytes, bytes] = {}
    groups: dict[bytes, list[Subset]] = {}
    for subset in subsets:
        union = np.logical_or.reduce([nonzero[c] for c, visible in enumerate(subset) if visible])
        key = np.packbits(union).tobytes()
        if key not in filled:
            filled[key] = np.packbits(create_nonzero_mask(union[None])).tobytes()
        groups.setdefault(filled[key], []).append(subset)
    return list(groups.values())
