"""`io.volumes`: what cannot be a volume is refused by name, and what is written is what was meant, or absent."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.io import volumes
from nnunetv2_mgml.io.volumes import (
    IncompleteWriteError,
    VolumeError,
    check_file,
    number,
    read_image,
    read_label_image,
    whole_numbers,
    write_image,
)

FORMATS = (".nii", ".nii.gz", ".mha", ".nrrd", ".tif")


def scan(dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, (20, 18, 22)).astype(dtype)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def colours(path: Path) -> None:
    nifti(path, np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


def complex_numbers(path: Path) -> None:
    nifti(path, np.ones((4, 5, 6), np.complex64))


def not_a_number(path: Path) -> None:
    array = np.ones((4, 5, 6), np.float32)
    array[1, 2, 3:5] = np.nan, np.inf
    nifti(path, array)


def four_axes(path: Path) -> None:
    nifti(path, np.ones((4, 5, 6, 2), np.float32))


def skewed(path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.3
    nifti(path, np.ones((4, 5, 6), np.int16), affine)


def no_image(path: Path) -> None:
    path.write_bytes(gzip.compress(b"this is not an image" * 100))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (colours, r"has 3 values per voxel \(colours or vectors\); a volume has one\. Save"),
        (complex_numbers, "holds complex numbers; a volume has one real number per voxel. Save"),
        (not_a_number, "holds 2 voxels that are NaN or infinite. Replace them"),
        (four_axes, r"has 4 axes, of size \(4, 5, 6, 2\); 2 or 3 are needed"),
        (skewed, r"has skewed axes .* Resample it"),
        (no_image, r"cannot be read \(.+\)\. Is the file damaged"),
    ],
)
def test_what_readers_let_pass_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "scan.nii.gz"
    spoil(path)
    with pytest.raises(VolumeError, match=rf"^{path} {words}"):
        read_image(path)
    with pytest.raises(VolumeError, match=rf"^Case c: {path} "):
        read_label_image(path, "c")


def test_the_same_in_other_formats(tmp_path: Path) -> None:
    vector = sitk.GetImageFromArray(np.ones((4, 5, 6, 2), np.float32), isVector=True)
    sitk.WriteImage(vector, str(tmp_path / "vector.nrrd"))
    with pytest.raises(VolumeError, match=r"vector\.nrrd has 2 values per voxel"):
        read_image(tmp_path / "vector.nrrd")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.complex64)), str(tmp_path / "complex.mha"))
    with pytest.raises(VolumeError, match=r"complex\.mha has 2 values per voxel"):
        read_image(tmp_path / "complex.mha")
    sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 5, 6), np.nan, np.float32)), str(tmp_path / "nan.mha"))
    with pytest.raises(VolumeError, match=r"nan\.mha holds 120 voxels that are NaN"):
        read_image(tmp_path / "nan.mha")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((9, 8, 3), np.uint8), isVector=True), str(tmp_path / "photo.png"))
    with pytest.raises(VolumeError, match=r"photo\.png has 3 values per voxel"):
        read_image(tmp_path / "photo.png")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.nii does not exist\.$"):
        read_image(tmp_path / "gone.nii")
    (tmp_path / "link.nii").symlink_to(tmp_path / "gone.nii")
    with pytest.raises(FileNotFoundError, match=r"Case c: .*link\.nii does not exist \(a broken link\)\.$"):
        read_label_image(tmp_path / "link.nii", "c")


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_off_is_never_read(tmp_path: Path, ending: str, share: float) -> None:
    whole = tmp_path / f"whole{ending}"
    write_image(sitk.GetImageFromArray(scan()), whole)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(VolumeError, match=rf"cut{ending} (is cut off|cannot be read)"):
        read_image(cut)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_whole_files_are_read_as_they_are(tmp_path: Path, ending: str, dtype: type) -> None:
    image = sitk.GetImageFromArray(scan(dtype))
    image.SetSpacing((1.5, 2, 3))
    write_image(image, tmp_path / f"scan{ending}")
    read = read_image(tmp_path / f"scan{ending}")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read), scan(dtype))
    assert read.GetSpacing() == ((1, 1, 1) if ending == ".tif" else (1.5, 2, 3))  # a TIFF's lies in a file beside it
    assert os.listdir(tmp_path) == [f"scan{ending}"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_nan_is_found_wherever_it_lies(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever the float type and byte order, also across the pieces a file is read in."""
    dtype = np.dtype(data.draw(st.sampled_from(["<f4", ">f4", "<f8", ">f8"])))
    array = np.ones((3, 4, 5), dtype)
    where = data.draw(st.integers(0, array.size - 1))
    array.flat[where] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    image = nibabel.Nifti1Image(array, np.eye(4), nibabel.Nifti1Header(endianness=dtype.str[0]))
    image.set_data_dtype(dtype)
    path = tmp_path_factory.mktemp("nan") / data.draw(st.sampled_from(["scan.nii", "scan.nii.gz"]))
    nibabel.save(image, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(volumes, "_CHUNK", data.draw(st.sampled_from([8, 16, 64, 1 << 22])))
        with pytest.raises(VolumeError, match="holds 1 voxels that are NaN or infinite"):
            check_file(path)


def test_tiff_that_lost_slices_and_the_log_of_tifffile(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tifffile.imwrite(tmp_path / "a.tif", scan())
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(content[: int(0.9 * len(content))])
    check_file(tmp_path / "a.tif")
    with pytest.raises(VolumeError, match=r"b\.tif is cut off: slices are missing"):
        check_file(tmp_path / "b.tif")
    assert not caplog.records


# --- label maps -------------------------------------------------------------------------------------------------------
def test_labels_in_floats(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 5, (4, 5, 6))
    path = nifti(tmp_path / "labels.nii.gz", labels.astype(np.float32).T)
    image = read_label_image(path, "c")
    np.testing.assert_array_equal(image.labels, labels)
    assert image.labels.dtype == np.int32
    assert image.spacing == (1, 1, 1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(np.float32(2.9999998), "2.9999998"), (np.float64(0.1), "0.1"), (np.float32(3e9), "3000000000")],
)
def test_a_value_that_is_no_label_is_shown_with_its_digits(tmp_path: Path, value: np.floating, shown: str) -> None:
    array = np.full((2, 3, 4), 3, value.dtype)
    array[0, 0, 0] = value
    with pytest.raises(VolumeError, match=rf"holds 1 voxels that are no whole numbers, such as {shown}; labels are"):
        read_label_image(nifti(tmp_path / "labels.nii.gz", array), "c")


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.sampled_from([np.float64, np.int64, np.int16]))
def test_whole_numbers_keep_their_value(value: int, dtype: type) -> None:
    value = value if dtype is not np.int16 else value % 2**15
    assert whole_numbers("file", np.array([value], dtype)).tolist() == [value]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_numbers_are_shown_so_that_they_can_be_told_apart(value: float) -> None:
    assert np.float32(number(np.float32(value))) == np.float32(value)


