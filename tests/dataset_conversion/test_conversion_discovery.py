"""Recognition of BraTS folders by their names alone; the files here are empty."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunetv2_mgml.dataset_conversion.discovery import discover, edition, patient

NAMES_2021 = ("_t1", "_t1ce", "_t2", "_flair", "_seg")
NAMES_2023 = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")


def _touch(folder: Path, case: str, suffixes: tuple[str, ...] = NAMES_2021, ending: str = ".nii.gz") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        (folder / f"{case}{suffix}{ending}").touch()


@pytest.mark.parametrize(("suffixes", "convention"), [(NAMES_2021, "brats2021"), (NAMES_2023, "brats2023")])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("place", ["", "CASE", "MICCAI/HGG/CASE"])
def test_layouts(tmp_path: Path, suffixes: tuple[str, ...], convention: str, ending: str, place: str) -> None:
    for case in ("Brats18_2013_2_1", "Brats18_2013_10_1"):
        _touch(tmp_path / place.replace("CASE", case), case, suffixes, ending)
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["Brats18_2013_10_1", "Brats18_2013_2_1"]
    assert not found.problems
    assert not found.notes
    for case in found.cases:
        assert case.convention == convention
        assert {modality: path.name for modality, path in case.images.items()} == {
            modality: f"{case.name}{suffix}{ending}"
            for modality, suffix in zip(("t1", "t1ce", "t2", "flair"), suffixes, strict=False)
        }
        assert case.segmentation is not None
        assert case.segmentation.name == f"{case.name}{suffixes[4]}{ending}"


def test_names_are_matched_whatever_their_case(tmp_path: Path) -> None:
    _touch(tmp_path, "X", ("_T1", "_T1CE", "_T2", "_FLAIR", "_SEG"), ".NII.GZ")
    [case] = discover(tmp_path).cases
    assert set(case.images) == {"t1", "t1ce", "t2", "flair"}


def test_folder_that_bears_the_name_of_the_volume(tmp_path: Path) -> None:
    """Mirrors on Kaggle pack each volume into a folder, where the file is named anyhow."""
    for suffix in NAMES_2021:
        folder = tmp_path / "BraTS2021_00495" / f"BraTS2021_00495{suffix}.nii"
        folder.mkdir(parents=True)
        (folder / "00000057_brain.nii").touch()
    [case] = discover(tmp_path).cases
    assert case.name == "BraTS2021_00495"
    assert set(case.images) == {"t1", "t1ce", "t2", "flair"}
    assert case.segmentation is not None


def test_misnamed_segmentation_of_brats_2020(tmp_path: Path) -> None:
    _touch(tmp_path / "BraTS20_Training_355", "BraTS20_Training_355", NAMES_2021[:4], ".nii")
    (tmp_path / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii").touch()
    found = discover(tmp_path)
    assert found.cases[0].segmentation == tmp_path / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii"
    assert found.notes == ["BraTS20_Training_355: took W39_1998.09.19_Segm.nii for its segmentation"]


def test_hidden_files_and_mac_archives_are_skipped(tmp_path: Path) -> None:
    _touch(tmp_path / "A", "A")
    _touch(tmp_path / "A", "._A")
    _touch(tmp_path / "__MACOSX" / "B", "B")
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["A"]
    assert not found.problems


def test_links_are_followed_once(tmp_path: Path) -> None:
    _touch(tmp_path / "elsewhere" / "A", "A")
    source = tmp_path / "source"
    source.mkdir()
    (source / "A").symlink_to(tmp_path / "elsewhere" / "A")
    (source / "loop").symlink_to(source)
    assert [case.name for case in discover(source).cases] == ["A"]


def test_a_link_that_sorts_first_takes_no_case(tmp_path: Path) -> None:
    _touch(tmp_path / "B", "B")
    (tmp_path / "A").symlink_to(tmp_path / "B")
    found = discover(tmp_path)
    assert not found.cases
    assert found.problems == {"B": [f"found in several folders: {tmp_path / 'A'}, {tmp_path / 'B'}; keep one"]}


def test_case_in_two_folders_is_a_problem(tmp_path: Path) -> None:
    _touch(tmp_path / "HGG" / "A", "A")
    _touch(tmp_path / "LGG" / "A", "A")
    _touch(tmp_path / "LGG" / "B", "B")
    found = discover(tmp_path)
    assert [case.name for case in found.cases] == ["B"]
    [problem] = found.problems["A"]
    assert str(tmp_path / "HGG" / "A") in problem
    assert str(tmp_path / "LGG" / "A") in problem


def test_two_files_for_one_sequence_are_a_problem(tmp_path: Path) -> None:
    _touch(tmp_path, "A")
    _touch(tmp_path, "A", ("_t2",), ".nii")
    assert discover(tmp_path).problems == {"A": ["two files for t2: A_t2.nii, A_t2.nii.gz; keep one"]}


def test_both_namings_for_one_case_are_a_problem(tmp_path: Path) -> None:
    _touch(tmp_path, "A")
    _touch(tmp_path, "A", NAMES_2023)
    assert "naming of 2021 (_t1) and of 2023 (-t1n)" in discover(tmp_path).problems["A"][0]


def test_segmentation_alone_is_a_problem(tmp_path: Path) -> None:
    _touch(tmp_path, "A", ("_seg",))
    assert discover(tmp_path).problems == {"A": ["has a segmentation but no image sequence"]}


def test_mixed_namings_keep_their_own_meaning(tmp_path: Path) -> None:
    _touch(tmp_path / "old", "A", NAMES_2021)
    _touch(tmp_path / "new", "B", NAMES_2023)
    assert {case.name: case.convention for case in discover(tmp_path).cases} == {"A": "brats2021", "B": "brats2023"}
    assert {case.convention for case in discover(tmp_path, "brats2023").cases} == {"brats2023"}


def test_files_with_other_names_are_reported(tmp_path: Path) -> None:
    _touch(tmp_path, "A")
    (tmp_path / "A_adc.nii.gz").touch()
    (tmp_path / "name_mapping.csv").touch()
    assert discover(tmp_path).notes == [
        f"1 NIfTI file(s) without a BraTS name ignored, such as {tmp_path / 'A_adc.nii.gz'}"
    ]


def test_no_folder_and_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        discover(tmp_path / "absent")
    (tmp_path / "x_dwi.nii.gz").touch()
    with pytest.raises(ValueError, match=r"No BraTS case found .* found 1 other NIfTI"):
        discover(tmp_path)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("Brats17_2013_10_1", "BraTS2017"),
        ("Brats18_CBICA_AAB_1", "BraTS2018"),
        ("BraTS19_CBICA_AAB_1", "BraTS2019"),
        ("BraTS20_Training_001", "BraTS2020"),
        ("BraTS2021_00006", "BraTS2021"),
        ("FeTS2022_01341", "BraTS2022"),
        ("BraTS-GLI-00000-000", "BraTS2023"),
        ("BraTS-GLI-00005-101", "BraTS2024"),
        ("BraTS-SSA-00002-000", "BraTS2023-SSA"),
        ("Phantom_00001", "BraTS"),
    ],
)
def test_edition(case: str, expected: str) -> None:
    assert edition(case) == expected


def test_patient_is_the_name_without_time_point() -> None:
    assert patient("BraTS-GLI-00005-101") == patient("BraTS-GLI-00005-100") == "BraTS-GLI-00005"
    assert patient("BraTS2021_00006") == "BraTS2021_00006"
    assert patient("Brats18_2013_10_1") == "Brats18_2013_10_1"
