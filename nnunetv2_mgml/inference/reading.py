"""Read the files of one case with the plans' own reader and make sure that they are whole and lie on one grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from numpy.typing import NDArray

from nnunetv2_mgml.inference.inputs import CaseError
from nnunetv2_mgml.io.forms import two_places
from nnunetv2_mgml.io.grid import grid_difference
from nnunetv2_mgml.io.volumes import VolumeError, check_file, check_finite, unreadable


def read_case(
    name: str, files: Mapping[int, str], channels: Sequence[str], reader: BaseReaderWriter
) -> tuple[dict[int, NDArray[Any]], dict[str, Any]]:
    """Read the given files, one channel each.

    Args:
        name: case name, for messages.
        files: channel index -> path; at least one.
        channels: modality names in channel order.
        reader: instance of the plans' reader.

    Returns:
        Channel index -> ``(z, y, x)`` float32 volume, and the reader's properties of the first file (``spacing`` in mm,
        ordered as the array axes).

    Raises:
        CaseError: a file that is no volume (see `io.volumes`), holds more than one channel, or lies on another grid.
    """
    volumes: dict[int, NDArray[Any]] = {}
    first: dict[str, Any] = {}
    for channel in sorted(files):
        volume, properties = read_file(name, files[channel], reader)
        if volume.shape[0] != 1:
            raise CaseError(
                f"Case {name}: {files[channel]} holds {volume.shape[0]} channels; every modality needs a "
                f"file of its own with one."
            )
        if volumes:
            origin = min(volumes)
            doubt = two_places(files[channel], files[origin])
            if doubt:
                raise CaseError(f"Case {name}: {doubt}.")
            difference = grid_difference(volumes[origin].shape, first, volume.shape[1:], properties)
            if difference:
                raise CaseError(
                    f"Case {name}: {channels[channel]} ({files[channel]}) is not on the grid of "
                    f"{channels[origin]} ({files[origin]}): {difference}. All modalities must be "
                    f"co-registered and resampled to one grid."
                )
        else:
            first = properties
        volumes[channel] = volume[0]
    return volumes, first


def read_file(name: str, path: str, reader: BaseReaderWriter) -> tuple[NDArray[Any], dict[str, Any]]:
    """Read one file.

    Returns:
        ``(channels, z, y, x)`` float32 and the reader's properties.

    Raises:
        CaseError: it does not exist, or is no volume (see `io.volumes`).
    """
    try:
        check_file(path)
        volume, properties = _read(path, reader)
        check_finite(path, volume)
    except (FileNotFoundError, VolumeError) as error:
        raise CaseError(f"Case {name}: {error}") from error
    return volume, properties


def _read(path: str, reader: BaseReaderWriter) -> tuple[NDArray[Any], dict[str, Any]]:
    try:
        return cast("tuple[NDArray[Any], dict[str, Any]]", reader.read_images([path]))
    except Exception as error:  # every reader library has its own exceptions, some derive from nothing narrower
        raise unreadable(path, error, type(reader).__name__) from error