# --- writing ----------------------------------------------------------------------------------------------------------
FULL = """
import resource, sys
import numpy as np, SimpleITK as sitk
from nnunetv2_mgml.io import volumes
image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 1000, (40, 50, 60)).astype(np.int16))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    volumes.write_image(image, sys.argv[1])
except volumes.IncompleteWriteError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("room", [0, 300, 50_000])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, ending: str, room: int) -> None:
    """SimpleITK itself says nothing: the file is cut, and its program goes on."""
    path = tmp_path / f"scan{ending}"
    path.write_text("old")
    command = [sys.executable, "-c", FULL, str(path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path} could not be written completely"), done.stderr
    assert "Is the disk full" in done.stdout
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_format_that_cannot_hold_it_is_not_a_full_disk(tmp_path: Path) -> None:
    picture = sitk.GetImageFromArray(np.full((6, 7), 0.5, np.float32))
    for ending in (".png", ".BMP"):
        with pytest.raises(VolumeError, match=r"files cannot hold 32-bit floats\. Choose a format that can"):
            write_image(picture, tmp_path / f"map{ending}")
    write_image(sitk.Cast(picture, sitk.sitkUInt16), tmp_path / "map.png")
    assert os.listdir(tmp_path) == ["map.png"]


def test_another_volume_than_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", lambda image, *rest: write(image + 1, *rest))
    with pytest.raises(IncompleteWriteError, match=r"scan\.nii\.gz could not be written"):
        write_image(sitk.GetImageFromArray(scan()), tmp_path / "scan.nii.gz")
    assert os.listdir(tmp_path) == []
