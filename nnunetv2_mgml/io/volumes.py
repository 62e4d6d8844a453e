"""Whole volumes, images and label maps: the one reader of the package, and writing that is checked.

SimpleITK, and with it most of nnU-Net's readers, let a lot pass without a word: NIfTI files that end early (the rest
becomes zero), NaN in them (becomes zero, too), TIFF files that have lost slices, complex numbers; and a disk that is
full while it writes. `check_file` looks at the file itself, so it also guards readers of others. Every error names the
file and what to do about it.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from nnunetv2_mgml.io.files import read_json, replacing
from nnunetv2_mgml.io.forms import told_apart
from nnunetv2_mgml.io.grid import Geometry, grid_difference, sitk_geometry

_CHUNK = 1 << 22
_NIFTI = (".nii", ".nii.gz")
_TIFF = (".tif", ".tiff")
_LARGEST_LABEL = 2**31 - 1
_WHOLE_NUMBERS = {
    ".png": (sitk.sitkUInt8, sitk.sitkUInt16),
    **dict.fromkeys((".bmp", ".jpg", ".jpeg"), (sitk.sitkUInt8,)),
}
"""What the formats of pictures hold; every other one holds fractions as well."""


class VolumeError(ValueError):
    """A file that cannot be used as a volume; the message names the file, what is wrong with it and what to do."""


class IncompleteWriteError(OSError):
    """A file that does not hold what was written to it; the message names it."""


# --- reading ----------------------------------------------------------------------------------------------------------
def read_image(path: str | os.PathLike[str], dimensions: tuple[int, ...] = (2, 3)) -> sitk.Image:
    """Read a volume that is whole, finite and has one real number per voxel.

    Args:
        path: any file SimpleITK reads. It knows no spacing of a TIFF volume: that is taken from the file nnU-Net writes
            beside it, ``CASE.json`` (also of ``CASE_0000.tif``) with ``spacing`` in mm, in array axis order (1 mm where
            there is none).
        dimensions: how many axes it may have.

    Returns:
        The volume in the file's data type; spacing and origin in mm, axes x, y, z.

    Raises:
        FileNotFoundError: no such file.
        VolumeError: anything else that is wrong with it.
    """
    path = Path(path)
    check_file(path)
    try:
        image = sitk.ReadImage(str(path))
    except Exception as error:  # SimpleITK has one exception for everything
        raise unreadable(path, error) from error
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise VolumeError(_several(path, image.GetNumberOfComponentsPerPixel()))
    if image.GetDimension() not in dimensions:
        wanted = " or ".join(map(str, dimensions))
        raise VolumeError(f"{path} has {image.GetDimension()} axes, of size {image.GetSize()}; {wanted} are needed.")
    check_finite(path, sitk.GetArrayViewFromImage(image))
    if path.suffix.lower() in _TIFF and image.GetDimension() == 3:
        image.SetSpacing(tuple(reversed(_tiff_spacing(path))))
    return image


@dataclass(frozen=True)
class LabelImage:
    """A label map and where it lies."""

    labels: NDArray[Any]
    """Integer array in SimpleITK's array order (z, y, x), or (y, x) for an image."""
    geometry: Geometry
    """As nnU-Net's SimpleITK reader puts it; ``spacing`` in mm, in array axis order."""
    path: Path

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm, in array axis order."""
        return tuple(self.geometry["spacing"])


def read_label_image(path: str | os.PathLike[str], case: str) -> LabelImage:
    """Read a segmentation, in integers or in floats that are whole numbers.

    Args:
        path: a file SimpleITK can read.
        case: named in errors.

    Raises:
        FileNotFoundError: no such file.
        VolumeError: see `read_image`, or a value that is no whole number.
    """
    path = Path(path)
    try:
        image = read_image(path)
        labels = whole_numbers(path, sitk.GetArrayFromImage(image))
    except (FileNotFoundError, VolumeError) as error:
        raise type(error)(f"Case {case}: {error}") from error
    return LabelImage(labels, sitk_geometry(image), path)


def whole_numbers(path: str | os.PathLike[str], labels: NDArray[Any]) -> NDArray[Any]:
    """Return labels as integers; floats become int32.

    Args:
        path: named in the error.
        labels: any shape, finite.

    Raises:
        VolumeError: a value that is no whole number below 2^31; the message shows it with all its digits.
    """
    if np.issubdtype(labels.dtype, np.integer):
        return labels
    wrong = labels[(np.rint(labels) != labels) | (np.abs(labels) > _LARGEST_LABEL)]
    if wrong.size:
        raise VolumeError(
            f"{path} holds {wrong.size} voxels that are no whole numbers, such as {number(wrong.flat[0])}; labels are. "
            f"Is it a probability map, or was it resampled with an interpolation other than nearest neighbour?"
        )
    return labels.astype(np.int32)


def check_same_geometry(reference: LabelImage, other: LabelImage, case: str) -> None:
    """Raise a ValueError naming the case when two label maps do not lie on the same grid."""
    difference = grid_difference(reference.labels.shape, reference.geometry, other.labels.shape, other.geometry)
    if difference:
        raise ValueError(
            f"Case {case}: {other.path} does not lie on the grid of {reference.path}: {difference}"
            f"{told_apart(reference.path, other.path)}. Bring both to one grid first."
        )


# --- checks of files, whoever reads them ------------------------------------------------------------------------------
def check_file(path: str | os.PathLike[str]) -> None:
    """Raise unless a file is whole and holds one real, finite number per voxel, as far as its format tells.

    NIfTI files are read to their end for it. Of other formats the header is looked at; what readers raise themselves is
    left to them, and NaN to `check_finite`, as they hand it on.

    Raises:
        FileNotFoundError: no such file.
        VolumeError: it cannot be read, ends early, holds NaN or infinity, complex numbers or several values per voxel,
            or has a name that is not UTF-8.
    """
    check_name(path)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist{' (a broken link)' if path.is_symlink() else ''}.")
    if path.name.lower().endswith(_NIFTI):
        _check_nifti(path)
        return
    if path.suffix.lower() in _TIFF:
        _check_tiff(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # the reader will say it, and may know formats that SimpleITK does not
        return
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()):
        raise VolumeError(_complex(path))
    if reader.GetNumberOfComponents() != 1:
        raise VolumeError(_several(path, reader.GetNumberOfComponents()))


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise a VolumeError where a path is not UTF-8: SimpleITK would end the whole process, without a word."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise VolumeError(
            f"{shown} has bytes in its name that are not UTF-8, which no image library reads. Rename it, for example "
            f"with: convmv -f latin1 -t utf8 --notest -r FOLDER"
        ) from None


def check_finite(what: str | os.PathLike[str], values: NDArray[Any]) -> None:
    """Raise unless all values are finite; normalisation would spread the others over the whole case.

    Args:
        what: the file, or another name for the volume; named in the error.
        values: any shape.

    Raises:
        VolumeError: NaN or infinity.
    """
    bad = values.size - int(np.isfinite(values).sum()) if np.issubdtype(values.dtype, np.inexact) else 0
    if bad:
        raise VolumeError(_not_finite(what, bad))


def not_finished(path: str | os.PathLike[str], like: str | os.PathLike[str] | None = None) -> str:
    """Say why a label map of an earlier run cannot be taken for finished, or return an empty string.

    Args:
        path: the label map; exists.
        like: an image whose number of voxels it must have; None, or a file that cannot be read, asks for nothing.
    """
    try:
        check_file(path)
        if not Path(path).name.lower().endswith(_NIFTI):  # of which the file was read to its end
            read_image(path)
    except (VolumeError, FileNotFoundError) as error:
        return str(error)
    sizes = [_size(file) for file in (path, like) if file is not None]
    if len(sizes) == 2 and None not in sizes and sizes[0] != sizes[1]:
        return f"{os.fspath(path)} has {sizes[0]} voxels, its image {like} has {sizes[1]}."
    return ""


def not_finished_archive(path: str | os.PathLike[str]) -> str:
    """Say why probabilities of an earlier run (``.npz``) cannot be taken for finished, or return an empty string."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f"{os.fspath(path)} cannot be read ({error})."
    return f"{os.fspath(path)} is damaged in {damaged}." if damaged else ""


