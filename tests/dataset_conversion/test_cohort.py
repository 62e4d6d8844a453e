"""Conversion of cohorts in which modalities are absent: no placeholder is written, what is absent is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from cohort_cases import SHAPE, label, save, volume, write_raw
from conversion_cases import array_of, tree, write_cases

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.dataset_conversion.cohort import CohortRequest, convert_cohort
from nnunetv2_mgml.dataset_conversion.splits import published_lists
from nnunetv2_mgml.io.case_files import find_by_patterns

PATTERNS = {"ct": "*_ct.nii.gz", "t1": "*_t1.nii.gz", "flair": "*_fl.nii*"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four patients: a has all, b lacks t1, c has a placeholder for ct, d has no label."""
    folder = tmp_path / "src"
    for number, (case, names) in enumerate(
        {"a": ("ct", "t1", "fl"), "b": ("ct", "fl"), "c": ("ct", "t1"), "d": ("t1",)}.items()
    ):
        for c, name in enumerate(names):
            array = np.full(SHAPE, -1000, np.float32) if (case, name) == ("c", "ct") else volume(10 * number + c)
            save(array, folder / case / f"{case}_{name}.nii{'' if (case, name) == ('b', 'fl') else '.gz'}")
        if case != "d":
            save(label(255 if case == "a" else 128), folder / case / "lesion.nii.gz")
    return folder


def convert(source: Path, **changes):
    found = find_by_patterns(source, PATTERNS, "lesion.nii.gz")
    return convert_cohort(CohortRequest(found, 45, "Cohort", **{"num_processes": 1, **changes}))


