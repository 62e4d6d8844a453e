"""Where a prediction is undecided."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from inference_cases import predict_kept, write_model
from kept_model_cases import FIXTURE, read
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunetv2_mgml.inference.uncertainty import check_ending, uncertainty, write_maps, write_uncertainty
from nnunetv2_mgml.workflows.predict import PredictionRequest, build_predictor


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
        write_uncertainty(tmp_path, "a", ".nii.gz", True, SimpleITKIO())
    np.savez(tmp_path / "a.npz", probabilities=np.full((2, 3, 4, 5), 0.5, np.float32))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 4, 3), np.uint8)), str(tmp_path / "a.nii.gz"))
    with pytest.raises(ValueError, match="turns the axes"):
        write_uncertainty(tmp_path, "a", ".nii.gz", True, SimpleITKIO())
    np.savez(tmp_path / "a.npz", probabilities=np.full((2, 1, 4, 5), 0.5, np.float32))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.uint8)), str(tmp_path / "a.nii.gz"))
    assert read(write_uncertainty(tmp_path, "a", ".nii.gz", True, SimpleITKIO())) == pytest.approx(np.ones((4, 5)))


def read_oriented(path: Path) -> np.ndarray:
    """Read with the axes of the patient, whichever way they lie in the file."""
    return sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS"))


@pytest.mark.parametrize("reader", [SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("orientation", ["LPS", "RAS", "RSP", "PIL"])
def test_the_map_lies_as_the_segmentation_whichever_way_the_reader_turns(
    tmp_path: Path, reader: type[BaseReaderWriter], orientation: str
) -> None:
    volume = np.zeros((5, 6, 7), np.float32)
    volume[1, 2, 3] = 1
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetOrigin((-3.0, 4.0, 5.0))
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), str(tmp_path / "image.nii.gz"))
    data, properties = reader().read_images([str(tmp_path / "image.nii.gz")])
    segmentation = (data[0] == 1).astype(np.uint8)
    reader().write_seg(segmentation, str(tmp_path / "a.nii.gz"), properties)
    undecided = np.where(segmentation == 1, 0.5, 0.0).astype(np.float32)
    np.savez(tmp_path / "a.npz", probabilities=np.stack([1 - undecided, undecided]))
    path = write_uncertainty(tmp_path, "a", ".nii.gz", False, reader())
    assert np.argwhere(read_oriented(tmp_path / "a.nii.gz") == 1).tolist() == [[1, 2, 3]]
    assert np.argwhere(read_oriented(path) > 0.9).tolist() == [[1, 2, 3]]
    files = [sitk.ReadImage(str(file)) for file in (path, tmp_path / "a.nii.gz")]
    assert files[0].GetDirection() == files[1].GetDirection()
    assert files[0].GetSize() == files[1].GetSize()


def test_pictures_cannot_hold_a_map(tmp_path: Path) -> None:
    check_ending(".nii.gz")
    model = write_model(tmp_path / "model")
    dataset_json = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**dataset_json, "file_ending": ".png"}))
    request = PredictionRequest(missing_modalities=["auto"], save_uncertainty=True, device="cpu")
    the_predictor = build_predictor(request, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"--save_uncertainty writes fractions, which \.png files .* cannot hold"):
        the_predictor.initialize_from_trained_model_folder(str(model), (0,))


def test_maps_and_pictures_of_what_an_interrupted_run_had_finished(tmp_path: Path, capsys: Any) -> None:
    images, out = tmp_path / "IN", tmp_path / "OUT"
    images.mkdir()
    shutil.copy(FIXTURE / "images" / "Phantom_00001_0003.nii.gz", images)
    options = ("--missing_modalities", "auto", "--save_probabilities")
    assert predict_kept(images, *options) == 0
    asked = (*options, "--save_uncertainty", "--preview", "--continue_prediction")
    made = [out / "uncertainty" / "Phantom_00001.nii.gz", out / "preview" / "Phantom_00001.png"]
    segmentation = (out / "Phantom_00001.nii.gz").stat().st_mtime_ns
    assert predict_kept(images, *asked) == 0
    assert "0 cases to predict, 1 are there already" in capsys.readouterr().out
    assert all(path.is_file() for path in made)
    times = [path.stat().st_mtime_ns for path in made]
    assert predict_kept(images, *asked) == 0
    assert [path.stat().st_mtime_ns for path in made] == times, "they are there"
    os.utime(made[0], ns=(0, 0))
    assert predict_kept(images, *asked) == 0
    assert made[0].stat().st_mtime_ns > times[0]
    assert (out / "Phantom_00001.nii.gz").stat().st_mtime_ns == segmentation
    assert (out / "Phantom_00001.npz").is_file()


def test_a_folder_without_maps_is_not_named(tmp_path: Path, capsys: Any) -> None:
    images = tmp_path / "IN"
    images.mkdir()
    (images / "a_0003.nii.gz").write_bytes(b"")
    assert predict_kept(images, "--missing_modalities", "auto", "--save_uncertainty", "--preview") == 1
    shown = capsys.readouterr().out
    assert "previews:" not in shown
    assert "uncertainty maps:" not in shown


def test_one_map_that_cannot_be_written_does_not_stop_the_others(tmp_path: Path) -> None:
    for case in "ab":
        np.savez(tmp_path / f"{case}.npz", probabilities=np.full((2, 3, 4, 5), 0.5, np.float32))
        (tmp_path / f"{case}.pkl").write_bytes(b"")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "b.nii.gz"))
    failures = write_maps(tmp_path, "ab", ".nii.gz", True, SimpleITKIO(), keep_probabilities=True)
    assert list(failures) == ["a"]
    assert "a.nii.gz" in failures["a"]
    assert (tmp_path / "b.npz").is_file()
    assert write_maps(tmp_path, "b", ".nii.gz", True, SimpleITKIO(), keep_probabilities=False) == {}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.pkl", "b.nii.gz", "uncertainty"]