def _size(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return the number of voxels (x, y, z) by the header alone, without axes of one voxel; None if it has none."""
    try:
        check_name(path)
    except VolumeError:  # an image, for whose reader this is
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(os.fspath(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return tuple(n for n in reader.GetSize() if n > 1)


def unreadable(path: str | os.PathLike[str], error: Exception, reader: str = "") -> VolumeError:
    """Return the error that says why a file cannot be read.

    Args:
        path: the file.
        error: what the reading library raised.
        reader: name of the reader, where it is not SimpleITK itself.
    """
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if "orthonormal" in reason:
        return VolumeError(
            f"{path} has skewed axes (its direction cosines are not perpendicular to each other), which SimpleITK "
            f"cannot hold. Resample it to a grid with perpendicular axes."
        )
    where = f" with {reader}" if reader else ""
    return VolumeError(f"{path} cannot be read{where} ({reason}). Is the file damaged or cut off?")


def number(value: Any) -> str:
    """Return a number with the digits it takes to tell it from its neighbours in its own data type, no more."""
    return np.format_float_positional(value, trim="-") if isinstance(value, np.floating) else str(value)


def _check_nifti(path: Path) -> None:
    import nibabel  # only these files need it

    try:
        image: Any = nibabel.load(path)
        dtype, offset = image.get_data_dtype(), image.dataobj.offset
        wrong = _wrong_kind(path, image)
        if wrong:
            raise VolumeError(wrong)
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as stream:
            size, bad = _walk(stream, offset, dtype)
    except VolumeError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise what they like on a damaged file
        raise unreadable(path, error) from error
    expected = offset + math.prod(image.shape) * dtype.itemsize
    if size < expected:
        raise VolumeError(f"{path} is cut off: it holds {size} of {expected} bytes. Copy it again.")
    if bad:
        raise VolumeError(_not_finite(path, bad))


def wrong_kind(path: str | os.PathLike[str]) -> str:
    """Say, by the header of a NIfTI file alone, that it has no single real number per voxel, or return an empty string.

    Args:
        path: any file; of one that is no NIfTI file, or a damaged one, nothing is said.
    """
    import nibabel  # only these files need it

    try:
        check_name(path)
        return _wrong_kind(Path(path), nibabel.load(path)) if Path(path).name.lower().endswith(_NIFTI) else ""
    except Exception:  # for whoever reads it
        return ""


def _wrong_kind(path: Path, image: Any) -> str:
    dtype, shape = image.get_data_dtype(), image.shape
    if dtype.kind == "c":
        return _complex(path)
    if dtype.names:
        return _several(path, len(dtype.names))
    return _several(path, shape[4]) if len(shape) > 4 and shape[4] > 1 else ""


def _walk(stream: BinaryIO | gzip.GzipFile, offset: int, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Read to the end, so that a checksum is compared as well; return bytes and values that are not finite."""
    size = len(stream.read(offset))
    bad = 0
    for chunk in _chunks(stream):
        size += len(chunk)
        if dtype.kind == "f":
            values = np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)
            bad += values.size - int(np.isfinite(values).sum())
    return size, bad


