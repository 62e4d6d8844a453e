"""``--save_uncertainty``: where a prediction is undecided, voxel by voxel, from its own probabilities.

Entropy in bits over its largest possible value: 0 where the network is sure, 1 where it has no preference. It says how
sure the network is, not how often it is right: it is not calibrated, and a network can be sure and wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunetv2_mgml.io.files import scratch
from nnunetv2_mgml.io.targets import UNCERTAINTY, is_current
from nnunetv2_mgml.io.volumes import can_hold, read_image, write_image

FOLDER = UNCERTAINTY
_WITHOUT_DIRECTIONS = (".tif", ".tiff")
_MARKED = (2, 3, 4)


def check_ending(ending: str) -> None:
    """Raise a ValueError where label maps of an ending have a format that cannot hold a map of uncertainty."""
    if not can_hold(ending, sitk.sitkFloat32):
        raise ValueError(
            f"--save_uncertainty writes fractions, which {ending} files (file_ending of dataset.json) cannot hold. "
            f"Leave it out; --save_probabilities keeps the probabilities themselves."
        )


def uncertainty(probabilities: npt.NDArray[Any], regions: bool) -> npt.NDArray[np.float32]:
    """Return the normalised entropy ``(z, y, x)`` float32 in [0, 1].

    Args:
        probabilities: ``(heads, z, y, x)``; of labels they add up to 1, of regions each head stands alone.
        regions: whether the heads are regions; the least certain one counts.
    """
    p = np.clip(probabilities.astype(np.float32), 1e-7, 1.0)
    if regions:
        q = np.clip(1 - probabilities.astype(np.float32), 1e-7, 1.0)
        entropy = (-p * np.log2(p) - q * np.log2(q)).max(0)
    else:
        entropy = -(p * np.log2(p)).sum(0) / np.log2(len(p))
    result: npt.NDArray[np.float32] = np.clip(entropy, 0, 1).astype(np.float32)
    return result


def write_uncertainty(folder: Path, case: str, ending: str, regions: bool, reader: Any) -> Path:
    """Write ``uncertainty/CASE`` beside a case's segmentation, on its grid, from the ``.npz`` that nnU-Net wrote.

    Args:
        folder: the output folder.
        case: its name.
        ending: of image files.
        regions: see `uncertainty`.
        reader: nnU-Net's reader of the model, which may turn the axes of a file.

    Raises:
        FileNotFoundError: no probabilities, or no segmentation.
        ValueError: probabilities and file do not fit.
    """
    probabilities = folder / f"{case}.npz"
    if not probabilities.is_file():
        raise FileNotFoundError(f"Case {case}: there are no probabilities {probabilities}.")
    segmentation = read_image(folder / f"{case}{ending}")
    with np.load(probabilities) as stored:
        values = uncertainty(stored["probabilities"], regions)
    shape = segmentation.GetSize()[::-1]
    if segmentation.GetDimension() == 2 and values.shape == (1, *shape):
        values = values[0]
    elif segmentation.GetDimension() == 3 and ending.lower() not in _WITHOUT_DIRECTIONS:
        values = _as_in_file(values, segmentation, reader, folder, ending)
    if values.shape != shape:
        raise ValueError(
            f"Case {case}: its probabilities have shape {values.shape}, its file {shape}; the model's reader turns the "
            f"axes, for which there is no uncertainty map."
        )
    image = sitk.GetImageFromArray(values)
    image.CopyInformation(segmentation)
    target = folder / FOLDER / f"{case}{ending}"
    target.parent.mkdir(exist_ok=True)
    write_image(image, target)
    return target


def _as_in_file(
    values: npt.NDArray[np.float32], segmentation: sitk.Image, reader: Any, folder: Path, ending: str
) -> npt.NDArray[np.float32]:
    """Return ``(z, y, x)`` values of a reader in the order of the file, by how it reads a small one that lies alike."""
    marks = np.arange(np.prod(_MARKED), dtype=np.uint8).reshape(_MARKED)
    image = sitk.GetImageFromArray(marks)
    image.SetSpacing(segmentation.GetSpacing())
    image.SetOrigin(segmentation.GetOrigin())
    image.SetDirection(segmentation.GetDirection())
    with scratch(folder) as temporary:
        file = temporary / f"marks{ending}"
        write_image(image, file)
        turned = np.asarray(reader.read_seg(str(file))[0][0])
    order = np.argsort([_MARKED.index(length) for length in turned.shape])
    ordered = turned.transpose(order)
    first = np.unravel_index(int(ordered[0, 0, 0]), _MARKED)
    mirrored = tuple(axis for axis, index in enumerate(first) if index)
    if not np.array_equal(np.flip(ordered, mirrored), marks):
        raise ValueError(f"{type(reader).__name__} does more than turn axes; for it there is no uncertainty map.")
    return np.flip(values.transpose(order), mirrored)


def without_map(folder: Path, cases: Iterable[str], ending: str) -> list[str]:
    """Return the cases whose map is not there, or older than their segmentation."""
    return [case for case in cases if not is_current(folder / FOLDER / f"{case}{ending}", folder / f"{case}{ending}")]


def write_maps(
    folder: Path, cases: Iterable[str], ending: str, regions: bool, reader: Any, *, keep_probabilities: bool
) -> dict[str, str]:
    """Write the maps of several cases; one that cannot be written does not stop the others.

    Args:
        folder: the output folder.
        cases: their names.
        ending: of image files.
        regions: see `uncertainty`.
        reader: see `write_uncertainty`.
        keep_probabilities: else the ``.npz`` and ``.pkl`` of these cases are deleted.

    Returns:
        Case -> message of those without a map.
    """
    failures = {}
    for case in cases:
        try:
            write_uncertainty(folder, case, ending, regions, reader)
        except (ValueError, OSError) as error:
            failures[case] = str(error)
        if not keep_probabilities:
            for suffix in (".npz", ".pkl"):
                (folder / f"{case}{suffix}").unlink(missing_ok=True)
    return failures
