"""The commands a user types, end to end: on a phantom, and on real patients where MGML_REAL_DATA is set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_mgml.phantom import write_phantoms

pytestmark = pytest.mark.slow
PLANS = "nnUNetMGMLPlans"
TINY = ("num_epochs=2", "num_iterations_per_epoch=3", "num_val_iterations_per_epoch=1", "width_factor=0.25", "seed=1")


class Shell:
    """Runs installed commands with nnU-Net's folders below one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
        self.environment = {**os.environ, **folders, "nnUNet_def_n_proc": "2", "nnUNet_n_proc_DA": "1"}

    def __call__(self, command: str, *arguments: object, code: int = 0) -> str:
        script = Path(sys.executable).with_name(command)
        assert script.is_file(), f"{script} is not installed: pip install -e '.[test]'"
        done = subprocess.run(
            [str(script), *map(str, arguments)],
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}"
        return done.stdout

    def predict(self, images: Path, output: Path, dataset: int, *flags: object, fold: object = 0, code: int = 0) -> str:
        model = ("-d", dataset, "-c", "3d_fullres", "-f", fold, "-tr", "nnUNetTrainerMGML", "-p", PLANS)
        quick = ("-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta")
        return self("nnUNetv2_predict", "-i", images, "-o", output, *model, *quick, *flags, code=code)


def labels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def agreement(first: Path, second: Path) -> float:
    """Share of equal voxels among those that are foreground in either prediction, averaged over the cases."""
    shares = []
    for path in sorted(first.glob("*.nii.gz")):
        a, b = labels(path), labels(second / path.name)
        foreground = (a > 0) | (b > 0)
        shares.append(float((a == b)[foreground].mean()) if foreground.any() else 1.0)
    assert shares
    return float(np.mean(shares))


def without(images: Path, channel: int, target: Path) -> Path:
    target.mkdir()
    for path in images.glob("*.nii.gz"):
        if not path.name.endswith(f"_{channel:04d}.nii.gz"):
            shutil.copy(path, target)
    return target