def _chunks(stream: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _check_tiff(path: Path) -> None:
    """Slices that are cut off are all lost without a word, but tifffile writes it to its log."""
    import tifffile  # only these files need it

    lost: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "invalid page offset" in record.getMessage():
                lost.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("tifffile")
    propagate = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        with tifffile.TiffFile(path) as file:
            len(file.pages)  # finds them all
    except Exception as error:  # tifffile has its own errors, and lets others through
        raise unreadable(path, error) from error
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate
    if lost:
        raise VolumeError(f"{path} is cut off: slices are missing at its end. Copy it again.")


def _complex(path: Path) -> str:
    return f"{path} holds complex numbers; a volume has one real number per voxel. Save the magnitude on its own."


def _several(path: Path, values: int) -> str:
    return (
        f"{path} has {values} values per voxel (colours or vectors); a volume has one. Save the one that is meant in a "
        f"file of its own."
    )


def _not_finite(what: str | os.PathLike[str], bad: int) -> str:
    return (
        f"{os.fspath(what)} holds {bad} voxels that are NaN or infinite. Replace them, for example by 0 outside the "
        f"brain."
    )


def _tiff_spacing(path: Path) -> list[float]:
    """Return the spacing in mm, (z, y, x); 1 mm where nnU-Net would assume it, too."""
    of_case = path.with_name(re.sub(r"_\d{4}$", "", path.stem) + ".json")  # nnU-Net's, one for all images of a case
    file = next((f for f in (path.with_suffix(".json"), of_case) if f.is_file()), None)
    if file is None:
        return [1.0, 1.0, 1.0]
    content = read_json(file)
    spacing = content.get("spacing") if isinstance(content, dict) else None
    if (
        not isinstance(spacing, list)
        or len(spacing) != 3
        or not all(isinstance(s, (int, float)) and s > 0 for s in spacing)
    ):
        raise VolumeError(f'{file} must hold {{"spacing": [z, y, x]}} in mm, three numbers above 0; found {spacing!r}.')
    return [float(s) for s in spacing]


# --- writing ----------------------------------------------------------------------------------------------------------
def write_image(image: sitk.Image, path: str | os.PathLike[str]) -> None:
    """Write a volume, compressed where its format can be, read it back and put it in place if it is the same.

    Raises:
        VolumeError: the path is not UTF-8, or its format cannot hold numbers of this kind.
        IncompleteWriteError: it is not, because the disk is full, for instance; what was at ``path`` is still there.
        OSError: the folder cannot be written to.
    """
    path = Path(path)
    check_name(path)
    if not can_hold(path.suffix, image.GetPixelID()):
        raise VolumeError(
            f"{path}: {path.suffix} files cannot hold {image.GetPixelIDTypeAsString()}s. Choose a format that can, "
            f"such as .nii.gz."
        )
    with replacing(path) as temporary:
        try:
            sitk.WriteImage(image, str(temporary), True)
            written = read_image(temporary, (image.GetDimension(),))
        except (RuntimeError, VolumeError, FileNotFoundError) as error:
            raise not_written(path) from error
        check_written(path, sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(written))


def can_hold(ending: str, pixel: int) -> bool:
    """Return whether files of an ending hold pixels of a kind of SimpleITK's, such as ``sitkFloat32``."""
    return pixel in _WHOLE_NUMBERS.get(ending.lower(), (pixel,))


def check_written(path: str | os.PathLike[str], meant: NDArray[Any], found: NDArray[Any]) -> None:
    """Raise an `IncompleteWriteError` unless what was read back from a file is what was to be written to it."""
    if not np.array_equal(meant, found):
        raise not_written(path)


def not_written(path: str | os.PathLike[str]) -> IncompleteWriteError:
    """Return the error that says that a file does not hold what was written to it."""
    return IncompleteWriteError(
        f"{path} could not be written completely; nothing has been put there. Is the disk full (df -h)? Make room and "
        f"run the command again."
    )
