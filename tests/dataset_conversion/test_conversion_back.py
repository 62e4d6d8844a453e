"""Back-conversion of predictions to the label values of BraTS."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_cases import array_of, tree, write_cases

from nnunetv2_mgml.dataset_conversion.back import convert_back
from nnunetv2_mgml.dataset_conversion.convert import convert_brats
from nnunetv2_mgml.dataset_conversion.labels import dataset_labels
from nnunetv2_mgml.io.label_mark import MARK_FILE, marked
from nnunetv2_mgml.scoring.sources import find_references, prediction_folders


def _prediction(path: Path, values: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.array(values, np.uint8).reshape(1, 1, -1))
    image.SetSpacing((1.5, 2.0, 3.0))
    image.SetOrigin((-7.0, 8.0, 9.0))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


@pytest.mark.parametrize(
    ("convention", "values", "expected"),
    [("brats2021", [0, 1, 2, 3], [0, 2, 1, 4]), ("brats2023", [0, 1, 2, 3, 4], [0, 2, 1, 3, 4])],
)
def test_values_and_geometry(tmp_path: Path, convention: str, values: list[int], expected: list[int]) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", values)
    (tmp_path / "in" / "dataset.json").touch()
    (tmp_path / "in" / "a.npz").touch()
    assert convert_back(tmp_path / "in", tmp_path / "out", convention, num_processes=1) == [
        tmp_path / "out" / "a.nii.gz"
    ]
    assert tree(tmp_path / "out") == ["a.nii.gz", MARK_FILE]
    before, after = (sitk.ReadImage(str(tmp_path / folder / "a.nii.gz")) for folder in ("in", "out"))
    assert sitk.GetArrayFromImage(after).ravel().tolist() == expected
    assert after.GetPixelID() == sitk.sitkUInt8
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(after, geometry)() == pytest.approx(getattr(before, geometry)())


@pytest.mark.parametrize("layout", ["brats2021", "brats2023"])
def test_there_and_back(nnunet_folders: Path, tmp_path: Path, layout: str) -> None:
    names = write_cases(tmp_path / "src", 3, layout)
    labels = convert_brats(tmp_path / "src", 137, num_processes=1).folder / "labelsTr"
    convert_back(labels, tmp_path / "out", layout, num_processes=1)
    suffix = "_seg" if layout == "brats2021" else "-seg"
    for name in names:
        np.testing.assert_array_equal(
            array_of(tmp_path / "out" / f"{name}.nii.gz"), array_of(tmp_path / "src" / name / f"{name}{suffix}.nii.gz")
        )


def test_all_bad_files_are_listed_and_nothing_is_written(tmp_path: Path) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 4])
    _prediction(tmp_path / "in" / "b.nii.gz", [0, 1])
    (tmp_path / "in" / "c.nii.gz").write_bytes(b"no image")
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its lines are looked at below)
        convert_back(tmp_path / "in", tmp_path / "out", "brats2021", num_processes=1)
    head, first, second = str(error.value).splitlines()
    assert head == "2 of 3 file(s) are bad; nothing has been written."
    assert first == (
        f"  {tmp_path / 'in' / 'a.nii.gz'}: unexpected label value(s) 4; predictions that can be written as brats2021 "
        f"have 0, 1, 2, 3"
    )
    assert second.startswith(f"  {tmp_path / 'in' / 'c.nii.gz'} cannot be read")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_refusals(tmp_path: Path) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 1])
    convert_back(tmp_path / "in", tmp_path / "out", "brats2021", num_processes=1)
    with pytest.raises(ValueError, match=r"such as a\.nii\.gz\. Give --overwrite"):
        convert_back(tmp_path / "in", tmp_path / "out", "brats2021", num_processes=1)
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 3])
    convert_back(tmp_path / "in", tmp_path / "out", "brats2023", overwrite=True, num_processes=1)
    assert array_of(tmp_path / "out" / "a.nii.gz").ravel().tolist() == [0, 3]
    with pytest.raises(ValueError, match="would convert twice"):
        convert_back(tmp_path / "in", tmp_path / "in", "brats2021")
    with pytest.raises(ValueError, match="Unknown label convention 'brats2020'"):
        convert_back(tmp_path / "in", tmp_path / "out", "brats2020")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert_back(tmp_path / "none", tmp_path / "out", "brats2021")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No \.nii\.gz or \.nii file"):
        convert_back(tmp_path / "empty", tmp_path / "out", "brats2021")
    with pytest.raises(ValueError, match=r"\(-np\) must be 0 \(this process\) or more, got -1"):
        convert_back(tmp_path / "in", tmp_path / "out2", "brats2021", num_processes=-1)
    written = convert_back(tmp_path / "in", tmp_path / "out2", "brats2021", num_processes=0)  # in this process
    assert [path.name for path in written] == ["a.nii.gz"]


def test_converting_twice_is_refused_and_so_is_scoring_what_was_converted(tmp_path: Path) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 1, 2, 3])
    convert_back(tmp_path / "in", tmp_path / "t1", "brats2023", num_processes=0)
    with pytest.raises(ValueError, match=r"t1 have the values of brats2023 \(mgml_labels\.json.*not nnU-Net's"):
        convert_back(tmp_path / "t1", tmp_path / "twice", "brats2023", num_processes=0)
    assert not (tmp_path / "twice").exists()
    with pytest.raises(ValueError, match=r"values of brats2023.*scoring by dataset\.json needs"):
        prediction_folders({"t1": tmp_path / "t1"}, ("t1", "t2"))
    with pytest.raises(ValueError, match=r"values of brats2023.*scoring by dataset\.json needs"):
        find_references(tmp_path / "t1", ".nii.gz")
    (tmp_path / "t1" / MARK_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"mgml_labels\.json must hold"):
        find_references(tmp_path / "t1", ".nii.gz")


def test_one_folder_has_one_convention(tmp_path: Path) -> None:
    for name in "ab":
        _prediction(tmp_path / "in" / f"{name}.nii.gz", [0, 1, 3])
    convert_back(tmp_path / "in", tmp_path / "out", "brats2023", num_processes=0)
    (tmp_path / "in" / "b.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"values of brats2023 that would stay, such as b\.nii\.gz"):
        convert_back(tmp_path / "in", tmp_path / "out", "brats2021", overwrite=True, num_processes=0)
    convert_back(tmp_path / "in", tmp_path / "out", "brats2023", overwrite=True, num_processes=0)
    assert marked(tmp_path / "out") == "brats2023"


def test_values_of_2021_are_not_taken_for_a_cavity(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _prediction(source / "a.nii.gz", [0, 1, 2, 4])
    with pytest.raises(ValueError, match=r"value 4, nnU-Net's resection cavity, but none has 3.*2021"):
        convert_back(source, tmp_path / "out", "brats2023", num_processes=0)
    assert not (tmp_path / "out").exists()
    for with_cavity in (False, True):
        labels, order = dataset_labels(with_cavity)
        (source / "dataset.json").write_text(json.dumps({"labels": labels, "regions_class_order": order}))
        if not with_cavity:
            with pytest.raises(ValueError, match=r"which its dataset\.json does not have"):
                convert_back(source, tmp_path / "out", "brats2023", num_processes=0)
    convert_back(source, tmp_path / "out", "brats2023", num_processes=0)
    assert array_of(tmp_path / "out" / "a.nii.gz").ravel().tolist() == [0, 2, 1, 4]


def _described(source: Path, labels: object, order: object = None) -> Path:
    content = {"labels": labels} if order is None else {"labels": labels, "regions_class_order": order}
    (source / "dataset.json").write_text(json.dumps(content))
    return source


def test_labels_of_another_numbering_are_told_by_their_names(tmp_path: Path) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 1, 2, 3])
    for number, (labels, expected) in enumerate(
        (
            ({"background": 0, "necrosis": 1, "edema": 2, "enhancing": 3}, [0, 1, 2, 4]),
            ({"background": 0, "Enhancing_Tumour": 1, "NCR/NET": [2], "oedema": 3, "ignore": 4}, [0, 4, 1, 2]),
        )
    ):
        _described(tmp_path / "in", labels)
        out = tmp_path / f"out{number}"
        convert_back(tmp_path / "in", out, "brats2021", num_processes=0)
        assert array_of(out / "a.nii.gz").ravel().tolist() == expected
    _described(tmp_path / "in", {"background": 0, "necrosis": 1, "edema": 2})
    with pytest.raises(ValueError, match=r"unexpected label value\(s\) 3; its dataset\.json has 0, 1, 2"):
        convert_back(tmp_path / "in", tmp_path / "out", "brats2021", num_processes=0)


def test_regions_of_nnunets_own_conversion_are_ours(tmp_path: Path) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 1, 2, 3])
    regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    convert_back(_described(tmp_path / "in", regions, [1, 2, 3]), tmp_path / "out", "brats2021", num_processes=0)
    assert array_of(tmp_path / "out" / "a.nii.gz").ravel().tolist() == [0, 2, 1, 4]


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ({"background": 0, "label_1": 1, "label_2": 2, "label_4": 3}, None, "the label 'label 1' is not known"),
        ({"background": 0, "core": 1, "edema": 2}, None, "the label 'core' is not known"),
        ({"background": 0, "ncr": 1, "net": 2}, None, "the label 'net' is there twice"),
        ({"edema": 0, "necrosis": 1}, None, "background is not 0"),
        ({"background": 0, "whole_tumor": [1, 2, 3]}, None, r"the regions are whole tumor \[1, 2, 3\]"),
        (
            {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [1, 3], "enhancing_tumor": 3},
            [1, 2, 3],
            r"tumor core \[1, 3\]",
        ),
        ({**dataset_labels(with_cavity=False)[0]}, [2, 1, 3], r"the regions are"),
    ],
)
def test_labels_that_nobody_can_tell(tmp_path: Path, labels: object, order: object, message: str) -> None:
    _prediction(tmp_path / "in" / "a.nii.gz", [0, 1, 2])
    _described(tmp_path / "in", labels, order)
    with pytest.raises(ValueError, match=rf"dataset\.json says .*{message}.*Expected are .*1 edema"):
        convert_back(tmp_path / "in", tmp_path / "out", "brats2021", num_processes=0)
    assert not (tmp_path / "out").exists()


def test_predictions_without_a_mark_are_not_mixed_with(tmp_path: Path) -> None:
    for name in ("in/a.nii.gz", "old/a.nii.gz", "old/b.nii.gz"):
        _prediction(tmp_path / name, [0, 3])
    with pytest.raises(ValueError, match=r"old holds label maps with unknown values .* would stay, such as b\.nii\.gz"):
        convert_back(tmp_path / "in", tmp_path / "old", "brats2021", overwrite=True, num_processes=0)
    assert marked(tmp_path / "old") is None
    assert array_of(tmp_path / "old" / "a.nii.gz").ravel().tolist() == [0, 3]
