"""Preprocess cases of which some modalities are absent, with nnU-Net's own reader and preprocessor.

Only present files are read, and one with a single value everywhere counts as absent. An absent channel enters nnU-Net's
preprocessing as an empty volume on the grid of the present ones, so the crop box and the z-score mask come from present
modalities only, and is set to zero again afterwards (a normalisation such as CTNormalization moves zero elsewhere).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunetv2_mgml.dataloading.availability import present_channels
from nnunetv2_mgml.inference.inputs import Case, CaseError, EmptyCaseError, resolve
from nnunetv2_mgml.inference.reading import read_case, read_file
from nnunetv2_mgml.io.workers import Task, WorkerDiedError, WorkerPool
from nnunetv2_mgml.modalities import Subset, channel_names, subset_name

_log = logging.getLogger(__name__)
Prepared = TypeVar("Prepared")


@dataclass(frozen=True)
class Item:
    """One preprocessed case."""

    case: str
    """Its name."""
    data: NDArray[Any]
    """``(M + P, z, y, x)`` float32; ``P`` one-hot channels of a cascade's previous stage."""
    properties: dict[str, Any]
    """nnU-Net's, needed to put a prediction back on the image grid."""
    available: Subset
    """``M`` bools: what it is predicted from."""
    ofile: str | None = None
    """Output file without ending; None: the prediction is returned."""
    files: dict[str, str] = field(default_factory=dict)
    """Modality -> path; empty for arrays."""

    def __getitem__(self, key: str) -> Any:
        """Return a field by the key it had while items were dicts (version 0.1)."""
        name = {"data_properties": "properties", "availability": "available"}.get(key, key)
        warnings.warn(
            f"Items are no dicts any more: item.{name} instead of item[{key!r}], which works until 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        if name not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, name)


@dataclass(frozen=True)
class FailedItem:
    """A case that could not be preprocessed."""

    case: str
    error: str
    """Why, a sentence that names the case."""


class Model(NamedTuple):
    """What preprocessing needs to know of a trained model."""

    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    verbose: bool = False

    @property
    def channels(self) -> tuple[str, ...]:
        """The ``M`` modality names in channel order."""
        return channel_names(self.dataset_json)


@dataclass(frozen=True)
class Job(Generic[Prepared]):
    """A case to preprocess, now or in a worker process."""

    case: str
    ofile: str | None
    prepare: Callable[[], Prepared]
    """Picklable; returns the item or raises."""


def prepare_case(
    case: Case,
    subset: Sequence[bool],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict[str, Any],
    prev_stage_file: str | None = None,
    ofile: str | None = None,
    verbose: bool = False,
) -> Item:
    """Read and preprocess one case.

    Args:
        case: its files.
        subset: ``M`` bools; only these modalities are read.
        plans_manager: the model's plans.
        configuration_manager: the model's configuration.
        dataset_json: the model's dataset.json.
        prev_stage_file: segmentation of a cascade's previous stage.
        ofile: output file without ending, handed through.
        verbose: nnU-Net's preprocessor reports what it does.

    Raises:
        CaseError: a file is unreadable, incomplete or on another grid, or every modality is empty.
    """
    model = Model(plans_manager, configuration_manager, dataset_json, verbose)
    reader = plans_manager.image_reader_writer_class()
    files = {c: case.files[c] for c, present in enumerate(subset) if present}
    volumes, properties = read_case(case.name, files, model.channels, reader)
    previous = None
    if prev_stage_file is not None:
        previous = read_previous_stage(case.name, prev_stage_file, reader)
    item = preprocess_volumes(case.name, volumes, properties, previous, ofile, model)
    return replace(item, files={model.channels[c]: path for c, path in files.items()})


def prepare_job(
    case: Case, missing: Sequence[str] | None, model: Model, prev_stage_file: str | None, ofile: str | None
) -> Item:
    """Decide which modalities a case has (see `inputs.resolve`) and preprocess it; runs in workers as well."""
    return prepare_case(
        case,
        resolve(case, missing, model.channels),
        model.plans_manager,
        model.configuration_manager,
        model.dataset_json,
        prev_stage_file,
        ofile,
        model.verbose,
    )


def iterate_items(jobs: Sequence[Job[Prepared]], num_processes: int) -> Iterator[Prepared | FailedItem]:
    """Preprocess cases in order, ahead of the consumer but never more than ``num_processes + 1`` of them.

    Args:
        jobs: the cases. One that fails yields a `FailedItem`; the others are not affected.
        num_processes: worker processes; with 0, or a single case, everything happens in this process.
    """
    workers = min(num_processes, len(jobs)) if len(jobs) > 1 else 0
    waiting: deque[Any] = deque()
    with WorkerPool(workers) as pool:
        for job in jobs:
            waiting.append((job, pool.submit(run_job, job)))
            if len(waiting) > workers:
                yield _collect(pool, *waiting.popleft())
        while waiting:
            yield _collect(pool, *waiting.popleft())


def run_job(job: Job[Prepared]) -> Prepared | FailedItem:
    """Run a job; an exception becomes a `FailedItem`."""
    try:
        return job.prepare()
    except CaseError as error:
        return FailedItem(job.case, str(error))
    except Exception as error:  # whatever is wrong with this case, the others must still be predicted
        _log.exception("Preprocessing of case %s failed", job.case)
        return FailedItem(job.case, f"Case {job.case}: preprocessing failed ({type(error).__name__}: {error}).")


def _collect(pool: WorkerPool, job: Job[Prepared], task: Task) -> Prepared | FailedItem:
    try:
        item: Prepared | FailedItem = pool.result(task)
        return item
    except WorkerDiedError as error:
        return FailedItem(job.case, f"Case {job.case}: preprocessing failed, {error}.")


def read_previous_stage(name: str, path: str, reader: Any) -> NDArray[Any]:
    """Read the ``(1, z, y, x)`` labels of a cascade's previous stage; raises CaseError where there are none."""
    if not os.path.isfile(path):
        raise CaseError(
            f"Case {name}: the previous stage's segmentation {path} does not exist. Predict the case with "
            f"the previous stage first (-prev_stage_predictions)."
        )
    return read_file(name, path, reader)[0]


def preprocess_volumes(
    name: str,
    volumes: Mapping[int, NDArray[Any]],
    properties: dict[str, Any],
    previous: NDArray[Any] | None,
    ofile: str | None,
    model: Model,
) -> Item:
    """Run the plans' own preprocessor on the present volumes.

    Args:
        name: case name, for messages.
        volumes: channel index -> ``(z, y, x)`` array of the present modalities; at least one, all of one shape.
        properties: the reader's (``spacing`` in mm, ordered as the array axes); nnU-Net adds crop and shapes.
        previous: ``(1, z, y, x)`` labels of a cascade's previous stage, or None.
        ofile: output file without ending, handed through.
        model: the model.

    Raises:
        CaseError: the previous stage has another shape, or is needed and not given.
        EmptyCaseError: every volume is empty.
    """
    stage = model.configuration_manager.previous_stage_name
    if stage is not None and previous is None:
        raise CaseError(
            f"Case {name}: this model is the second stage of a cascade and needs the labels {stage} "
            f"predicted for the case. Give them as previous_stage (-prev_stage_predictions)."
        )
    shape = np.shape(next(iter(volumes.values())))
    if previous is not None and previous.shape[1:] != shape:
        raise CaseError(
            f"Case {name}: the previous stage's segmentation has shape {previous.shape[1:]}, the images have {shape}."
        )
    channels = model.channels
    filled = varying(volumes)
    if not filled:  # nnU-Net would normalise by the mean of no voxel
        raise _nothing_left(name, volumes, channels)
    stacked = np.zeros((len(channels), *shape), dtype=np.float32)
    for channel, volume in filled.items():
        stacked[channel] = volume
    preprocessor = model.configuration_manager.preprocessor_class(verbose=model.verbose)
    data, seg, properties = preprocessor.run_case_npy(
        stacked, previous, properties, model.plans_manager, model.configuration_manager, model.dataset_json
    )
    _check_normalised(name, data, volumes, channels)
    present = _available(name, data, volumes, channels)
    for channel in range(len(channels)):
        if not present[channel]:
            data[channel] = 0
    if previous is not None:
        labels = model.plans_manager.get_label_manager(model.dataset_json).foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
    return Item(name, np.ascontiguousarray(data, dtype=np.float32), properties, present, ofile)


def _check_normalised(
    name: str, data: NDArray[Any], volumes: Mapping[int, NDArray[Any]], channels: Sequence[str]
) -> None:
    """Raise a CaseError where intensities are too large for what nnU-Net computes with, float32."""
    for channel, volume in sorted(volumes.items()):
        largest = float(np.abs(volume).max())
        too_large = largest * largest * volume.size > np.finfo(np.float32).max  # squares are summed, all gets 0
        if not np.isfinite(data[channel]).all() or (too_large and not data[channel].any()):
            raise CaseError(
                f"Case {name}: {channels[channel]} cannot be normalised, its intensities reach {largest:.3g}, too "
                f"large for float32. Rescale it."
            )


def varying(volumes: Mapping[int, NDArray[Any]]) -> dict[int, NDArray[Any]]:
    """Return the ``(z, y, x)`` volumes that do not have one value everywhere.

    A placeholder for an absent modality may hold any value; one that is not zero would extend crop box and z-score of
    the others to the whole image.
    """
    return {channel: volume for channel, volume in volumes.items() if np.any(volume != volume.flat[0])}


def _available(name: str, data: NDArray[Any], volumes: Mapping[int, NDArray[Any]], channels: Sequence[str]) -> Subset:
    """Drop modalities that are empty volumes: training counts those as absent as well (dataloading/availability.py)."""
    filled = present_channels(data, len(channels))
    present = tuple(c in volumes and filled[c] for c in range(len(channels)))
    empty = ", ".join(channels[c] for c in sorted(volumes) if not filled[c])
    if not any(present):
        raise _nothing_left(name, volumes, channels)
    if empty:
        _log.warning(
            "Case %s: %s has the same value everywhere and counts as missing (left: %s).",
            name,
            empty,
            subset_name(present, channels),
        )
    return present


def _nothing_left(name: str, volumes: Mapping[int, NDArray[Any]], channels: Sequence[str]) -> EmptyCaseError:
    empty = ", ".join(channels[c] for c in sorted(volumes))
    verb = "has" if len(volumes) == 1 else "have"
    return EmptyCaseError(f"Case {name}: no modality is left, {empty} {verb} the same value everywhere.")
