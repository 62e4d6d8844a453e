"""Which modalities each preprocessed case has: decided once for the whole case and cached beside the data.

nnU-Net's preprocessing needs a file for every channel, so an incomplete case carries an empty volume for each sequence
it lacks. Normalisation leaves that volume at one value, zero for z-scores. A patch says nothing (outside the brain
every channel is zero), so the scan is over the whole volume. The cache lies beside the preprocessed folder, not in it:
nnU-Net infers the data format from the file endings it finds there and refuses a folder with a second one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from numpy.typing import NDArray

from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.modalities import Subset

_DATA_ENDINGS = (".b2nd", ".npy", ".npz")
_log = logging.getLogger(__name__)


def present_channels(data: Any, num_modalities: int) -> Subset:
    """Return which of the first ``num_modalities`` channels do not have one and the same value everywhere.

    Args:
        data: ``(C, z, y, x)`` array, NumPy or blosc2; read channel by channel, the middle slab first.
        num_modalities: ``M``.
    """
    middle = data.shape[1] // 2
    return tuple(
        _varies(np.asarray(data[m, middle : middle + 1])) or _varies(np.asarray(data[m])) for m in range(num_modalities)
    )


def _varies(values: NDArray[Any]) -> bool:
    """Whether values differ by more than resampling a constant can make them; NaN counts as a difference."""
    low, high = float(values.min()), float(values.max())
    return not high - low <= 1e-5 * max(1.0, abs(high))


def case_availability(dataset: nnUNetBaseDataset, identifiers: Iterable[str], num_modalities: int) -> dict[str, Subset]:
    """Return the modalities of every case, scanning those the cache does not know or whose file has changed.

    Args:
        dataset: nnU-Net's dataset of the preprocessed folder.
        identifiers: the cases.
        num_modalities: ``M``.

    Raises:
        ValueError: a case in which every modality is empty.
    """
    folder = Path(dataset.source_folder)
    cache = _read_cache(cache_path(folder))
    result: dict[str, Subset] = {}
    changed = False
    for name in identifiers:
        signature = _signature(folder, name)
        entry = cache.get(name)
        if entry is None or entry["file"] != signature or len(entry["present"]) != num_modalities:
            data = dataset.load_case(name)[0]
            cache[name] = entry = {"file": signature, "present": list(present_channels(data, num_modalities))}
            changed = True
        if not any(entry["present"]):
            raise ValueError(
                f"Case {name} in {folder} is empty in all {num_modalities} modalities; remove it from the "
                f"dataset and preprocess again."
            )
        result[name] = tuple(entry["present"])
    if changed:
        _write_cache(cache_path(folder), cache)
    return result


def cache_path(folder: Path) -> Path:
    """Return the cache of a preprocessed folder, ``mgml_availability_<folder>.json`` beside it."""
    return folder.with_name(f"mgml_availability_{folder.name}.json")


def _signature(folder: Path, name: str) -> list[Any]:
    for ending in _DATA_ENDINGS:
        path = folder / (name + ending)
        if path.is_file():
            stat = path.stat()
            return [path.name, stat.st_size, stat.st_mtime_ns]
    raise FileNotFoundError(
        f"No preprocessed data of case {name} in {folder} (looked for "
        f"{', '.join(name + e for e in _DATA_ENDINGS)}); run nnUNetv2_preprocess."
    )


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, OSError) as error:
        _log.warning("Cannot read %s (%s); scanning the cases again.", path, error)
        return {}


def _write_cache(path: Path, cache: dict[str, Any]) -> None:
    try:
        write_json(path, cache, indent=None)
    except OSError as error:  # a read-only or full disk costs the scan each time, nothing else
        _log.warning("Cannot write %s (%s); the cases will be scanned again next time.", path, error)
