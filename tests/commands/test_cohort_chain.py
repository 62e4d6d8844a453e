"""Real patients, some of them incomplete: convert, check, plan, preprocess, train, predict.

They go through the functions behind the commands in this process, because a process costs more than what it does with
one small case.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from builders import TINY
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_chain import labels

from nnunetv2_mgml import MGMLPredictor
from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.cohort import raw_cases
from nnunetv2_mgml.training import nnUNetTrainerMGML
from nnunetv2_mgml.upstream.incomplete_data import IncompleteFingerprintExtractor, IncompletePreprocessor
from nnunetv2_mgml.workflows.plan import make_plans

pytestmark = pytest.mark.slow


def plan_and_preprocess(root: Path, dataset: str, configuration: str, patch: list[int]) -> dict[str, Any]:
    """Do in this process what ``nnUNetv2_plan_and_preprocess`` and ``mgml plan`` do; return the plans."""
    raw, preprocessed = root / "raw" / dataset, root / "preprocessed" / dataset
    extractor = IncompleteFingerprintExtractor(dataset, 1)
    extractor.num_foreground_voxels_for_intensitystats = 1000
    extractor.run()
    with pytest.MonkeyPatch.context() as patching:
        voxels = staticmethod(lambda size, *_: float(np.prod(size)) * (300 if len(size) == 3 else 20000))
        patching.setattr(ExperimentPlanner, "static_estimate_VRAM_usage", voxels)
        ExperimentPlanner(dataset).plan_experiment()
    description = json.loads((raw / "dataset.json").read_text())
    stock = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    changes = {"patch_size": patch, "batch_size": 2, **TINY, "num_epochs": 1, "width_factor": 0.25}
    plans = make_plans(stock, changes, [configuration], "nnUNetMGMLPlans", channel_names(description))
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    folder = preprocessed / config.data_identifier
    folder.mkdir()
    cases = raw_cases(raw)
    for case in cases:
        IncompletePreprocessor(verbose=False).run_case_save(
            str(folder / case.name), [*map(str, case.files.values())], str(case.label), manager, config, description
        )
        (preprocessed / "gt_segmentations").mkdir(exist_ok=True)
        shutil.copy(case.label, preprocessed / "gt_segmentations")
    names = [case.name for case in cases]
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": names, "val": names[:1]}]))
    return plans


def train(root: Path, plans: dict[str, Any], configuration: str) -> Path:
    """Train two iterations; return the model's folder."""
    description = json.loads((root / "raw" / plans["dataset_name"] / "dataset.json").read_text())
    plans["continue_training"] = False
    trainer = nnUNetTrainerMGML(plans, configuration, 0, description, torch.device("cpu"))
    trainer.run_training()
    assert "Training cases that have each" in Path(trainer.log_file).read_text()
    return Path(trainer.output_folder_base)


