"""Reading a case: damaged files and differing grids are errors that name the file."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from inference_cases import CHANNELS, image, write_image
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_mgml.inference.inputs import CaseError
from nnunetv2_mgml.inference.reading import read_case
from nnunetv2_mgml.io.grid import GRID_TOLERANCE
from nnunetv2_mgml.io.volumes import VolumeError, check_file

READERS = [SimpleITKIO, NibabelIO, NibabelIOWithReorient]


def read(files: dict[int, Path], reader: type[BaseReaderWriter] = SimpleITKIO) -> tuple[dict[int, np.ndarray], dict]:
    return read_case("p", {c: str(path) for c, path in files.items()}, CHANNELS, reader())


@pytest.mark.parametrize("reader", READERS)
def test_reads_as_nnunet_reads_all_at_once(tmp_path: Path, reader: type[BaseReaderWriter]) -> None:
    files = {c: write_image(tmp_path / f"p_{c:04d}.nii.gz", image(c), spacing=1.5, origin=-4.0) for c in (1, 3)}
    volumes, properties = read(files, reader)
    stock, stock_properties = reader().read_images([str(files[1]), str(files[3])])
    np.testing.assert_array_equal(np.stack([volumes[1], volumes[3]]), stock)
    assert volumes[1].dtype == np.float32
    assert str(properties) == str(stock_properties)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("reader", READERS[:2])
def test_a_cut_off_file(tmp_path: Path, ending: str, share: float, reader: type[BaseReaderWriter]) -> None:
    whole = write_image(tmp_path / f"whole{ending}", image(0)).read_bytes()
    path = tmp_path / f"p_0000{ending}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CaseError, match=rf"Case p: .*p_0000{ending} (cannot be read|is cut off)"):
        read({0: path}, reader)


@pytest.mark.parametrize("ending", [".NII", ".nii.GZ"])
def test_a_cut_off_file_with_another_spelling_of_its_ending(tmp_path: Path, ending: str) -> None:
    content = gzip.decompress(write_image(tmp_path / "whole.nii.gz", image(0)).read_bytes())
    path = tmp_path / f"p_0000{ending}"
    for share, cut in ((content, False), (content[:2000], True)):
        path.write_bytes(gzip.compress(share) if ending.endswith("GZ") else share)
        if cut:
            with pytest.raises(VolumeError, match=f"is cut off: it holds 2000 of {len(content)} bytes"):
                check_file(path)
        else:
            check_file(path)


def test_a_flipped_byte_in_a_compressed_file(tmp_path: Path) -> None:
    path = write_image(tmp_path / "p_0000.nii.gz", image(0))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(bytes(content))
    with pytest.raises(CaseError, match="CRC"):
        read({0: path})


def test_no_image_at_all_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "p_0000.nii.gz"
    path.write_bytes(gzip.compress(b"this is not an image" * 100))
    with pytest.raises(CaseError, match="cannot be read"):
        read({0: path})
    link = tmp_path / "p_0001.nii.gz"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(CaseError, match=r"p_0001.nii.gz does not exist \(a broken link\)"):
        read({1: link})


@pytest.mark.parametrize("reader", READERS)
def test_nan_is_refused(tmp_path: Path, reader: type[BaseReaderWriter]) -> None:
    """Also with ITK's NIfTI reader, which turns it into zeros without a word."""
    volume = image(0).astype(np.float32)
    volume[3, 4, 5:7] = np.nan
    path = write_image(tmp_path / "p_0000.nii.gz", volume)
    with pytest.raises(CaseError, match="2 voxels that are NaN or infinite"):
        read({0: path}, reader)


def test_several_channels_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "p_0000.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([image(0), image(1)]), isVector=False), str(path))
    with pytest.raises(CaseError, match="holds 2 channels"):
        read({0: path})


def turned(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


@pytest.mark.parametrize("reader", READERS[:2])
@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ({"spacing": 1.01}, r"spacing \(1.01, 1.01, 1.01\) instead of \(1, 1, 1\) mm"),
        ({"origin": 0.2}, "origin .* mm apart"),
        ({"direction": turned(1)}, "direction"),
    ],
)
def test_another_grid(tmp_path: Path, geometry: dict, words: str, reader: type[BaseReaderWriter]) -> None:
    files = {
        0: write_image(tmp_path / "p_0000.nii.gz", image(0)),
        2: write_image(tmp_path / "p_0002.nii.gz", image(2), **geometry),
    }
    with pytest.raises(CaseError, match=rf"Case p: t2 \(.*p_0002.nii.gz\) is not on the grid of t1 .*{words}"):
        read(files, reader)


def test_another_shape(tmp_path: Path) -> None:
    files = {
        0: write_image(tmp_path / "p_0000.nii.gz", image(0)),
        3: write_image(tmp_path / "p_0003.nii.gz", image(3, shape=(20, 18, 21))),
    }
    with pytest.raises(CaseError, match=r"shape \(20, 18, 21\) instead of \(20, 18, 22\) voxels"):
        read(files)


@pytest.mark.parametrize(
    "geometry", [{"origin": 0.5 * GRID_TOLERANCE / np.sqrt(3)}, {"spacing": 1.001}, {"direction": turned(0.1)}]
)
def test_rounding_in_headers_is_tolerated(tmp_path: Path, geometry: dict) -> None:
    files = {
        0: write_image(tmp_path / "p_0000.nii.gz", image(0)),
        1: write_image(tmp_path / "p_0001.nii.gz", image(1), **geometry),
    }
    assert sorted(read(files)[0]) == [0, 1]


def test_a_flipped_volume_is_not_on_the_same_grid_unless_the_reader_reorients(tmp_path: Path) -> None:
    first = nibabel.load(write_image(tmp_path / "p_0000.nii.gz", image(0)))
    flipped = nibabel.Nifti1Image(
        np.asarray(first.dataobj)[::-1],
        first.affine @ np.array([[-1, 0, 0, first.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    nibabel.save(flipped, tmp_path / "p_0001.nii.gz")
    files = {c: tmp_path / f"p_{c:04d}.nii.gz" for c in (0, 1)}
    volumes, _ = read(files, NibabelIOWithReorient)
    np.testing.assert_array_equal(volumes[0], volumes[1])
    with pytest.raises(CaseError, match="direction"):
        read(files, NibabelIO)