def test_absent_modalities_get_no_file(nnunet_folders: Path, source: Path) -> None:
    summary = convert(source)
    assert summary.missing == {"b": ("t1",), "c": ("ct", "flair"), "d": ("ct", "flair")}
    assert tree(summary.folder) == [
        "dataset.json",
        "imagesTr",
        "imagesTr/a_0000.nii.gz",
        "imagesTr/a_0001.nii.gz",
        "imagesTr/a_0002.nii.gz",
        "imagesTr/b_0000.nii.gz",
        "imagesTr/b_0002.nii.gz",
        "imagesTr/c_0001.nii.gz",
        "imagesTs",
        "imagesTs/d_0001.nii.gz",
        "labelsTr",
        "labelsTr/a.nii.gz",
        "labelsTr/b.nii.gz",
        "labelsTr/c.nii.gz",
        "missing_modalities.json",
    ]
    description = (summary.folder / "dataset.json").read_text()  # a copy is in every model: it names no folder of ours
    assert str(source.parent) not in description
    assert f"from {source.name}" in description
    recorded = json.loads((summary.folder / "missing_modalities.json").read_text())
    assert recorded == {case: list(names) for case, names in summary.missing.items()}
    assert (summary.folder / "imagesTr/a_0001.nii.gz").read_bytes() == (source / "a/a_t1.nii.gz").read_bytes()
    assert np.array_equal(array_of(summary.folder / "imagesTr/b_0002.nii.gz"), array_of(source / "b/b_fl.nii"))
    description = json.loads((summary.folder / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "ct", "1": "t1", "2": "flair"}
    assert description["numTraining"] == 3


def test_label_values_become_consecutive(nnunet_folders: Path, source: Path) -> None:
    summary = convert(source)
    assert summary.labels == {"label_128": (128, 1), "label_255": (255, 2)}
    assert np.unique(array_of(summary.folder / "labelsTr/a.nii.gz")).tolist() == [0, 2]
    named = convert(source, labels={"core": 255, "edema": 128}, overwrite=True)
    assert np.unique(array_of(named.folder / "labelsTr/a.nii.gz")).tolist() == [0, 1]
    description = json.loads((named.folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "core": 1, "edema": 2}
    with pytest.raises(ValueError, match="The label maps also have 128; name every value"):
        convert(source, labels={"core": 255}, overwrite=True)


def test_ignore_gets_the_highest_value(nnunet_folders: Path, source: Path) -> None:
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    summary = convert(source, labels={"ignore": 255, "lesion": 128})
    description = json.loads((summary.folder / "dataset.json").read_text())
    assert description["labels"] == {"background": 0, "lesion": 1, "ignore": 2}
    assert LabelManager(description["labels"], None).ignore_label == 2
    assert np.unique(array_of(summary.folder / "labelsTr/a.nii.gz")).tolist() == [0, 2]


def test_splits_and_links(nnunet_folders: Path, source: Path) -> None:
    summary = convert(source, split="1:1:1", link=True)
    assert (summary.num_training, summary.num_test) == (2, 2)
    held_out = summary.split.test[0]
    assert (summary.folder / "labelsTs" / f"{held_out}.nii.gz").is_file()
    splits = json.loads((nnunet_folders / "preprocessed" / "Dataset045_Cohort" / "splits_final.json").read_text())
    assert splits == [{"train": list(summary.split.train), "val": list(summary.split.val)}]
    part = "Ts" if held_out == "a" else "Tr"
    assert (summary.folder / f"images{part}/a_0000.nii.gz").is_symlink()


@pytest.mark.parametrize("form", ["folders", "sheet"])
def test_sessions_of_a_patient_stay_together(nnunet_folders: Path, tmp_path: Path, form: str) -> None:
    """By the first of two folders, or by the sheet's column; the names alone tell no patient."""
    rows = ["case,t1,label,patient"]
    for number in range(8):
        patient, session = f"p{number // 2}", f"s{number % 2}"
        image = save(volume(number), tmp_path / "src" / patient / session / "t1.nii.gz")
        mask = save(label(), image.with_name("seg.nii.gz"))
        rows.append(f"{patient}_{session},{image},{mask},{patient}")
    (tmp_path / "src.csv").write_text("\n".join(rows))
    command = ["convert", form, str(tmp_path / f"src{'.csv' if form == 'sheet' else ''}"), "-d", "45", "-np", "0"]
    if form == "folders":
        command += ["--modalities", "t1=t1.nii.gz", "--label", "seg.nii.gz", "--case_folders", "2"]
    for seed in range(3):
        assert main([*command, "--split", "2:1:1", "--seed", str(seed), "--overwrite"]) == 0
        folder = nnunet_folders / "preprocessed" / "Dataset045_src"
        (fold,) = json.loads((folder / "splits_final.json").read_text())
        parts = [fold["train"], fold["val"], json.loads((folder / "test_cases.json").read_text())]
        assert [len(part) for part in parts] == [4, 2, 2]
        assert [len({case[:2] for case in part}) for part in parts] == [2, 1, 1]


def test_a_published_split_by_its_name(nnunet_folders: Path, tmp_path: Path) -> None:
    lists = published_lists("rfnet2020")
    cases = [read.splitlines()[1] for read in (path.read_text() for path in lists)]
    for number, case in enumerate(cases):
        save(volume(number), tmp_path / "src" / case / "t1.nii.gz")
        save(label(), tmp_path / "src" / case / "seg.nii.gz")
    found = find_by_patterns(tmp_path / "src", {"t1": "t1.nii.gz"}, "seg.nii.gz")
    with pytest.raises(ValueError, match=r"^366 name\(s\) in the split lists are no case of this data"):
        convert_cohort(CohortRequest(found, 45, "Cohort", split="rfnet2020", num_processes=0))


def test_a_split_from_earlier_is_told_of(nnunet_folders: Path, source: Path, capsys: Any) -> None:
    folder = nnunet_folders / "preprocessed" / "Dataset045_Cohort"
    assert convert(source, split="1:1:1").notes == ()
    both = f"{folder / 'splits_final.json'} and {folder / 'test_cases.json'}"
    (note,) = convert(source, overwrite=True).notes
    assert note == f"from earlier, and still in force: {both}; delete what does not fit, or give --split"
    (folder / "dataset.json").write_text("{}")
    (folder / "splits_final.json").unlink()
    patterns = [f"{name}={pattern}" for name, pattern in PATTERNS.items()]
    command = ["convert", "folders", str(source), "-d", "45", "--name", "Cohort", "--overwrite", "-np", "0"]
    assert main([*command, "--label", "lesion.nii.gz", "--modalities", *patterns]) == 0
    printed = capsys.readouterr().out
    assert f"Note: {folder} holds an earlier preprocessing; run nnUNetv2_plan_and_preprocess again\n" in printed
    assert f"Note: from earlier, and still in force: {folder / 'test_cases.json'}; delete" in printed


def test_bad_cases_are_named_and_nothing_is_written(nnunet_folders: Path, source: Path) -> None:
    save(volume(1, shape=(12, 14, 15)), source / "b" / "b_ct.nii.gz")
    save(label(shape=(12, 14, 16)), source / "c" / "lesion.nii.gz", spacing=(2.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="2 of 4 case") as caught:
        convert(source)
    text = str(caught.value)
    assert "b_fl.nii is not on the grid of b_ct.nii.gz: shape" in text
    assert "lesion.nii.gz is not on the grid of the images: spacing" in text
    assert tree(nnunet_folders / "raw") == []
    summary = convert(source, skip_bad=True)
    assert sorted(summary.skipped) == ["b", "c"]
    assert summary.num_training == 1


def test_a_case_that_is_called_like_a_file_is_named(nnunet_folders: Path, source: Path) -> None:
    """Before anything is written: ITK would write it under another name, and the disk would be blamed."""
    (source / "b").rename(source / "b.nii.gz")
    with pytest.raises(ValueError, match=r"b\.nii\.gz: its name ends with \.nii\.gz, as a file's does"):
        convert(source)
    assert tree(nnunet_folders / "raw") == []


def test_refusals(nnunet_folders: Path, source: Path) -> None:
    with pytest.raises(ValueError, match=r"No case of .* has a label map, so nothing can be trained"):
        convert_cohort(CohortRequest(find_by_patterns(source, PATTERNS), 45, "Cohort", num_processes=1))
    found = find_by_patterns(source, PATTERNS)
    found.cases, found.problems = found.cases[:1], {"b": ["2 files for ct: b.nii, b.nii.gz"]}
    with pytest.raises(ValueError, match=r"None of the 1 case.*so nothing can be trained.*\n1 more .*\n  b: 2 files"):
        convert_cohort(CohortRequest(found, 45, "Cohort", num_processes=1))
    convert(source)
    with pytest.raises(ValueError, match=r"exists\. Give --overwrite"):
        convert(source)
    for case in "abc":
        (source / case / "lesion.nii.gz").unlink()
        save(np.zeros(SHAPE, np.uint8), source / case / "lesion.nii.gz")
    with pytest.raises(ValueError, match="The label maps are empty in every case"):
        convert(source, overwrite=True)


def test_where_every_case_is_bad_that_is_what_is_said(nnunet_folders: Path, source: Path) -> None:
    for case in "abcd":
        for path in (source / case).glob(f"{case}_*"):
            save(volume(1), source / case / f"twice_{path.name.partition('.')[0]}.nii.gz")
    with pytest.raises(ValueError, match=r"^4 of 4 case\(s\) are bad; nothing") as caught:
        convert(source)
    assert "2 files for" in str(caught.value)
    assert "has a label map" not in str(caught.value)


def test_the_commands(nnunet_folders: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patterns = [f"{name}={pattern}" for name, pattern in PATTERNS.items()]
    command = ["convert", "folders", str(source), "-d", "45", "-np", "1", "--label", "lesion.nii.gz", "--modalities"]
    assert main([*command, *patterns]) == 0
    printed = capsys.readouterr().out
    assert "Labels: 128 label_128 -> 1, 255 label_255 -> 2" in printed
    assert "3 case(s) lack modalities: t1 in 1, ct in 2, flair in 2" in printed
    assert "nnUNetv2_plan_and_preprocess -d 45" in printed
    folders = nnunet_folders / "raw" / "Dataset045_src"
    rows = ["case,ct,t1,flair,label,site,patient"]
    for case, site in zip("abcd", "xxyy", strict=True):
        cells = [next((str(p) for p in (source / case).glob(PATTERNS[n])), "") for n in PATTERNS]
        mask = source / case / "lesion.nii.gz"
        rows.append(",".join([case, *cells, str(mask) if mask.exists() else "", site, f"Mr {site}"]))
    (tmp_path / "cohort.csv").write_text("\n".join(rows))
    assert main(["convert", "sheet", str(tmp_path / "cohort.csv"), "-d", "46", "-np", "1"]) == 0
    sheet = nnunet_folders / "raw" / "Dataset046_cohort"
    assert [name for name in tree(sheet) if name not in ("case_sites.json", "case_patients.json")] == tree(folders)
    kept = json.loads((sheet / "case_patients.json").read_text())
    assert kept == {"a": "0", "b": "0", "c": "1", "d": "1"}, "numbers, no names"
    assert json.loads((sheet / "case_sites.json").read_text()) == {"a": "x", "b": "x", "c": "y", "d": "y"}
    assert main(["convert", "folders", str(source), "-d", "47", "--modalities", "t1"]) == 2
    assert "Bad --modalities 't1'" in capsys.readouterr().err


def test_files_and_names_as_hospitals_have_them(
    nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every format among them, upper-case endings, spaces and umlauts, also in what the data set is named after."""
    source = tmp_path / "Köln (2020)"
    endings = {"Müller Anna": ".nii.gz", "p 2": ".nii", "p3": ".mha", "P4": ".nrrd", "P5": ".NII.GZ"}
    for number, (case, ending) in enumerate(endings.items()):
        saved = save(volume(number), source / case / f"{case}_t1{ending.lower()}")
        saved.rename(saved.with_name(f"{case}_{'T1' if ending.isupper() else 't1'}{ending}"))
        save(volume(9 + number), source / case / f"{case}_fl.nii.gz")
        save(label(), source / case / "lesion.mha")
    save(volume(20), source / "P5" / "P5_t2.nii.gz")
    command = ["convert", "folders", str(source), "-d", "49", "-np", "1", "--label", "lesion.*"]
    assert main([*command, "--modalities", "t1=*_t1.*", "flair=*_fl.nii.gz"]) == 0
    printed = capsys.readouterr().out
    assert "Every case has every modality" in printed
    assert "no pattern matches: 1 image(s), such as P5/P5_t2.nii.gz" in printed
    folder = nnunet_folders / "raw" / "Dataset049_Koln_2020"
    for number, case in enumerate(endings):
        assert np.array_equal(array_of(folder / "imagesTr" / f"{case}_0000.nii.gz"), volume(number))
        assert array_of(folder / "labelsTr" / f"{case}.nii.gz").any()


def test_record_of_an_existing_data_set(nnunet_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", {"a": ["t1"]})
    save(np.full(SHAPE, -1000, np.float32), folder / "imagesTr" / "b_0000.nii.gz")
    before = tree(folder)
    assert main(["convert", "raw", "-d", "45", "-np", "1"]) == 0
    assert "2 case(s) lack modalities: t1 in 1, ct in 1" in capsys.readouterr().out
    assert json.loads((folder / "missing_modalities.json").read_text()) == {"a": ["t1"], "b": ["ct"]}
    assert tree(folder) == sorted([*before, "missing_modalities.json"])
    write_raw(nnunet_folders / "raw" / "Dataset046_Whole")
    assert main(["convert", "raw", "-d", "46", "-np", "1"]) == 0
    assert "No case lacks a modality" in capsys.readouterr().out


def test_decathlon(nnunet_folders: Path, tmp_path: Path) -> None:
    """Four axes in one file; a volume of zeros is an absent modality."""
    source = tmp_path / "Task01_Tiny"
    for index, case in enumerate(("c1", "c2")):
        volumes = [volume(index), np.zeros(SHAPE, np.float32) if case == "c2" else volume(index + 5)]
        image = sitk.JoinSeries([sitk.GetImageFromArray(v) for v in volumes])
        (source / "imagesTr").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(source / "imagesTr" / f"{case}.nii.gz"))
        save(label(), source / "labelsTr" / f"{case}.nii.gz")
    content = {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema"}}
    (source / "dataset.json").write_text(json.dumps(content))
    assert main(["convert", "msd", str(source), "-d", "48", "-np", "1"]) == 0
    folder = nnunet_folders / "raw" / "Dataset048_Task01_Tiny"
    assert json.loads((folder / "missing_modalities.json").read_text()) == {"c2": ["T1w"]}
    assert np.array_equal(array_of(folder / "imagesTr" / "c1_0001.nii.gz"), volume(5))
    assert not (folder / "imagesTr" / "c2_0001.nii.gz").exists()
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "edema": 1}


@pytest.mark.parametrize(
    ("modality", "labels", "volumes", "message"),
    [
        ({"0": "MRI", "1": "MRI"}, None, 2, "must give each modality a name of its own; found MRI, MRI."),
        ({"0": "T1", "1": "T1w"}, None, 2, "must give each modality a name of its own; found T1, T1w."),
        (
            {"0": "T1", "2": "T2"},
            None,
            3,
            "must number its modalities 0 to 1, in the order of the volumes; found 0, 2.",
        ),
        (
            {"a": "T1", "b": "T2"},
            None,
            2,
            "must number its modalities 0 to 1, in the order of the volumes; found a, b.",
        ),
        ({"0": "T1", "1": "T2"}, None, 4, "c1.nii.gz holds 4 volumes, but dataset.json names 2 modalities"),
        (
            {"0": "T1", "1": "T2"},
            {"background": 0, "x": 1},
            2,
            'must map each label value to a name of its own, {"0": ',
        ),
    ],
)
def test_a_decathlon_that_is_not_what_it_says(
    nnunet_folders: Path, tmp_path: Path, capsys: Any, modality: Any, labels: Any, volumes: int, message: str
) -> None:
    source = tmp_path / "Task01_Tiny"
    (source / "imagesTr").mkdir(parents=True)
    image = sitk.JoinSeries([sitk.GetImageFromArray(volume(number)) for number in range(volumes)])
    sitk.WriteImage(image, str(source / "imagesTr" / "c1.nii.gz"))
    save(label(), source / "labelsTr" / "c1.nii.gz")
    content = {"modality": modality, "labels": labels or {"0": "background", "1": "x"}}
    (source / "dataset.json").write_text(json.dumps(content))
    assert main(["convert", "msd", str(source), "-d", "48", "-np", "0"]) == 2
    assert message in capsys.readouterr().err
    assert tree(nnunet_folders / "raw") == []


def test_images_for_prediction(nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A challenge's validation folder: no segmentation, one case without FLAIR."""
    for case in write_cases(tmp_path / "val", 2, "brats2023"):
        (tmp_path / "val" / case / f"{case}-seg.nii.gz").unlink()
    (tmp_path / "val" / case / f"{case}-t2f.nii.gz").unlink()
    assert main(["convert", "images", str(tmp_path / "val"), str(tmp_path / "out"), "-np", "1"]) == 0
    assert "1 case(s) lack modalities: flair in 1" in capsys.readouterr().out
    assert len(tree(tmp_path / "out")) == 7
    assert f"{case}_0003.nii.gz" not in tree(tmp_path / "out")
    assert main(["convert", "images", str(tmp_path / "val"), str(tmp_path / "out"), "-np", "1"]) == 2
    assert "exists. Give --overwrite" in capsys.readouterr().err
    write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", channels=("FLAIR", "T1"))
    command = ["convert", "images", str(tmp_path / "val"), str(tmp_path / "like"), "--like", "45", "-np", "1"]
    assert main(command) == 0
    written = array_of(tmp_path / "like" / f"{case}_0001.nii.gz")
    assert np.array_equal(written, array_of(tmp_path / "val" / case / f"{case}-t1n.nii.gz"))
    assert f"{case}_0000.nii.gz" not in tree(tmp_path / "like")


def test_a_fourth_axis_of_one_volume(nnunet_folders: Path, source: Path) -> None:
    """As some converters of DICOM write it; of several volumes in one file it is said what to do."""
    for old, new in (("b_fl.nii", "b_fl.nii.nrrd"), ("lesion.nii.gz", "lesion.nrrd")):
        image = sitk.ReadImage(str(source / "b" / old))
        (source / "b" / old).unlink()
        sitk.WriteImage(sitk.JoinSeries([image]), str(source / "b" / new))
        assert sitk.ReadImage(str(source / "b" / new)).GetDimension() == 4
    found = find_by_patterns(source, PATTERNS, "lesion.n*")
    folder = convert_cohort(CohortRequest(found, 45, "Cohort", num_processes=1)).folder
    for file in ("imagesTr/b_0002.nii.gz", "labelsTr/b.nii.gz"):
        assert sitk.ReadImage(str(folder / file)).GetSize() == SHAPE[::-1]
    image = sitk.ReadImage(str(source / "c" / "c_t1.nii.gz"))
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(source / "c" / "c_t1.nii.gz"))
    with pytest.raises(ValueError, match=r"c_t1.nii.gz holds 2 volumes; a modality has one. Split it"):
        convert(source, overwrite=True)


def test_images_of_a_sheet(nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns that are no modality are in the way, unless a data set or the user says which are."""
    save(volume(1), tmp_path / "a.mha")
    save(volume(2), tmp_path / "b.nii")
    sheet = tmp_path / "cases.csv"
    sheet.write_text("case,age,FLAIR,label\na,61,a.mha,NA\nb,48,b.nii,\n")
    command = ["convert", "images", str(sheet), str(tmp_path / "out"), "-np", "1"]
    assert main(command) == 2
    assert "no cell of age is a file" in capsys.readouterr().err
    assert main([*command, "--modalities", "flair"]) == 0
    assert tree(tmp_path / "out") == ["a_0000.nii.gz", "b_0000.nii.gz"]
    write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", channels=("T1", "FLAIR"))
    assert main([*command, "--like", "45", "--overwrite"]) == 0
    assert tree(tmp_path / "out") == ["a_0001.nii.gz", "b_0001.nii.gz"]
    (tmp_path / "b.nii").write_bytes(b"")
    capsys.readouterr()
    assert main([*command, "--like", "45", "--overwrite"]) == 2
    assert "1 of 2 case(s) are bad" in capsys.readouterr().err
    assert main([*command, "--like", "45", "--overwrite", "--skip_bad"]) == 1
    assert "Skipped 1 bad case(s):\n  b: " in capsys.readouterr().out
    assert tree(tmp_path / "out") == ["a_0001.nii.gz"]


@pytest.mark.parametrize("wrong", ["flare", "dwi"])
def test_a_modality_that_the_data_set_does_not_have_is_not_dropped_without_a_word(
    nnunet_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", channels=("T1", "FLAIR"))
    for number, name in enumerate(("t1", wrong)):
        save(volume(number), tmp_path / "val" / f"a_{name}.nii.gz")
    (tmp_path / "cases.csv").write_text(f"case,T1,{wrong}\na,val/a_t1.nii.gz,val/a_{wrong}.nii.gz\n")
    end = [str(tmp_path / "out"), "--like", "45", "-np", "1"]
    folder, sheet = (["convert", "images", str(tmp_path / name), *end] for name in ("val", "cases.csv"))
    for command in (
        [*folder, "--case_folders", "0", "--modalities", "t1=*_t1.nii.gz", f"{wrong}=*_{wrong}.nii.gz"],
        [*sheet, "--modalities", "T1", wrong],
    ):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert f"--modalities names {wrong}, which the data set does not have; it has t1, flair" in told
        assert not (tmp_path / "out").exists()
    assert main(sheet) == 0  # nobody named it
    assert f"Not of 45 and left out: {wrong}\n" in capsys.readouterr().out
    assert tree(tmp_path / "out") == ["a_0000.nii.gz"]


def test_brats_with_some_of_its_sequences(nnunet_folders: Path, tmp_path: Path, capsys: Any) -> None:
    cases = write_cases(tmp_path / "src", 3)
    (tmp_path / "src" / cases[0] / f"{cases[0]}_t2.nii.gz").unlink()
    command = ["convert", "brats", str(tmp_path / "src"), "-d", "137", "-np", "1", "--subset_of", "flair", "T1Gd"]
    assert main([*command, "foo"]) == 2
    assert main(command) == 0
    assert "error: Unknown modality 'foo'. BraTS has: t1 (also" in capsys.readouterr().err
    (folder,) = (nnunet_folders / "raw").glob("Dataset137_*")
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "T1ce", "1": "Flair"}
    first = array_of(folder / "imagesTr" / f"{cases[0]}_0001.nii.gz")
    assert np.array_equal(first, array_of(tmp_path / "src" / cases[0] / f"{cases[0]}_flair.nii.gz"))
    assert len(list((folder / "imagesTr").iterdir())) == 6
    assert not (folder / "missing_modalities.json").exists()


def test_a_task_of_the_decathlon_without_images(nnunet_folders: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "Task02").mkdir()
    (tmp_path / "Task02" / "dataset.json").write_text('{"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "none"}}')
    assert main(["convert", "msd", str(tmp_path / "Task02"), "-d", "49"]) == 2
    assert "imagesTr holds no NIfTI file." in capsys.readouterr().err


def test_images_are_not_written_over_their_source(tmp_path: Path, capsys: Any) -> None:
    write_cases(tmp_path / "out" / "val", 1, "brats2023")
    before = tree(tmp_path)
    assert main(["convert", "images", str(tmp_path / "out" / "val"), str(tmp_path / "out"), "--overwrite"]) == 2
    assert "out holds the source" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_files_of_a_sheet_that_would_be_replaced(nnunet_folders: Path, tmp_path: Path, capsys: Any) -> None:
    """The sheet lies elsewhere, but what it names lies in the folder to write to, itself or by a link."""
    raw = write_raw(nnunet_folders / "raw" / "Dataset045_ms")
    sheet = tmp_path / "cases.csv"
    (tmp_path / "by_link").symlink_to(raw / "imagesTr")
    rows = [f"{case},{{0}}/{case}_0001.nii.gz,{{0}}/{case}_0002.nii.gz,{raw}/labelsTr/{case}.nii.gz" for case in "ab"]
    command = ["convert", "sheet", str(sheet), "-d", "45", "--name", "ms", "--overwrite", "--link", "-np", "0"]
    before = tree(tmp_path)
    for folder in (raw / "imagesTr", tmp_path / "by_link"):
        sheet.write_text("\n".join(["case,t1,flair,label", *rows]).format(folder))
        assert main(command) == 2
        assert f"6 file(s) to convert lie in {raw}, which would be replaced, such as" in capsys.readouterr().err
        sheet.write_text("\n".join(["case,t1,flair", f"a,{folder}/a_0001.nii.gz,", f"b,{folder}/b_0001.nii.gz,gone"]))
        images = ["convert", "images", str(sheet), str(raw / "imagesTr"), "--overwrite", "--skip_bad", "-np", "0"]
        assert main(images) == 2
        assert f"file(s) to convert lie in {raw / 'imagesTr'}, which would be" in capsys.readouterr().err
    sheet.unlink()
    assert tree(tmp_path) == before


def test_a_raw_data_set_without_a_usable_name(nnunet_folders: Path, capsys: Any) -> None:
    folder = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny", cases=("a",))
    for path in list((folder / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_000", "-")))
    assert main(["check", "45"]) == 2
    assert "imagesTr holds no file named CASE_XXXX.nii.gz." in capsys.readouterr().err


def test_what_is_left_without_the_bad_cases(nnunet_folders: Path, source: Path) -> None:
    """With --skip_bad, as long as there is something to train on and to validate with."""
    save(volume(9)[:4], source / "a" / "a_t1.nii.gz")
    lists = [source.parent / name for name in ("train.txt", "val.txt")]
    lists[0].write_text("b\nc\n")
    lists[1].write_text("a\n")
    with pytest.raises(ValueError, match=r"Without the bad cases the split has .*\n1 of 1 case\(s\) are bad"):
        convert(source, split_files=lists, skip_bad=True)
    for case in "bc":
        (source / case / "lesion.nii.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"No training case is left\. 3 of 4 case\(s\) are bad"):
        convert(source, skip_bad=True)
    assert not list((nnunet_folders / "raw").iterdir())


def test_images_of_which_one_cannot_be_written(source: Path, tmp_path: Path, capsys: Any) -> None:
    """A folder for prediction is written whole or not at all, and every bad case is named."""
    (source / "b" / "b_fl.nii").write_bytes(b"")
    for name in ("ct", "t1"):
        save(np.full(SHAPE, 7, np.float32), source / "c" / f"c_{name}.nii.gz")
    patterns = [f"{name}={pattern}" for name, pattern in PATTERNS.items()]
    command = ["convert", "images", str(source), str(tmp_path / "out"), "-np", "1", "--modalities", *patterns]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "2 of 4 case(s) are bad" in said
    assert "b_fl.nii" in said
    assert "c: one value everywhere in ct, t1, so no image is left" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "t1"], "Bad --modalities 't1': give each modality once, as in t1=*_t1.nii.gz."),
        (["--modalities", "t1=*_t1.nii.gz", "T1w=*_ct.nii.gz"], "Bad --modalities 'T1w=*_ct.nii.gz'"),
        (["--labels", "lesion"], "Bad --labels 'lesion': give each name once with a whole number, as in lesion=1."),
        (["--labels", "a=128", "b=128"], "--labels must give each name a value of its own above 0"),
        (["--case_folders", "0"], "--case_folders must be 1 or more, got 0."),
        (["--split", "2:1", "--split_files", "train.txt"], "Give either --split or --split_files, not both."),
        (["--modalities", "t1=*_t1.nii.gz", "t2=*_t2.nii.gz"], "t2"),
    ],
)
def test_options_that_cannot_be(
    nnunet_folders: Path, source: Path, capsys: Any, options: list[str], message: str
) -> None:
    given = [] if "--modalities" in options else ["--modalities", *(f"{n}={p}" for n, p in PATTERNS.items())]
    command = ["convert", "folders", str(source), "-d", "45", "-np", "1", "--label", "lesion.nii.gz"]
    assert main([*command, *given, *options]) == 2
    assert message in capsys.readouterr().err
    assert tree(nnunet_folders / "raw") == []


def test_a_raw_data_set_in_which_nothing_is_left_of_a_case(nnunet_folders: Path, capsys: Any) -> None:
    folder = write_raw(nnunet_folders / "raw" / "Dataset045_Tiny")
    for c in range(3):
        save(np.zeros(SHAPE, np.float32), folder / "imagesTr" / f"b_{c:04d}.nii.gz")
    assert main(["convert", "raw", "-d", "45", "-np", "1"]) == 2
    assert "Case b: every image has one value everywhere. Remove the case." in capsys.readouterr().err
    assert not (folder / "missing_modalities.json").exists()
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    assert main(["convert", "split", "-d", "45", "--split", "2:1"]) == 2
    assert "No labels labelsTr/*.nii.gz in" in capsys.readouterr().err