def test_whole_chain_on_a_phantom(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    write_phantoms(tmp_path / "brats", 5, seed=1, shape=(32, 36, 32), spacing=(5.0, 5.0, 5.0))
    shell("mgml", "convert", "brats", tmp_path / "brats", "-d", 902, "--name", "Chain", "--split", "2:1:2")
    shell("nnUNetv2_plan_and_preprocess", "-d", 902, "-c", "3d_fullres", "-np", 2)
    shell("mgml", "plan", "-d", 902, "-c", "3d_fullres", "--set", *TINY, "patch_size=[24,24,24]")
    log = shell("nnUNetv2_train", 902, "3d_fullres", 0, "-tr", "nnUNetTrainerMGML", "-p", PLANS, "-device", "cpu")
    assert "Validation cases on every subset of the modalities" in log
    model = tmp_path / "results" / "Dataset902_Chain" / f"nnUNetTrainerMGML__{PLANS}__3d_fullres"
    report = json.loads((model / "subset_report.json").read_text())
    assert len(report["subsets"]) == 15
    assert report["folds"] == ["0"]
    train = ("nnUNetv2_train", 902, "3d_fullres", 0, "-tr", "nnUNetTrainerMGML", "-p", PLANS, "-device", "cpu")
    checkpoint = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    assert "Validation cases on every subset" in shell(*train, "--val")
    shell("mgml", "plan", "-d", 902, "-c", "3d_fullres", "--set", "num_epochs=3", "-p", PLANS)
    assert "Epoch 2" in shell(*train, "--c")
    assert (model / "fold_0" / "checkpoint_final.pth").read_bytes() != checkpoint
    images = tmp_path / "raw" / "Dataset902_Chain" / "imagesTs"
    masked, absent, stock = (tmp_path / name for name in ("masked", "absent", "stock"))
    shell.predict(images, masked, 902, "--missing_modalities", "t1ce")
    said = shell.predict(without(images, 1, tmp_path / "holes"), absent, 902, "--missing_modalities", "auto")
    assert "expected Dice" in said
    shell.predict(images, stock, 902)
    assert agreement(masked, absent) == 1.0  # the phantom is skull-stripped: every sequence has the same zeros
    for folder in (masked, absent):
        told = json.loads((folder / "mgml_prediction.json").read_text())
        assert all(case["present"] == ["t1", "t2", "flair"] for case in told["cases"].values())
        assert all(
            case["expected_dice"].keys() == {"whole_tumor", "tumor_core", "enhancing_tumor"}
            for case in told["cases"].values()
        )
    assert not list(stock.glob("mgml_prediction*"))
    shell("mgml", "convert", "back", masked, tmp_path / "back", "--to", "brats2021")
    assert {p.name for p in (tmp_path / "back").glob("*.nii.gz")} == {p.name for p in masked.glob("*.nii.gz")}
    (tmp_path / "holes" / next(images.glob("*_0000.nii.gz")).name).write_bytes(b"not an image")
    broken = tmp_path / "broken"
    said = shell.predict(tmp_path / "holes", broken, 902, "--missing_modalities", "auto", code=1)
    assert "1 cases were not predicted" in said
    assert len(list(broken.glob("*.nii.gz"))) == 1


def test_real_patients(tmp_path: Path, real_data: Path) -> None:
    """All eleven BraTS cases converted; preprocessed and trained at 3 mm; two predicted without T1ce, both ways."""
    shell = Shell(tmp_path)
    source = tmp_path / "brats"
    source.mkdir()
    for case in [*(real_data / "brats2021").iterdir(), *(real_data / "brats2023").iterdir()]:
        (source / case.name).symlink_to(case)
    said = shell("mgml", "convert", "brats", source, "-d", 903, "--name", "Real", "--link", "--split", "8:1:2")
    assert "in imagesTr, 2 held out" in said
    shell(
        "nnUNetv2_plan_and_preprocess",
        "-d",
        903,
        "-c",
        "3d_fullres",
        "-np",
        2,
        "-overwrite_target_spacing",
        3,
        3,
        3,
        "-overwrite_plans_name",
        "nnUNetPlans3mm",
    )
    shell(
        "mgml",
        "plan",
        "-d",
        903,
        "-p",
        "nnUNetPlans3mm",
        "-c",
        "3d_fullres",
        "--set",
        *TINY,
        "patch_size=[40,40,40]",
        "validate_subsets=false",
    )
    shell("nnUNetv2_train", 903, "3d_fullres", 0, "-tr", "nnUNetTrainerMGML", "-p", PLANS, "-device", "cpu")
    images = tmp_path / "raw" / "Dataset903_Real" / "imagesTs"
    shell.predict(images, tmp_path / "masked", 903, "--missing_modalities", "t1ce")
    shell.predict(without(images, 1, tmp_path / "holes"), tmp_path / "absent", 903, "--missing_modalities", "auto")
    assert agreement(tmp_path / "masked", tmp_path / "absent") > 0.99
    reference = sorted((tmp_path / "raw" / "Dataset903_Real" / "labelsTs").glob("*.nii.gz"))
    for path in reference:
        predicted, truth = (sitk.ReadImage(str(folder / path.name)) for folder in (tmp_path / "masked", path.parent))
        assert predicted.GetSize() == truth.GetSize()
        assert np.allclose(predicted.GetDirection(), truth.GetDirection())


def test_another_disease_with_three_modalities(tmp_path: Path, real_data: Path) -> None:
    """ISLES: DWI, ADC and FLAIR, labels instead of regions, an oblique grid; one case, so it trains on fold all."""
    shell = Shell(tmp_path)
    folder = tmp_path / "raw" / "Dataset904_Stroke"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    case = next((real_data / "isles22").iterdir())
    for number in range(2):
        for channel, modality in enumerate(("dwi", "adc", "flair")):
            image = case / f"{case.name}_{modality}.nii.gz"
            shutil.copy(image, folder / "imagesTr" / f"s{number}_{channel:04d}.nii.gz")
        segmentation = sitk.Cast(sitk.ReadImage(str(case / f"{case.name}_seg.nii.gz")), sitk.sitkUInt8)
        sitk.WriteImage(segmentation, str(folder / "labelsTr" / f"s{number}.nii.gz"))
    for channel in (0, 2):
        shutil.copy(folder / "imagesTr" / f"s0_{channel:04d}.nii.gz", folder / "imagesTs")
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "DWI", "1": "ADC", "2": "FLAIR"},
                "labels": {"background": 0, "lesion": 1},
                "numTraining": 2,
                "file_ending": ".nii.gz",
            }
        )
    )
    shell(
        "nnUNetv2_plan_and_preprocess",
        "-d",
        904,
        "-c",
        "3d_fullres",
        "-np",
        2,
        "-overwrite_target_spacing",
        4,
        4,
        4,
        "-overwrite_plans_name",
        "nnUNetPlans4mm",
    )
    shell("mgml", "plan", "-d", 904, "-p", "nnUNetPlans4mm", "-c", "3d_fullres", "--set", *TINY, "fusion=mean")
    shell("nnUNetv2_train", 904, "3d_fullres", "all", "-tr", "nnUNetTrainerMGML", "-p", PLANS, "-device", "cpu")
    said = shell.predict(folder / "imagesTs", tmp_path / "out", 904, fold="all", code=1)
    assert "--missing_modalities auto" in said  # nnU-Net's own prediction, which says what was forgotten
    shell.predict(folder / "imagesTs", tmp_path / "out", 904, "--missing_modalities", "ADC", fold="all")
    assert set(np.unique(labels(tmp_path / "out" / "s0.nii.gz"))) <= {0, 1}
    said = shell.predict(folder / "imagesTs", tmp_path / "out", 904, "--missing_modalities", "t1ce", fold="all", code=2)
    assert "Unknown modality 't1ce'. This model has: dwi, adc, flair" in said
