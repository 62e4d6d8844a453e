"""Mistakes of users that once ended in something else: each is one message that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_cases import write_cases
from inference_cases import image, predictor, write_case, write_image, write_model

from nnunetv2_mgml.dataset_conversion.convert import convert_brats
from nnunetv2_mgml.inference.inputs import CaseError, find_cases, resolve
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.objective import Options


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


def test_the_forgotten_flag(model: Path, tmp_path: Path) -> None:
    """Without our flag nnU-Net's own prediction does not begin; the network says so too where nobody looked before."""
    write_case(tmp_path / "in", "a", [0, 2, 3])
    (tmp_path / "out").mkdir()
    stock = predictor(model, missing=None)
    with pytest.raises(ValueError, match=r"1 of 1 case\(s\) lack modalities: a \(t1ce\).*--missing_modalities auto"):
        stock.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"given 3 channels; it has 4 modalities.*--missing_modalities auto"):
        stock.network(torch.zeros(1, 3, 16, 16, 16))
    stock.network.channel_names = ("t1", "t1ce", "t2", "flair")
    with pytest.raises(ValueError, match=r"4 modalities \(t1, t1ce, t2, flair\)"):
        stock.network(torch.zeros(1, 3, 16, 16, 16))


@pytest.mark.parametrize("spacing", ["none", None, [1, 1], "abc", [1, 0, 1]])
def test_arrays_without_a_spacing(model: Path, spacing: Any) -> None:
    properties = {} if spacing == "none" else {"spacing": spacing}
    ours = predictor(model)
    volume = np.stack([image(c) for c in range(4)])
    with pytest.raises(ValueError, match=r"spacing=\(z, y, x\)"):
        ours.predict_single_npy_array(volume, properties)
    with pytest.raises(ValueError, match=r"spacing=\(z, y, x\)"):
        ours.predict_case({"t1": image(0)}, properties=properties)


def test_an_ending_in_capitals_is_not_a_missing_file(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    (tmp_path / "a_0001.nii.gz").rename(tmp_path / "a_0001.NII.GZ")
    channels = ("t1", "t1ce", "t2", "flair")
    (case,) = find_cases(tmp_path, ".nii.gz", channels)
    with pytest.raises(CaseError, match=r"a_0001\.NII\.GZ .*the model reads \.nii\.gz files only"):
        resolve(case, "auto", channels)
    assert resolve(case, "t1ce", channels) == (True, False, True, True)


def test_intensities_that_cannot_be_normalised(model: Path, tmp_path: Path) -> None:
    write_case(tmp_path / "in", "a")
    huge = image(1).astype(np.float32) * np.float32(1e30)
    write_image(tmp_path / "in" / "a_0001.nii.gz", huge)
    ours: MGMLPredictor = predictor(model)
    ours.predict_from_files_sequential(str(tmp_path / "in"), str(tmp_path / "out"))
    assert set(ours.failures) == {"a"}
    assert "t1ce cannot be normalised, its intensities reach 3.9" in ours.failures["a"]
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400])
def test_options_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="Bad value for option initial_lr"):
        Options().updated({"initial_lr": value})


@pytest.mark.parametrize(
    ("layout", "old", "new"),
    [("brats2021", "_t1ce", "_t1Gd"), ("brats2021", "_t1ce", "_T1c"), ("brats2023", "-t1c", "-t1post")],
)
def test_other_names_of_the_sequences(nnunet_folders: Path, tmp_path: Path, layout: str, old: str, new: str) -> None:
    (name,) = write_cases(tmp_path / "src", 1, layout)
    file = tmp_path / "src" / name / f"{name}{old}.nii.gz"
    file.rename(file.with_name(f"{name}{new}.nii.gz"))
    summary = convert_brats(tmp_path / "src", 137, num_processes=0)
    assert (summary.num_training, summary.missing) == (1, {})


def test_a_file_that_is_left_over_is_named(nnunet_folders: Path, tmp_path: Path) -> None:
    (name,) = write_cases(tmp_path / "src", 1)
    file = tmp_path / "src" / name / f"{name}_t1ce.nii.gz"
    file.rename(file.with_name(f"{name}_contrast.nii.gz"))
    with pytest.raises(ValueError, match=f"no file for t1ce, but {name}_contrast.nii.gz is there.*{name}_t1ce.nii.gz"):
        convert_brats(tmp_path / "src", 137, num_processes=0)
    file.with_name(f"{name}_contrast.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"no file for t1ce \(allow with --missing_ok\)"):
        convert_brats(tmp_path / "src", 137, num_processes=0)
