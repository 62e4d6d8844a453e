"""Where a prediction is undecided."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from inference_cases import predict_kept
from kept_model_cases import FIXTURE, read

from nnunetv2_mgml.inference.uncertainty import uncertainty, write_maps, write_uncertainty


def test_labels_are_undecided_where_all_are_as_likely() -> None:
    sure, even, two = [1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]
    probabilities = np.array([sure, even, two]).T.reshape(4, 1, 1, 3)
    assert uncertainty(probabilities, False).ravel() == pytest.approx([0, 1, 0.5], abs=1e-4)


def test_of_regions_the_least_certain_one_counts() -> None:
    probabilities = np.array([[0.5, 1.0, 0.89], [0.0, 1.0, 0.99]]).reshape(2, 1, 1, 3)
    expected = [1, 0, -0.89 * np.log2(0.89) - 0.11 * np.log2(0.11)]
    assert uncertainty(probabilities, True).ravel() == pytest.approx(expected, abs=1e-4)
    assert uncertainty(probabilities.astype(np.float16), True).dtype == np.float32


def test_the_command_writes_the_map_and_no_more(tmp_path: Path, capsys: Any) -> None:
    images, out = tmp_path / "IN", tmp_path / "OUT"
    images.mkdir()
    shutil.copy(FIXTURE / "images" / "Phantom_00001_0003.nii.gz", images)
    assert predict_kept(images, "--save_uncertainty") == 2
    assert "--save_uncertainty needs --missing_modalities" in capsys.readouterr().err
    assert predict_kept(images, "--missing_modalities", "auto", "--save_uncertainty") == 0
    path = out / "uncertainty" / "Phantom_00001.nii.gz"
    values, segmentation = read(path), sitk.ReadImage(str(out / "Phantom_00001.nii.gz"))
    assert sitk.ReadImage(str(path)).GetSpacing() == segmentation.GetSpacing()
    assert values.shape == sitk.GetArrayFromImage(segmentation).shape
    assert values.min() >= 0
    assert 0.5 < values.max() <= 1
    assert not list(out.glob("*.npz")) + list(out.glob("*.pkl"))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no probabilities"):
        write_uncertainty(tmp_path, "a", ".nii.gz", True)
    np.savez(tmp_path / "a.npz", probabilities=np.full((2, 3, 4, 5), 0.5, np.float32))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 4, 3), np.uint8)), str(tmp_path / "a.nii.gz"))
    with pytest.raises(ValueError, match="turns the axes"):
        write_uncertainty(tmp_path, "a", ".nii.gz", True)
    np.savez(tmp_path / "a.npz", probabilities=np.full((2, 1, 4, 5), 0.5, np.float32))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.uint8)), str(tmp_path / "a.nii.gz"))
    assert read(write_uncertainty(tmp_path, "a", ".nii.gz", True)) == pytest.approx(np.ones((4, 5)))


def test_one_map_that_cannot_be_written_does_not_stop_the_others(tmp_path: Path) -> None:
    for case in "ab":
        np.savez(tmp_path / f"{case}.npz", probabilities=np.full((2, 3, 4, 5), 0.5, np.float32))
        (tmp_path / f"{case}.pkl").write_bytes(b"")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "b.nii.gz"))
    failures = write_maps(tmp_path, "ab", ".nii.gz", True, keep_probabilities=True)
    assert list(failures) == ["a"]
    assert "a.nii.gz" in failures["a"]
    assert (tmp_path / "b.npz").is_file()
    assert write_maps(tmp_path, "b", ".nii.gz", True, keep_probabilities=False) == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.pkl", "b.nii.gz", "uncertainty"]
