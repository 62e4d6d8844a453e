"""Volumes with two places in space: sform and qform disagree."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_mgml.dataset_conversion.convert import convert_brats
from nnunetv2_mgml.io.forms import read_forms, told_apart, two_places
from nnunetv2_mgml.io.volumes import check_same_geometry, read_label_image
from nnunetv2_mgml.phantom import write_phantoms

HERE, THERE = np.eye(4), np.eye(4)
THERE[:3, 3] = 7, 0, 0


def volume(path: Path, sform: np.ndarray | None, qform: np.ndarray | None, shape: tuple[int, ...] = (4, 5, 6)) -> Path:
    """Write a NIfTI file; None leaves a form out."""
    image = nibabel.Nifti1Image(np.ones(shape, np.int16), None)
    image.set_sform(sform, 0 if sform is None else 1)
    image.set_qform(qform, 0 if qform is None else 1)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("which", ["sform", "qform"])
def test_one_of_two_files_has_two_places(tmp_path: Path, which: str) -> None:
    """Refused whichever of the two forms is odd, and in either order."""
    good = volume(tmp_path / "good.nii.gz", HERE, HERE)
    odd = volume(tmp_path / "odd.nii.gz", THERE if which == "sform" else HERE, THERE if which == "qform" else HERE)
    for pair in ((good, odd), (odd, good)):
        text = two_places(*pair)
        assert text.startswith(f"{odd} has two places in space: its sform and qform disagree (up to 7 mm)")
        assert str(good) in text
    assert two_places(good, good) == two_places(odd, odd) == ""
    assert told_apart(good, odd).count("disagree") == 1
    assert str(odd) in told_apart(good, odd)


def test_what_is_left_to_the_comparison_of_grids(tmp_path: Path) -> None:
    here, there = volume(tmp_path / "a.nii", HERE, HERE), volume(tmp_path / "b.nii", THERE, THERE)
    only_q = volume(tmp_path / "q.nii", None, HERE)
    both = volume(tmp_path / "c.nii", HERE, THERE)
    assert two_places(here, there) == two_places(here, only_q) == told_apart(here, there) == ""
    assert two_places(both, volume(tmp_path / "d.nii", HERE, THERE, (4, 5, 7))) == ""  # another size
    assert read_forms(volume(tmp_path / "flat.nii", HERE, HERE, (4, 5))) is None
    (tmp_path / "bad.nii").write_bytes(b"no")
    assert read_forms(tmp_path / "bad.nii") is None
    assert read_forms(tmp_path / "x.mha") is None


@pytest.mark.parametrize("which", ["sform", "qform"])
def test_conversion_says_so_either_way(nnunet_folders: Path, tmp_path: Path, which: str) -> None:
    (folder,) = write_phantoms(tmp_path / "source", 1, 5, (16, 20, 18), (4.0, 5.0, 6.0), "brats2021")
    file = folder / f"{folder.name}_t2.nii.gz"
    image = nibabel.load(file)
    moved = image.affine.copy()
    moved[0, 3] += 20
    getattr(image, f"set_{which}")(moved, 1)
    nibabel.save(image, file)
    with pytest.raises(ValueError, match=rf"{file} has two places in space: .* \(up to 20 mm\)"):
        convert_brats(tmp_path / "source", 7, num_processes=0)


def test_scores_on_two_grids_tell_of_it(tmp_path: Path) -> None:
    reference = read_label_image(volume(tmp_path / "reference.nii.gz", THERE, HERE), "a")
    prediction = read_label_image(volume(tmp_path / "prediction.nii.gz", HERE, HERE), "a")
    used = sitk.ReadImage(str(reference.path)).GetOrigin()
    if used == prediction.geometry["sitk_stuff"]["origin"]:
        reference, prediction = read_label_image(volume(tmp_path / "other.nii.gz", HERE, THERE), "a"), prediction
    with pytest.raises(ValueError, match=r"sform and qform of .* disagree \(up to 7 mm\)"):
        check_same_geometry(reference, prediction, "a")
