"""Conversion of real patients; see CONTRIBUTING for MGML_REAL_DATA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_cases import array_of
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

from nnunetv2_mgml.dataset_conversion.back import convert_back
from nnunetv2_mgml.dataset_conversion.convert import convert_brats


@pytest.fixture
def source(real_data: Path, tmp_path: Path) -> Path:
    """One case with names of 2021 and one with names of 2023, in one folder."""
    folder = tmp_path / "src"
    folder.mkdir()
    for case in ("brats2021/BraTS2021_00006", "brats2023/BraTS-GLI-00000-000"):
        (folder / Path(case).name).symlink_to(real_data / case)
    return folder


@pytest.mark.slow
def test_mixed_folder(source: Path, nnunet_folders: Path, tmp_path: Path) -> None:
    summary = convert_brats(source, 137, link=True, num_processes=1)
    assert summary.editions == {"BraTS2021": 1, "BraTS2023": 1}
    assert summary.labels == (0, 1, 2, 3)
    verify_dataset_integrity(str(summary.folder), 1)
    labels = {path.name[:-7]: array_of(path) for path in (summary.folder / "labelsTr").iterdir()}
    # ml (rounded) of whole tumour, tumour core and enhancing tumour; voxels of 1 mm^3
    for case, volumes in (("BraTS2021_00006", (137.9, 52.0, 26.5)), ("BraTS-GLI-00000-000", (57.3, 44.5, 32.7))):
        found = [np.isin(labels[case], region).sum() / 1000 for region in ((1, 2, 3), (2, 3), (3,))]
        assert found == pytest.approx(volumes, abs=0.06)
    convert_back(summary.folder / "labelsTr", tmp_path / "back", "brats2023", num_processes=1)
    for case, convention in (("BraTS2021_00006", "_seg"), ("BraTS-GLI-00000-000", "-seg")):
        original = array_of(source / case / f"{case}{convention}.nii.gz")
        back = sitk.ReadImage(str(tmp_path / "back" / f"{case}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(back), np.where(original == 4, 3, original))
        assert back.GetOrigin() == pytest.approx((0, -239, 0))


@pytest.mark.slow
def test_absent_sequence(source: Path, nnunet_folders: Path, tmp_path: Path) -> None:
    case = "BraTS2021_00006"
    files = [path.resolve() for path in (source / case).iterdir() if "flair" not in path.name]
    (source / case).unlink()
    (source / case).mkdir()
    for path in files:
        (source / case / path.name).symlink_to(path)
    summary = convert_brats(source, 137, missing_ok=True, num_processes=1)
    assert json.loads((summary.folder / "missing_modalities.json").read_text()) == {case: ["flair"]}
    verify_dataset_integrity(str(summary.folder), 1)
