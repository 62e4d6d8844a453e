"""Conversion of BraTS folders: what is written. What is refused is in test_conversion_refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conversion_cases import SHAPE, array_of, rewrite, tree, with_array, write_cases

from nnunetv2_mgml.dataset_conversion.convert import ConversionSummary, convert_brats
from nnunetv2_mgml.modalities import channel_names

ORDER = {"brats2021": ("_t1", "_t1ce", "_t2", "_flair", "_seg"), "brats2023": ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")}


def _convert(source: Path, **options: object) -> ConversionSummary:
    return convert_brats(source, 137, num_processes=1, **options)


@pytest.mark.parametrize("layout", ["brats2021", "brats2023"])
def test_writes_a_dataset(nnunet_folders: Path, tmp_path: Path, layout: str) -> None:
    names = write_cases(tmp_path / "src", 3, layout)
    summary = _convert(tmp_path / "src", name="Tiny")
    folder = nnunet_folders / "raw" / "Dataset137_Tiny"
    assert summary.folder == folder
    assert (summary.num_training, summary.num_held_out, summary.num_unlabelled) == (3, 0, 0)
    assert summary.conventions == {layout: 3}
    assert set(summary.labels) <= {0, 1, 2, 3}
    images = [f"imagesTr/{name}_{i:04d}.nii.gz" for name in names for i in range(4)]
    assert tree(folder) == sorted(
        ["dataset.json", "imagesTr", "labelsTr", *images, *(f"labelsTr/{name}.nii.gz" for name in names)]
    )
    values = {0: 0, 2: 1, 1: 2, (4 if layout == "brats2021" else 3): 3}
    for name in names:
        source = tmp_path / "src" / name
        for i, suffix in enumerate(ORDER[layout][:4]):
            written = folder / "imagesTr" / f"{name}_{i:04d}.nii.gz"
            assert written.read_bytes() == (source / f"{name}{suffix}.nii.gz").read_bytes()
            assert not written.is_symlink()
        label = sitk.ReadImage(str(folder / "labelsTr" / f"{name}.nii.gz"))
        assert label.GetPixelID() == sitk.sitkUInt8
        assert label.GetSpacing() == pytest.approx((6, 5, 4))
        original = array_of(source / f"{name}{ORDER[layout][4]}.nii.gz")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(label), np.vectorize(values.get)(original))
    description = json.loads((folder / "dataset.json").read_text())
    assert channel_names(description) == ("t1", "t1ce", "t2", "flair")
    assert list(description["channel_names"].values()) == ["T1", "T1ce", "T2", "Flair"]
    assert description["labels"] == {
        "background": 0,
        "whole_tumor": [1, 2, 3],
        "tumor_core": [2, 3],
        "enhancing_tumor": [3],
    }
    assert description["regions_class_order"] == [1, 2, 3]
    assert description["numTraining"] == 3
    assert description["file_ending"] == ".nii.gz"


def test_mixed_editions_in_one_folder(nnunet_folders: Path, tmp_path: Path) -> None:
    """4 of a 2021 case and 3 of a 2023 case are the same tissue."""
    [old] = write_cases(tmp_path / "src" / "a", 1, "brats2021", first=1)
    [new] = write_cases(tmp_path / "src" / "b", 1, "brats2023", first=1)
    summary = _convert(tmp_path / "src")
    assert summary.conventions == {"brats2021": 1, "brats2023": 1}
    assert any("two label conventions" in note for note in summary.notes)
    labels = summary.folder / "labelsTr"
    first = array_of(labels / f"{old}.nii.gz")
    assert {0, 1, 2, 3} == set(np.unique(first))
    np.testing.assert_array_equal(first, array_of(labels / f"{new}.nii.gz"))


def test_resection_cavity(nnunet_folders: Path, tmp_path: Path) -> None:
    [name] = write_cases(tmp_path / "src", 1, "brats2023")
    path = tmp_path / "src" / name / f"{name}-seg.nii.gz"

    def add_cavity(image: sitk.Image) -> sitk.Image:
        array = sitk.GetArrayFromImage(image).astype(np.float32)
        array[0, 0, :3] = 4
        return with_array(image, array)

    rewrite(path, add_cavity)
    summary = _convert(tmp_path / "src")
    assert 4 in summary.labels
    description = json.loads((summary.folder / "dataset.json").read_text())
    assert description["labels"]["resection_cavity"] == [4]
    assert description["regions_class_order"] == [1, 2, 3, 4]


def test_four_without_three_is_not_guessed(nnunet_folders: Path, tmp_path: Path) -> None:
    """Label values of 2021 behind names of 2023: enhancing tumour would become resection cavity."""
    [name] = write_cases(tmp_path / "src", 1, "brats2023", first=1)
    rewrite(
        tmp_path / "src" / name / f"{name}-seg.nii.gz",
        lambda image: with_array(image, np.where((a := sitk.GetArrayFromImage(image)) == 3, np.uint8(4), a)),
    )
    with pytest.raises(ValueError, match="--label_convention brats2021"):
        _convert(tmp_path / "src")
    assert tree(nnunet_folders / "raw") == []
    assert 3 in _convert(tmp_path / "src", label_convention="brats2021").labels
    assert 4 in _convert(tmp_path / "src", label_convention="brats2023", overwrite=True).labels


def _rename(folder: Path, name: str) -> Path:
    """Give a case another name, in its folder and all its files."""
    new = folder.with_name(name)
    new.mkdir()
    for path in folder.iterdir():
        path.rename(new / path.name.replace(folder.name, name))
    folder.rmdir()
    return new


@pytest.mark.parametrize("convention", ["auto", "brats2023"])
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("BraTS-GLI-00003-000", False),
        ("BraTS-GLI-00003-101", True),
        ("BraTS-SSA-00003-000", False),
        ("BraTS-MET-00003-000", True),
    ],
)
def test_four_is_judged_case_by_case(
    nnunet_folders: Path, tmp_path: Path, convention: str, name: str, allowed: bool
) -> None:
    """One case with 4 among others with 3, which a look at the whole data set takes for a resection cavity."""
    names = write_cases(tmp_path / "src", 3, "brats2023", first=1)
    for number, old in enumerate(names[:2]):
        _rename(tmp_path / "src" / old, f"BraTS-GLI-0000{number}-000")
    new = _rename(tmp_path / "src" / names[2], name)

    def cavity(image: sitk.Image) -> sitk.Image:
        array = sitk.GetArrayFromImage(image)
        array[0, 0, :3] = 4
        return with_array(image, array)

    rewrite(new / f"{name}-seg.nii.gz", cavity)
    if allowed:
        assert 4 in _convert(tmp_path / "src", label_convention=convention).labels
        return
    with pytest.raises(ValueError, match="1 of 3 case") as error:
        _convert(tmp_path / "src", label_convention=convention)
    assert f"{name}: has the value 4, the resection cavity since 2024, but a case of BraTS2023" in str(error.value)
    assert "--label_convention brats2021" in str(error.value)


def test_paediatric_cases_of_later_years_are_refused(nnunet_folders: Path, tmp_path: Path) -> None:
    [name] = write_cases(tmp_path / "src", 1, "brats2023", first=1)
    new = _rename(tmp_path / "src" / name, "BraTS-PED-00003-000")
    rewrite(
        new / f"{new.name}-seg.nii.gz",
        lambda image: with_array(image, np.where((a := sitk.GetArrayFromImage(image)) == 2, np.uint8(4), a)),
    )
    with pytest.raises(ValueError, match="BraTS-PED-00003-000: has the value 4"):
        _convert(tmp_path / "src", label_convention="brats2023")


def test_three_behind_names_of_2021_gets_a_hint(nnunet_folders: Path, tmp_path: Path) -> None:
    [name] = write_cases(tmp_path / "src", 1, first=1)
    rewrite(
        tmp_path / "src" / name / f"{name}_seg.nii.gz",
        lambda image: with_array(image, np.where((a := sitk.GetArrayFromImage(image)) == 4, np.uint8(3), a)),
    )
    with pytest.raises(ValueError, match=r"unexpected label value\(s\) 3; .*give --label_convention brats2023"):
        _convert(tmp_path / "src")


def test_paediatric_labels_are_not_guessed(nnunet_folders: Path, tmp_path: Path) -> None:
    [name] = write_cases(tmp_path / "a", 1, "brats2023")
    new = tmp_path / "src" / "BraTS-PED-00001-000"
    new.mkdir(parents=True)
    for path in (tmp_path / "a" / name).iterdir():
        path.rename(new / path.name.replace(name, new.name))
    with pytest.raises(ValueError, match="paediatric"):
        _convert(tmp_path / "src")
    assert _convert(tmp_path / "src", label_convention="brats2023").editions == {"BraTS2023-PED": 1}


def test_links(nnunet_folders: Path, tmp_path: Path) -> None:
    """Links for compressed images; plain NIfTI is compressed, labels are always files."""
    names = write_cases(tmp_path / "src", 2)
    t1 = tmp_path / "src" / names[0] / f"{names[0]}_t1.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(t1)), str(t1.with_suffix("")))
    expected = array_of(t1)
    t1.unlink()
    folder = _convert(tmp_path / "src", link=True).folder
    for name in names:
        for channel, suffix in enumerate(ORDER["brats2021"][:4]):
            image = folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
            if (name, channel) == (names[0], 0):
                assert not image.is_symlink()
                np.testing.assert_array_equal(array_of(image), expected)
            else:
                assert image.readlink() == (tmp_path / "src" / name / f"{name}{suffix}.nii.gz").resolve()
        assert not (folder / "labelsTr" / f"{name}.nii.gz").is_symlink()


def test_cases_without_segmentation_go_to_images_ts(nnunet_folders: Path, tmp_path: Path) -> None:
    names = write_cases(tmp_path / "src", 3)
    (tmp_path / "src" / names[1] / f"{names[1]}_seg.nii.gz").unlink()
    summary = _convert(tmp_path / "src")
    assert (summary.num_training, summary.num_unlabelled) == (2, 1)
    assert {p.name[: -len("_0000.nii.gz")] for p in (summary.folder / "imagesTs").iterdir()} == {names[1]}
    assert not (summary.folder / "labelsTs").exists()
    for name in names:
        (tmp_path / "src" / name / f"{name}_seg.nii.gz").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"None of the 3 case\(s\) .* has a segmentation"):
        convert_brats(tmp_path / "src", 138)


def test_missing_sequences(nnunet_folders: Path, tmp_path: Path) -> None:
    """Absent file and file that is zero all over are the same thing."""
    names = write_cases(tmp_path / "src", 3)
    (tmp_path / "src" / names[0] / f"{names[0]}_t1.nii.gz").unlink()
    rewrite(tmp_path / "src" / names[1] / f"{names[1]}_t2.nii.gz", lambda image: image * 0)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its lines are looked at below)
        _convert(tmp_path / "src")
    assert str(error.value).splitlines() == [
        "2 of 3 case(s) are bad; nothing has been written. --skip_bad converts the others.",
        f"  {names[0]}: no file for t1 (allow with --missing_ok)",
        f"  {names[1]}: zero all over: t2 (allow with --missing_ok)",
    ]
    assert tree(nnunet_folders / "raw") == []
    summary = _convert(tmp_path / "src", missing_ok=True)
    expected = {names[0]: ["t1"], names[1]: ["t2"]}
    assert summary.missing == expected
    assert json.loads((summary.folder / "missing_modalities.json").read_text()) == expected
    for name, channel in ((names[0], 0), (names[1], 2)):
        empty = sitk.ReadImage(str(summary.folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz"))
        other = sitk.ReadImage(str(summary.folder / "imagesTr" / f"{name}_0001.nii.gz"))
        assert not sitk.GetArrayFromImage(empty).any()
        assert empty.GetSize() == other.GetSize() == SHAPE[::-1]
        for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(empty, geometry)() == pytest.approx(getattr(other, geometry)())


def test_case_without_any_content_is_always_bad(nnunet_folders: Path, tmp_path: Path) -> None:
    names = write_cases(tmp_path / "src", 2)
    for suffix in ORDER["brats2021"][:4]:
        rewrite(tmp_path / "src" / names[0] / f"{names[0]}{suffix}.nii.gz", lambda image: image * 0)
    with pytest.raises(ValueError, match=f"{names[0]}: no sequence with any content"):
        _convert(tmp_path / "src", missing_ok=True)


def test_tiny_differences_of_geometry_are_evened_out(nnunet_folders: Path, tmp_path: Path) -> None:
    [name] = write_cases(tmp_path / "src", 1)

    def shifted(image: sitk.Image) -> sitk.Image:
        image.SetOrigin([o + 4e-4 for o in image.GetOrigin()])
        image.SetSpacing([s + 2e-4 for s in image.GetSpacing()])
        return image

    rewrite(tmp_path / "src" / name / f"{name}_t2.nii.gz", shifted)
    folder = _convert(tmp_path / "src", link=True).folder / "imagesTr"
    t1, t2 = (sitk.ReadImage(str(folder / f"{name}_{i:04d}.nii.gz")) for i in (0, 2))
    assert t2.GetOrigin() == pytest.approx(t1.GetOrigin(), abs=1e-6)
    assert t2.GetSpacing() == pytest.approx(t1.GetSpacing(), abs=1e-6)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(t2), array_of(tmp_path / "src" / name / f"{name}_t2.nii.gz"))


def test_split_holds_test_cases_out(nnunet_folders: Path, tmp_path: Path) -> None:
    names = write_cases(tmp_path / "src", 10)
    summary = _convert(tmp_path / "src", split="paper2020", seed=3)
    assert summary.split is not None
    assert (len(summary.split.train), len(summary.split.val), len(summary.split.test)) == (6, 1, 3)
    assert (summary.num_training, summary.num_held_out) == (7, 3)
    held_out = set(summary.split.test)
    folder = summary.folder
    assert {p.name[:-7] for p in (folder / "labelsTs").iterdir()} == held_out
    assert {p.name[:-12] for p in (folder / "imagesTs").iterdir()} == held_out
    assert {p.name[:-7] for p in (folder / "labelsTr").iterdir()} == set(names) - held_out
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 7
    preprocessed = nnunet_folders / "preprocessed" / folder.name
    assert summary.splits_file == preprocessed / "splits_final.json"
    assert json.loads(summary.splits_file.read_text()) == [
        {"train": list(summary.split.train), "val": list(summary.split.val)}
    ]
    assert json.loads((preprocessed / "test_cases.json").read_text()) == sorted(held_out)
    with pytest.raises(ValueError, match="not both"):
        _convert(tmp_path / "src", overwrite=True, split="7:1:2", split_files=["a", "b"])


def test_split_lists(nnunet_folders: Path, tmp_path: Path) -> None:
    """Cases in no list are left out; a bad case leaves the split."""
    names = write_cases(tmp_path / "src", 6)
    for part, chosen in (("train", names[:3]), ("val", names[3:4]), ("test", names[4:5])):
        (tmp_path / f"{part}.txt").write_text("\n".join(f"HGG_{name}_vol.npy" for name in chosen))
    files = [tmp_path / f"{part}.txt" for part in ("train", "val", "test")]
    summary = _convert(tmp_path / "src", split_files=files)
    assert summary.left_out == (names[5],)
    assert not list(summary.folder.rglob(f"{names[5]}*"))
    (tmp_path / "src" / names[0] / f"{names[0]}_t1.nii.gz").write_bytes(b"")
    summary = _convert(tmp_path / "src", split_files=files, skip_bad=True, overwrite=True)
    assert summary.split is not None
    assert summary.split.train == tuple(names[1:3])
    (tmp_path / "src" / names[3] / f"{names[3]}_t1.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="the split has 2 training, 0 validation"):
        _convert(tmp_path / "src", split_files=files, skip_bad=True, overwrite=True)


def test_split_needs_the_preprocessed_folder(
    nnunet_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cases(tmp_path / "src", 4)
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(ValueError, match="nnUNet_preprocessed is not set"):
        _convert(tmp_path / "src", split="7:1:2")
    assert tree(nnunet_folders / "raw") == []
    assert _convert(tmp_path / "src").num_training == 4