def predict(model: Path, source: Path, target: Path) -> dict[str, Any]:
    """Predict with ``auto``; return case -> entry of the report."""
    predictor = MGMLPredictor(
        missing_modalities=["auto"], use_mirroring=False, tile_step_size=1.0, device=torch.device("cpu")
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    predictor.predict_from_files(
        str(source), str(target), num_processes_preprocessing=0, num_processes_segmentation_export=0
    )
    assert predictor.failures == {}
    return json.loads((target / "mgml_prediction.json").read_text())["cases"]


def slab(source: Path, target: Path) -> None:
    """Copy the middle of a case's files, which is enough."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        image = sitk.ReadImage(str(path))
        x, y, _ = image.GetSize()
        sitk.WriteImage(image[x // 4 : 3 * x // 4, y // 4 : 3 * y // 4, 30:48], str(target / path.name))


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


def test_a_stroke(real_data: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ISLES: three modalities; the second time point of the same patient has no ADC."""
    quiet(monkeypatch)
    source = nnunet_folders / "src"
    patient = "sub-strokecase0009"
    for case in ("one", "two"):
        slab(real_data / "isles22" / patient, source / case)
    (source / "two" / f"{patient}_adc.nii.gz").unlink()
    patterns = ["dwi=*_dwi.nii.gz", "adc=*_adc.nii.gz", "flair=*_flair.nii.gz"]
    command = ["convert", "folders", str(source), "-d", "51", "--name", "Stroke", "--label", "*_seg.nii.gz", "-np", "1"]
    assert main([*command, "--modalities", *patterns]) == 0
    assert main(["check", "51", "-o", str(nnunet_folders / "check"), "-np", "1"]) == 0
    check = json.loads((nnunet_folders / "check" / "check.json").read_text())
    assert check["parts"]["training"] == {"cases": 2, "dwi": 2, "adc": 1, "flair": 2}
    assert "dwi is the same volume as dwi of one" in check["cases"]["two"]["findings"]
    plans = plan_and_preprocess(nnunet_folders, "Dataset051_Stroke", "3d_fullres", [16, 32, 32])
    model = train(nnunet_folders, plans, "3d_fullres")
    (nnunet_folders / "in.csv").write_text(f"case,flair\nfollow-up,src/one/{patient}_flair.nii.gz\n")
    report = predict(model, nnunet_folders / "in.csv", nnunet_folders / "out")
    assert report["follow-up"]["present"] == ["flair"]
    predicted = labels(nnunet_folders / "out" / "follow-up.nii.gz")
    assert predicted.shape == labels(source / "one" / f"{patient}_seg.nii.gz").shape


def test_slices(real_data: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """True 2-D images with seven tissue labels."""
    quiet(monkeypatch)
    source = shutil.copytree(real_data / "awkward" / "brats2013_2d", nnunet_folders / "src")
    (source / "BRATS_HG0002" / "BRATS_HG0002_T1_slice90.nii.gz").unlink()
    patterns = ["t1=*_T1_slice*", "t1ce=*_T1C_*", "t2=*_T2_*", "flair=*_FLAIR_*"]
    command = ["convert", "folders", str(source), "-d", "52", "--name", "Slices", "--label", "*_truth_*", "-np", "1"]
    assert main([*command, "--modalities", *patterns]) == 0
    assert main(["check", "52", "-o", str(nnunet_folders / "check"), "-np", "1"]) == 0
    check = json.loads((nnunet_folders / "check" / "check.json").read_text())
    assert check["parts"]["training"]["t1"] == 5
    assert any("flair covers less" in text for text in check["cases"]["BRATS_HG0006"]["findings"])
    plans = plan_and_preprocess(nnunet_folders, "Dataset052_Slices", "2d", [64, 64])
    model = train(nnunet_folders, plans, "2d")
    images = nnunet_folders / "in"
    images.mkdir()
    shutil.copy(source / "BRATS_HG0001" / "BRATS_HG0001_FLAIR_slice90.nii.gz", images / "a_0003.nii.gz")
    assert predict(model, images, nnunet_folders / "out")["a"]["present"] == ["flair"]
    assert sitk.ReadImage(str(nnunet_folders / "out" / "a.nii.gz")).GetDimension() == 2


def test_prostate(real_data: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Label maps on another grid are refused by name; put right, they go through, one of them empty, one ADC gone."""
    quiet(monkeypatch)
    source = shutil.copytree(real_data / "awkward" / "prostate", nnunet_folders / "src")
    patterns = ["t2w=*_0000.nii.gz", "adc=*_0001.nii.gz", "hbv=*_0002.nii.gz"]
    for case in ("case0", "case1"):
        for path in (source / "imagesTr").glob(f"{case}_*"):
            (source / case).mkdir(exist_ok=True)
            shutil.copy(path, source / case)
        shutil.copy(source / "labelsTr" / f"{case}.nii.gz", source / case / "lesion.nii.gz")
    shutil.rmtree(source / "imagesTr")
    shutil.rmtree(source / "labelsTr")
    command = ["convert", "folders", str(source), "-d", "53", "--name", "Prostate", "--label", "lesion.nii.gz"]
    command += ["-np", "1", "--labels", "lesion=1", "--modalities", *patterns]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "lesion.nii.gz is not on the grid of the images" in error
    for case in ("case0", "case1"):
        image = sitk.ReadImage(str(source / case / f"{case}_0000.nii.gz"))
        mask = sitk.ReadImage(str(source / case / "lesion.nii.gz"))
        mask.CopyInformation(image)  # the same voxels under another header
        sitk.WriteImage(mask, str(source / case / "lesion.nii.gz"))
    (source / "case1" / "case1_0001.nii.gz").unlink()
    assert main(command) == 0, capsys.readouterr().err
    assert main(["check", "53", "-np", "1"]) == 0
    assert "the label map is empty" in capsys.readouterr().out
    plans = plan_and_preprocess(nnunet_folders, "Dataset053_Prostate", "3d_fullres", [8, 32, 32])
    model = train(nnunet_folders, plans, "3d_fullres")
    raw = nnunet_folders / "raw" / "Dataset053_Prostate"
    report = predict(model, raw / "imagesTr", nnunet_folders / "out")
    assert report["case1"]["present"] == ["t2", "hbv"]


def test_multiple_sclerosis(real_data: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BraTS' four sequences with another label, some values negative; one patient has no T1 with contrast."""
    quiet(monkeypatch)
    source = nnunet_folders / "src"
    for patient in ("patient07", "patient19", "patient26"):
        slab(real_data / "ms_2mm" / patient, source / patient)
    (source / "patient26" / "patient26_t1ce.nii.gz").unlink()
    patterns = ["t1=*_t1.nii.gz", "t1ce=*_t1ce.nii.gz", "t2=*_t2.nii.gz", "flair=*_flair.nii.gz"]
    command = ["convert", "folders", str(source), "-d", "54", "--name", "MS", "--label", "*_seg.nii.gz", "-np", "1"]
    assert main([*command, "--labels", "lesion=1", "--modalities", *patterns]) == 0
    raw = nnunet_folders / "raw" / "Dataset054_MS"
    assert json.loads((raw / "missing_modalities.json").read_text()) == {"patient26": ["t1ce"]}
    assert json.loads((raw / "dataset.json").read_text())["labels"] == {"background": 0, "lesion": 1}
    assert main(["check", "54", "-o", str(nnunet_folders / "check"), "-np", "1"]) == 0
    check = json.loads((nnunet_folders / "check" / "check.json").read_text())
    assert check["parts"]["training"] == {"cases": 3, "t1": 3, "t1ce": 2, "t2": 3, "flair": 3}
    plans = plan_and_preprocess(nnunet_folders, "Dataset054_MS", "3d_fullres", [16, 32, 32])
    model = train(nnunet_folders, plans, "3d_fullres")
    images = nnunet_folders / "in"
    images.mkdir()
    for channel, sequence in ((2, "t2"), (3, "flair")):
        shutil.copy(source / "patient07" / f"patient07_{sequence}.nii.gz", images / f"new_{channel:04d}.nii.gz")
    assert predict(model, images, nnunet_folders / "out")["new"]["present"] == ["t2", "flair"]
    predicted = labels(nnunet_folders / "out" / "new.nii.gz")
    assert predicted.shape == labels(source / "patient07" / "patient07_seg.nii.gz").shape
    assert set(np.unique(predicted)) <= {0, 1}
