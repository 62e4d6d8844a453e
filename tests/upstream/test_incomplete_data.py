"""`upstream.incomplete_data`: fingerprint and preprocessing where files are absent or recorded as missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders import plans
from cohort_cases import CHANNELS, SHAPE, label, save, volume, write_raw
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.preprocessing.preprocessors import default_preprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.plans.cohort import MISSING_FILE, incomplete_cases, raw_cases
from nnunetv2_mgml.upstream import incomplete_data

DATASET = "Dataset045_Tiny"


def fingerprint(cls: type = incomplete_data.IncompleteFingerprintExtractor) -> dict[str, Any]:
    """Take the fingerprint with few samples, in this process where it is ours."""
    extractor = cls(45, 1)
    extractor.num_foreground_voxels_for_intensitystats = 600
    extractor.show_progress_bar = False
    extractor.run(overwrite_existing=True)
    path = Path(incomplete_data.nnunet_folder("nnUNet_preprocessed")) / DATASET / "dataset_fingerprint.json"
    return json.loads(path.read_text())


def plans_manager(schemes: list[str]) -> PlansManager:
    content = plans(DATASET, modalities=len(CHANNELS), patch=(8, 8, 8))
    content["configurations"]["3d_fullres"]["normalization_schemes"] = schemes
    content["configurations"]["3d_fullres"]["use_mask_for_norm"] = [False] * len(CHANNELS)
    return PlansManager(content)


def test_raw_cases_know_files_and_record(nnunet_folders: Path) -> None:
    folder = write_raw(nnunet_folders / "raw" / DATASET, {"a": ["t1"]})
    assert incomplete_cases(folder) == {"a": ("t1",)}
    (folder / MISSING_FILE).write_text(json.dumps({"b": ["FLAIR", "CT"]}))
    assert incomplete_cases(folder) == {"a": ("t1",), "b": ("ct", "flair")}
    assert [sorted(case.files) for case in raw_cases(folder)] == [[0, 2], [1], [0, 1, 2]]
    (folder / MISSING_FILE).write_text(json.dumps({"b": ["dwi"]}))
    with pytest.raises(ValueError, match=f"{MISSING_FILE}: Unknown modality 'dwi'"):
        raw_cases(folder)
    (folder / MISSING_FILE).write_text(json.dumps({"b": list(CHANNELS)}))
    with pytest.raises(ValueError, match=r"have no modality at all: b"):
        raw_cases(folder)


def test_raw_cases_of_listed_files(nnunet_folders: Path) -> None:
    """nnU-Net's other layout: dataset.json names every file, in channel order."""
    folder = write_raw(nnunet_folders / "raw" / DATASET, {"a": ["t1"]})
    listed = {
        case: {
            "images": [f"imagesTr/{case}_{c:04d}.nii.gz" for c in range(3)],
            "label": f"labelsTr/{case}.nii.gz",
        }
        for case in "abc"
    }
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "dataset": listed}))
    assert incomplete_cases(folder) == {"a": ("t1",)}


def test_the_fingerprint_of_a_complete_data_set_is_nnunets(nnunet_folders: Path) -> None:
    write_raw(nnunet_folders / "raw" / DATASET)
    ours = fingerprint()
    assert ours == fingerprint_of_stock()


def fingerprint_of_stock() -> dict[str, Any]:
    """Nnu-Net's own, its pool of processes replaced by this process."""

    class Pool:
        _pool = ()

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def starmap_async(self, function: Any, arguments: Any) -> Any:
            results = [function(*row) for row in arguments]
            return SimpleNamespace(ready=lambda: True, get=lambda: results)

    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

    context = SimpleNamespace(Pool=lambda _: Pool())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint_extractor.multiprocessing, "get_context", lambda _: context)
        return fingerprint(DatasetFingerprintExtractor)


def test_nothing_that_is_absent_enters_the_fingerprint(nnunet_folders: Path) -> None:
    """A placeholder of -1000 would move the mean of a CT and its percentiles, and the crop box."""
    folder = write_raw(nnunet_folders / "raw" / DATASET)
    complete = fingerprint()
    save(np.full(SHAPE, -1000, np.float32), folder / "imagesTr" / "a_0000.nii.gz")
    spoiled = fingerprint()
    (folder / MISSING_FILE).write_text(json.dumps({"a": ["ct"]}))
    recorded = fingerprint()
    (folder / "imagesTr" / "a_0000.nii.gz").unlink()
    (folder / MISSING_FILE).unlink()
    absent = fingerprint()
    assert recorded == absent
    key = "foreground_intensity_properties_per_channel"
    assert spoiled[key]["0"]["percentile_00_5"] == -1000
    assert absent[key]["0"]["mean"] == pytest.approx(complete[key]["0"]["mean"], abs=2)
    assert absent[key]["0"]["percentile_00_5"] > 20
    assert absent[key]["1"]["mean"] == pytest.approx(complete[key]["1"]["mean"], abs=1)
    assert absent["shapes_after_crop"] == complete["shapes_after_crop"]
    assert spoiled["shapes_after_crop"][0] == list(SHAPE)


