"""Which cases a model is evaluated on, and what is said where they are not to be had."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from builders import BRATS_JSON, plans

from nnunetv2_mgml.plans.cohort import raw_cases
from nnunetv2_mgml.plans.splits import cases_digest
from nnunetv2_mgml.workflows.labelled_cases import folder_cases, validation_cases, warn_of_other_training_cases

DATASET = "Dataset900_Phantom"


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def put_case(folder: Path, case: str, part: str = "") -> None:
    """Write empty files: which cases there are is found by names alone."""
    touch(*(folder / f"images{part}" / f"{case}_{c:04d}.nii.gz" for c in range(4)))
    touch(folder / f"labels{part}" / f"{case}.nii.gz")


@pytest.fixture
def model(nnunet_folders: Path) -> Path:
    folder = nnunet_folders / "results" / DATASET / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres"
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(BRATS_JSON))
    (folder / "plans.json").write_text(json.dumps(plans()))
    splits = nnunet_folders / "preprocessed" / DATASET / "splits_final.json"
    splits.parent.mkdir()
    splits.write_text(json.dumps([{"train": ["b"], "val": ["a"]}, {"train": ["a"], "val": ["b"]}]))
    return folder


def test_cases_of_a_folder_without_labels_or_without_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    put_case(tmp_path, "a")
    put_case(tmp_path, "b")
    (labels / "b.nii.gz").rename(labels / "c.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"1 label maps of .* have no images in .*: c\. .*--allow_missing"):
        folder_cases(images, labels, (0,), BRATS_JSON, allow_missing=False)
    found = folder_cases(images, labels, (0, 1), BRATS_JSON, allow_missing=True)
    assert [(part.folds, [case.name for case in part.cases]) for part in found.work] == [((0, 1), ["a"])]
    assert "1 cases have no label map and are not evaluated: b." in caplog.text
    (labels / "a.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"No case of .*: found images of a, b and labels of c\."):
        folder_cases(images, labels, (0,), BRATS_JSON, allow_missing=True)


def test_a_split_that_has_changed_is_warned_of(
    model: Path, nnunet_folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A fold's validation cases may then be among those it was trained on."""
    splits = json.loads((nnunet_folders / "preprocessed" / DATASET / "splits_final.json").read_text())
    trained = {"mgml": {"training_cases": cases_digest(splits[0]["train"])}}
    others = {"mgml": {"training_cases": cases_digest(["x", "y"])}}
    for fold, of_fold in ((0, trained), (1, others)):
        file = model / f"fold_{fold}" / "checkpoint_final.pth"
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"network_weights": {}, "init_args": {"plans": of_fold}}, file)
    warn_of_other_training_cases(model, "900", (0,), "checkpoint_final.pth", trust=False)
    assert not caplog.text
    warn_of_other_training_cases(model, "900", (0, 1), "checkpoint_final.pth", trust=False)
    assert caplog.text.count("has other training cases") == 1
    assert "Fold 1 has other training cases than when its checkpoint was written (1 now, 2 then)" in caplog.text
    torch.save({"network_weights": {}, "init_args": {"plans": {}}}, model / "fold_1" / "checkpoint_final.pth")
    caplog.clear()
    warn_of_other_training_cases(model, "900", (1,), "checkpoint_final.pth", trust=False)
    assert not caplog.text, "written before that was kept"


def test_validation_cases_come_from_the_raw_data(model: Path, nnunet_folders: Path) -> None:
    raw = nnunet_folders / "raw" / DATASET
    put_case(raw, "a", "Tr")
    (raw / "dataset.json").write_text(json.dumps(BRATS_JSON))
    found = validation_cases(model, "900", (0,))
    assert [case.name for part in found.work for case in part.cases] == ["a"]
    assert found.lasting_source.images is None, "a data set known by its name may be moved"
    assert found.source.images == (raw / "imagesTr").resolve()
    with pytest.raises(FileNotFoundError, match=r"1 validation cases of fold 1 are not in .*: b\."):
        validation_cases(model, "900", (0, 1))
    with pytest.raises(ValueError, match=r"splits_final\.json has folds 0 to 1, not 5\."):
        validation_cases(model, "900", (5,))
    listed = {"images": [f"imagesTr/a_{c:04d}.nii.gz" for c in range(4)], "label": "labelsTr/a.nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**BRATS_JSON, "dataset": {"a": listed}}))
    found = validation_cases(model, "900", (0,))
    assert found.references == {"a": (raw / "labelsTr" / "a.nii.gz").resolve()}
    assert found.source.images is None, "files listed one by one have no folder"


def test_folds_that_share_validation_cases_are_evaluated_one_by_one(model: Path, nnunet_folders: Path) -> None:
    """Else one fold's model would predict them, and the other get the credit."""
    file = nnunet_folders / "preprocessed" / DATASET / "splits_final.json"
    file.write_text(json.dumps([{"train": ["b"], "val": ["a"]}, {"train": ["c"], "val": ["a", "b"]}]))
    with pytest.raises(ValueError, match=r"1 validation cases belong to .* such as a \(folds 0 and 1\)"):
        validation_cases(model, "900", (0, 1))
    with pytest.raises(ValueError, match="folds 0 and 0"):
        validation_cases(model, "900", (0, 0))


@pytest.mark.parametrize("content", ['{"train": [], "val": []}', '[["a"], ["b"]]', '[{"train": ["a"]}]'])
def test_a_damaged_split_is_named(model: Path, nnunet_folders: Path, content: str) -> None:
    file = nnunet_folders / "preprocessed" / DATASET / "splits_final.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"splits_final\.json must hold a list of folds"):
        validation_cases(model, "900", (0,))
    file.write_text('[{"train": ["a"], "val": []}]')
    with pytest.raises(ValueError, match=r"Fold 0 of .* has no validation cases"):
        validation_cases(model, "900", (0,))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"splits_final\.json does not exist"):
        validation_cases(model, "900", (0,))


def test_a_listed_file_that_does_not_exist_is_a_missing_modality(model: Path, nnunet_folders: Path) -> None:
    """As in training (`plans.cohort.raw_cases`)."""
    raw = nnunet_folders / "raw" / DATASET
    put_case(raw, "a", "Tr")
    (raw / "imagesTr" / "a_0002.nii.gz").unlink()
    listed = {"images": [f"imagesTr/a_{c:04d}.nii.gz" for c in range(4)], "label": "labelsTr/a.nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**BRATS_JSON, "dataset": {"a": listed}}))
    (case,) = validation_cases(model, "900", (0,)).work[0].cases
    (trained,) = raw_cases(raw)
    assert sorted(case.files) == sorted(trained.files) == [0, 1, 3]


def test_what_validation_cases_need(model: Path, nnunet_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{DATASET} is not in nnUNet_raw")) as error:
        validation_cases(model, "900", (0,))
    assert "and there is no" in str(error.value)
    renamed = model.rename(model.with_name("my_model"))
    with pytest.raises(FileNotFoundError, match=r"my_model names no configuration of its plans\."):
        validation_cases(renamed, "900", (0,))
    content = plans()
    content["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    content["configurations"]["3d_lowres"] = dict(plans()["configurations"]["3d_fullres"])
    (renamed / "plans.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="second stage validation cases can be evaluated from raw images only"):
        validation_cases(renamed.rename(model), "900", (0,))
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed, which is not set"):
        validation_cases(model, "900", (0,))