def test_a_fingerprint_of_placeholders_is_taken_again(nnunet_folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    """nnU-Net keeps what is there, unless it is told --clean."""

    def run() -> dict[str, Any]:
        extractor = incomplete_data.IncompleteFingerprintExtractor(45, 1)
        extractor.num_foreground_voxels_for_intensitystats = 600
        extractor.show_progress_bar = False
        return extractor.run(overwrite_existing=False)

    folder = write_raw(nnunet_folders / "raw" / DATASET)
    save(np.full(SHAPE, -1000, np.float32), folder / "imagesTr" / "a_0000.nii.gz")
    spoiled = fingerprint_of_stock()
    assert incomplete_data.LEFT_OUT not in spoiled
    assert run() == spoiled, "nothing is said to be missing"
    (folder / MISSING_FILE).write_text(json.dumps({"a": ["ct"]}))
    mended = run()
    assert mended[incomplete_data.LEFT_OUT] == {"a": ["ct"]}
    assert mended["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"] > 20
    assert "taking it again" in caplog.text
    caplog.clear()
    assert run() == mended
    assert caplog.text == ""


def test_a_data_set_is_planned_whatever_its_first_case_lacks(
    nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner opens the first file that is listed to choose a reader."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # so many threads the planner takes
    folder = write_raw(nnunet_folders / "raw" / DATASET, {"a": ["ct"]})
    description = json.loads((folder / "dataset.json").read_text())
    listed = {
        case: {"images": [f"imagesTr/{case}_{c:04d}.nii.gz" for c in range(3)], "label": f"labelsTr/{case}.nii.gz"}
        for case in "abc"
    }
    (folder / "dataset.json").write_text(json.dumps({**description, "dataset": listed}))
    (nnunet_folders / "preprocessed" / DATASET).mkdir()
    shutil.copy(folder / "dataset.json", nnunet_folders / "preprocessed" / DATASET)
    fingerprint()
    determine = ExperimentPlanner.determine_reader_writer
    api: Any = SimpleNamespace(
        plan_experiment_dataset=plan_experiment_dataset,
        **{name: None for name in ("extract_fingerprint_dataset", "preprocess_dataset", "verify_dataset_integrity")},
    )
    incomplete_data.install(api)
    with pytest.raises(RuntimeError, match="Unable to determine a reader"):
        plan_experiment_dataset(45)
    planned, _ = api.plan_experiment_dataset(45)
    assert planned["experiment_planner_used"] == "ExperimentPlanner"
    assert planned["image_reader_writer"] == "SimpleITKIO"
    assert ExperimentPlanner.determine_reader_writer is determine


def test_a_modality_nobody_has_is_named(nnunet_folders: Path) -> None:
    write_raw(nnunet_folders / "raw" / DATASET, {case: ["flair"] for case in "abc"})
    with pytest.raises(ValueError, match="No training case has flair together with any foreground"):
        fingerprint()


def test_an_absent_channel_is_zero_after_every_normalisation(nnunet_folders: Path) -> None:
    folder = write_raw(nnunet_folders / "raw" / DATASET)
    files = [str(folder / "imagesTr" / f"a_{c:04d}.nii.gz") for c in range(3)]
    arguments = (str(folder / "labelsTr" / "a.nii.gz"),)
    description = json.loads((folder / "dataset.json").read_text())
    ours = incomplete_data.IncompletePreprocessor(verbose=False)
    for scheme in ("ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization"):
        manager = plans_manager([scheme, "ZScoreNormalization", "ZScoreNormalization"])
        rest = (*arguments, manager, manager.get_configuration("3d_fullres"), description)
        whole, labels, _ = default_preprocessor.DefaultPreprocessor(verbose=False).run_case(files, *rest)
        same, _, _ = ours.run_case(files, *rest)
        assert np.array_equal(same, whole)
        lacking, labels_lacking, properties = ours.run_case(files[1:], *rest)
        assert not lacking[0].any()
        assert np.array_equal(lacking[1:], whole[1:])
        assert np.array_equal(labels, labels_lacking)
        assert len(properties["class_locations"][1])
        ours.absent_files = frozenset([str(Path(files[2]).resolve())])
        recorded, _, _ = ours.run_case(files, *rest)
        assert not recorded[2].any()
        assert np.array_equal(recorded[:2], whole[:2])
        ours.absent_files = frozenset()


def test_files_whose_channel_cannot_be_told(nnunet_folders: Path) -> None:
    with pytest.raises(ValueError, match="Cannot tell the channels of"):
        incomplete_data._by_channel(["x.nii.gz", "y.nii.gz"], ".nii.gz", 3)
    assert incomplete_data._by_channel(["p_0002.nii.gz", "p_0001.nii.gz"], ".nii.gz", 3) == {
        1: "p_0001.nii.gz",
        2: "p_0002.nii.gz",
    }


def test_complete_data_sets_are_left_to_stock_code(nnunet_folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[Any, ...]] = []

    def step(*arguments: Any, **_: Any) -> None:
        calls.append((default_preprocessor.DefaultPreprocessor, *arguments))

    names = (
        "extract_fingerprint_dataset",
        "plan_experiment_dataset",
        "preprocess_dataset",
        "verify_dataset_integrity",
    )
    api: Any = SimpleNamespace(**{name: lambda *a, **k: step(*a, **k) for name in names})
    incomplete_data.install(api)
    wrapped = api.preprocess_dataset
    incomplete_data.install(api)
    assert api.preprocess_dataset is wrapped
    folder = write_raw(nnunet_folders / "raw" / DATASET)
    preprocessed = nnunet_folders / "preprocessed" / DATASET
    preprocessed.mkdir()
    stock = default_preprocessor.DefaultPreprocessor
    api.extract_fingerprint_dataset(45, DatasetFingerprintExtractor, 2)
    api.plan_experiment_dataset(45)
    api.preprocess_dataset(45, "nnUNetPlans", ["3d_fullres"])
    api.verify_dataset_integrity(str(folder))
    assert calls == [
        (stock, 45, DatasetFingerprintExtractor, 2),
        (stock, 45, ExperimentPlanner),
        (stock, 45, "nnUNetPlans", ["3d_fullres"]),
        (stock, str(folder), 8),
    ]
    assert caplog.text == ""
    (folder / "imagesTr" / "b_0001.nii.gz").unlink()
    calls.clear()
    api.extract_fingerprint_dataset(45, DatasetFingerprintExtractor, 2)
    api.preprocess_dataset(45, "nnUNetPlans", ["3d_fullres"])
    assert calls == [
        (stock, 45, incomplete_data.IncompleteFingerprintExtractor, 2),
        (incomplete_data.IncompletePreprocessor, 45, "nnUNetPlans", ["3d_fullres"]),
    ]
    assert default_preprocessor.DefaultPreprocessor is stock
    assert "1 case lacks modalities (t1 in 1)" in caplog.text
    assert json.loads((preprocessed / MISSING_FILE).read_text()) == {"b": ["t1"]}


def test_what_only_we_cannot_read_is_left_to_stock_code(nnunet_folders: Path) -> None:
    """Two spellings of one modality, and colours in one file, are nothing to us unless something is recorded."""
    folder = write_raw(nnunet_folders / "raw" / DATASET, channels=("T1", "T1w"))
    assert incomplete_data._missing(folder) == {}
    (folder / MISSING_FILE).write_text(json.dumps({"a": ["T1"]}))
    with pytest.raises(ValueError, match="the same modality twice"):
        incomplete_data._missing(folder)
    colours = write_raw(nnunet_folders / "raw" / "Dataset046_RGB", {case: ["G", "B"] for case in "abc"}, channels="RGB")
    assert incomplete_data._missing(colours) == {}
    (colours / MISSING_FILE).write_text(json.dumps({"a": ["R"]}))
    with pytest.raises(ValueError, match="have no modality at all: a"):
        incomplete_data._missing(colours)


def test_integrity_of_what_is_there(nnunet_folders: Path) -> None:
    folder = write_raw(nnunet_folders / "raw" / DATASET, {"a": ["t1"]})
    incomplete_data.verify_incomplete(folder, 1)
    save(volume(3, shape=(12, 14, 15)), folder / "imagesTr" / "b_0001.nii.gz")
    with pytest.raises(RuntimeError):
        incomplete_data.verify_incomplete(folder, 1)
    shutil.copy(folder / "imagesTr" / "b_0000.nii.gz", folder / "imagesTr" / "b_0001.nii.gz")
    save(label(7), folder / "labelsTr" / "c.nii.gz")
    with pytest.raises(RuntimeError, match="1 case has errors, see above: c"):
        incomplete_data.verify_incomplete(folder, 1)
    (folder / "labelsTr" / "c.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="no label map: c"):
        incomplete_data.verify_incomplete(folder, 1)
