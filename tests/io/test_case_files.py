"""Which files belong to which case: patterns, sheets, BIDS and BraTS names."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunetv2_mgml.io.case_files import find_bids, find_brats, find_by_patterns
from nnunetv2_mgml.io.case_sheet import read_sheet


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names_of(found) -> dict[str, list[str]]:
    return {case.name: sorted(case.images) for case in found.cases}


def test_a_folder_per_patient(tmp_path: Path) -> None:
    touch(tmp_path, "p1/x_t1.nii.gz", "p1/x_fl.nii.gz", "p1/les.nii.gz", "p2/deep/y_t1.nii.gz", "p3/z_fl.nii.gz")
    touch(tmp_path, "p1/notes.txt", ".hidden/x_t1.nii.gz", "__MACOSX/p1/x_t1.nii.gz")
    found = find_by_patterns(tmp_path, {"t1": "*_t1.nii.gz", "flair": "*_fl.nii.gz"}, "les*.nii.gz")
    assert names_of(found) == {"p1": ["flair", "t1"], "p2": ["t1"], "p3": ["flair"]}
    assert found.modalities == ("t1", "flair")
    assert [case.label is not None for case in found.cases] == [True, False, False]
    assert found.problems == {}


def test_one_folder_with_all_files_and_sessions(tmp_path: Path) -> None:
    touch(tmp_path / "flat", "P-01_T1.nii.gz", "P-02_T1.nii.gz", "P-02_T2.nii.gz", "P-02.label.nii.gz")
    found = find_by_patterns(tmp_path / "flat", {"t1": "*_T1.nii.gz", "t2": "*_T2.nii.gz"}, "*.label.nii.gz")
    assert names_of(found) == {"P-01": ["t1"], "P-02": ["t1", "t2"]}
    touch(tmp_path / "deep", "a/s1/t1.nii.gz", "a/s2/t1.nii.gz", "b/s1/t1.nii.gz")
    two = find_by_patterns(tmp_path / "deep", {"t1": "t1.nii.gz"}, case_folders=2)
    assert sorted(names_of(two)) == ["a_s1", "a_s2", "b_s1"]
    one = find_by_patterns(tmp_path / "deep", {"t1": "t1.nii.gz"})
    assert sorted(names_of(one)) == ["b"]
    assert "2 files for t1" in one.problems["a"][0]
    first = find_by_patterns(tmp_path / "deep", {"t1": "s1/t1.nii.gz"})
    assert sorted(names_of(first)) == ["a", "b"]


def test_two_folders_of_one_name_are_not_one_case(tmp_path: Path) -> None:
    touch(tmp_path, "a_b/c/t1.nii.gz", "a/b_c/flair.nii.gz", "z/c/t1.nii.gz", "z/c/flair.nii.gz")
    found = find_by_patterns(tmp_path, {"t1": "t1.nii.gz", "flair": "flair.nii.gz"}, case_folders=2)
    assert names_of(found) == {"z_c": ["flair", "t1"]}
    assert found.problems == {"a_b_c": ["found in several folders: a/b_c, a_b/c; rename one"]}
    assert [case.patient for case in found.cases] == ["z"]


def test_a_link_to_a_case_is_told_of(tmp_path: Path) -> None:
    """It takes no case away from the folder it leads to; a link that leads back up is not walked."""
    touch(tmp_path, "p_1/t1.nii.gz", "p_2/t1.nii.gz")
    (tmp_path / "current").symlink_to(tmp_path / "p_2")
    (tmp_path / "p_1" / "loop").symlink_to(tmp_path)
    found = find_by_patterns(tmp_path, {"t1": "t1.nii.gz"})
    assert names_of(found) == {"p_1": ["t1"]}
    assert found.problems == {
        "current": ["is the same folder as p_2; take the link out"],
        "p_2": ["is the same folder as current; take the link out"],
    }
    brats = touch(tmp_path / "brats", "A/A_t1.nii.gz", "B/B_t1.nii.gz")
    (brats / "0").symlink_to(brats / "A")
    found = find_brats(brats)
    assert names_of(found) == {"B": ["t1"]}
    assert found.problems["A"][0].startswith("2 files for t1: ")


def test_patterns_that_do_not_fit(tmp_path: Path) -> None:
    touch(tmp_path, "p1/a_t1.nii.gz", "p1/a_t1ce.nii.gz", "p2/seg.nii.gz", "t1.nii.gz")
    with pytest.raises(ValueError, match=r"No file below .* matches \*_t2.nii.gz \(t2\); files there: t1"):
        find_by_patterns(tmp_path, {"t1": "*_t1.nii.gz", "t2": "*_t2.nii.gz"})
    found = find_by_patterns(tmp_path, {"t1": "*_t1*.nii.gz", "t1ce": "*_t1ce.nii.gz"}, "seg.nii.gz")
    assert "make the patterns narrower" in found.problems["p1"][0]
    assert found.problems["p2"] == ["has a label but no image"]
    with pytest.raises(ValueError, match="has no \\*, which would name the case"):
        find_by_patterns(tmp_path, {"t1": "t1.nii.gz"})
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_by_patterns(tmp_path / "gone", {"t1": "*"})


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_sheet(tmp_path: Path, separator: str) -> None:
    touch(tmp_path, "a1.nii.gz", "a2.nii.gz", "b2.nii.gz", "l.nii.gz")
    rows = ["case,T1,dwi,label,Site", "A,a1.nii.gz,a2.nii.gz,l.nii.gz,Ulm", f"B,n/a,{tmp_path}/b2.nii.gz,,", ",,,,"]
    path = tmp_path / "cases.csv"
    path.write_text("\ufeff" + "\n".join(row.replace(",", separator) for row in rows), encoding="utf-8")
    found = read_sheet(path)
    assert found.modalities == ("T1", "dwi")
    assert names_of(found) == {"A": ["T1", "dwi"], "B": ["dwi"]}
    assert [(case.site, case.label is not None) for case in found.cases] == [("Ulm", True), (None, False)]
    only = read_sheet(path, ["DWI"])
    assert only.modalities == ("DWI",)
    assert names_of(only) == {"A": ["DWI"], "B": ["DWI"]}
    with pytest.raises(ValueError, match="has no column flair; its columns are case, T1, dwi, label, Site"):
        read_sheet(path, ["flair"])


def test_sheets_with_mistakes(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    path = tmp_path / "cases.tsv"
    path.write_text("case\tt1\tt2\nA\ta.nii.gz\tgone.nii.gz\nB\ta.nii.gz\t\nB\ta.nii.gz\t\nC\t\t\n")
    found = read_sheet(path)
    assert "gone.nii.gz does not exist" in found.problems["A"][0]
    assert found.problems["B"] == ["is in two rows"]
    assert found.problems["C"] == ["has no image"]
    path.write_text("patient\tt1\nA\ta.nii.gz\n")
    with pytest.raises(ValueError, match="needs a column 'case'"):
        read_sheet(path)
    path.write_text("case\tt1\n\ta.nii.gz\n")
    with pytest.raises(ValueError, match="a row without a case name"):
        read_sheet(path)
    path.write_bytes("case\tt1\tsite\nA\ta.nii.gz\tKöln\n".encode("latin-1"))  # as Excel saves it
    with pytest.raises(ValueError, match=r"cases\.tsv is not UTF-8 text \(.+\)\. Save it as CSV in UTF-8"):
        read_sheet(path)


def test_bids(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_ce-gadolinium_T1w.nii.gz",
        "sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz",
        "sub-01/ses-a/dwi/sub-01_ses-a_dwi.nii.gz",
        "sub-02/anat/sub-02_T2w.nii.gz",
        "sub-02/anat/sub-02_T2w.json",
        "derivatives/lesions/sub-01/ses-a/anat/sub-01_ses-a_label-lesion_mask.nii.gz",
        "derivatives/lesions/sub-02/anat/sub-02_desc-brain_mask.nii.gz",
        "derivatives/lesions/sub-02/anat/sub-02_space-x_T1w.nii.gz",
    )
    found = find_bids(tmp_path)
    assert found.modalities == ("t1", "t1ce", "t2", "flair", "dwi")
    assert names_of(found) == {"sub-01_ses-a": ["dwi", "flair", "t1", "t1ce"], "sub-02": ["t2"]}
    assert [case.label is not None for case in found.cases] == [True, False]
    chosen = find_bids(tmp_path, {"gd": "ce-*_T1w", "plain": "T1w"}, "*_mask.nii.gz")
    assert names_of(chosen) == {"sub-01_ses-a": ["gd", "plain"]}
    assert chosen.problems == {"sub-02": ["has a label but no image"]}
    with pytest.raises(ValueError, match=r"is of pd=PDw"):
        find_bids(tmp_path, {"t1": "T1w", "pd": "PDw"})
    with pytest.raises(ValueError, match="No image with a BIDS name"):
        find_bids(touch(tmp_path / "other", "x.nii.gz"))


def test_brats_names(tmp_path: Path) -> None:
    touch(tmp_path, "a/BraTS-GLI-1-000/BraTS-GLI-1-000-t1n.nii.gz", "a/BraTS-GLI-1-000/BraTS-GLI-1-000-t2f.nii.gz")
    touch(tmp_path, "b/Brats18_X_t1ce.nii", "b/Brats18_X_seg.nii", "b/readme.nii.gz")
    found = find_brats(tmp_path)
    assert names_of(found) == {"BraTS-GLI-1-000": ["flair", "t1"], "Brats18_X": ["t1ce"]}
    with pytest.raises(ValueError, match="No BraTS case found"):
        find_brats(touch(tmp_path / "none", "x.nii.gz"))


def test_upper_case_and_files_that_no_pattern_matches(tmp_path: Path) -> None:
    """One file of a case is spelled otherwise: it is not taken for a missing modality."""
    for case, names in {"A": ("A_t1.nii.gz", "A_FL.NII.GZ"), "B": ("B_T1.nii.gz", "B_fl.nrrd", "notes.txt")}.items():
        touch(tmp_path / case, *names, "Lesion.nii.gz")
    found = find_by_patterns(tmp_path, {"t1": "*_t1.nii.gz", "flair": "*_fl.nii.gz"}, "lesion.nii.gz")
    assert [sorted(case.images) for case in found.cases] == [["flair", "t1"], ["t1"]]
    assert found.left_over == [tmp_path / "B" / "B_fl.nrrd"]
    (tmp_path / "B" / "B_T1.nii.gz").unlink()
    found = find_by_patterns(tmp_path, {"t1": "*_t1.nii.gz", "flair": "*_fl.nii.gz"}, "lesion.nii.gz")
    assert found.problems == {"B": ["has a label but no image that a pattern matches: B/B_fl.nrrd"]}
    touch(tmp_path, "A/A_T1.nii.gz")
    once = find_by_patterns(tmp_path, {"t1": "*_t1.nii.gz", "flair": "*_fl.nii.gz"})
    assert once.cases[0].images["t1"].name == "A_t1.nii.gz"
    assert tmp_path / "A" / "A_T1.nii.gz" in once.left_over
    exact = find_by_patterns(tmp_path, {"t1": "*_t1.nii.gz", "post": "*_T1.nii.gz", "flair": "*_fl.nii.gz"})
    assert exact.cases[0].images["t1"].name == "A_t1.nii.gz"
    assert exact.cases[0].images["post"].name == "A_T1.nii.gz"
    touch(tmp_path / "flat", "C_T1.NII.GZ")
    assert [case.name for case in find_by_patterns(tmp_path / "flat", {"t1": "*_t1.nii.gz"}).cases] == ["C"]


def test_sheet_as_a_spreadsheet_program_saves_it(tmp_path: Path) -> None:
    """Byte order mark, line for Excel, semicolons, CRLF, backslashes, empty columns and rows, quotes, every 'NA'."""
    touch(tmp_path, "Müller Anna/t 1.nii.gz", "b/t1.nrrd", "b/x, y.mha", "b/seg.nii")
    rows = [
        "sep=;",
        "Case; T1 ;FLAIR;Label;Site;;",
        "Müller Anna;Müller Anna\\t 1.nii.gz;NA;n.a.;NaN;;",
        f'b;{tmp_path}/b/t1.nrrd;"b/x, y.mha";b/seg.nii;Köln;;',
        ";;;;;;",
    ]
    (tmp_path / "cohort.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode())
    found = read_sheet(tmp_path / "cohort.csv")
    assert not found.problems
    assert found.modalities == ("T1", "FLAIR")
    first, second = found.cases
    assert (first.name, first.label, first.site) == ("Müller Anna", None, None)
    assert first.images == {"T1": tmp_path / "Müller Anna" / "t 1.nii.gz"}
    assert (second.label, second.site) == (tmp_path / "b" / "seg.nii", "Köln")
    assert second.images["FLAIR"] == tmp_path / "b" / "x, y.mha"


def test_columns_of_one_name_and_file_names_for_cases(tmp_path: Path) -> None:
    """One of the columns would be lost, and ITK takes the ending off a name."""
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    for header, name in (("case,T1,flair,t1 ", "t1"), ("case,t1,label,label", "label"), ("case,t1,Case,flair", "case")):
        (tmp_path / "s.csv").write_text(f"{header}\nx,a.nii.gz,b.nii.gz,a.nii.gz\n")
        with pytest.raises(ValueError, match=f"more than one column {name} "):
            read_sheet(tmp_path / "s.csv")
    names = ("x.nii.gz", "y.NII", "z.hdr", "v.img", "w.nii.z")
    (tmp_path / "s.csv").write_text("\n".join(["case,t1,,", *(f"{name},a.nii.gz,," for name in names)]))
    found = read_sheet(tmp_path / "s.csv")
    assert [case.name for case in found.cases] == ["w.nii.z"]
    assert set(found.problems) == set(names[:-1])
    assert found.problems["x.nii.gz"] == ["its name ends with .nii.gz, as a file's does; leave that out of the name"]


def test_rows_that_cannot_be_right(tmp_path: Path) -> None:
    """Of two rows for one case neither is taken, whichever of them has its files."""
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz")
    rows = ["case,t1,flair", "x,gone.nii.gz,", "x,a.nii.gz,", "y,b.nii.gz,b.nii.gz", "../z,c.nii.gz,a.nii.gz", "v,,"]
    (tmp_path / "s.csv").write_text("\n".join(rows))
    found = read_sheet(tmp_path / "s.csv")
    assert not found.cases
    assert found.problems == {
        "x": [f"{tmp_path / 'gone.nii.gz'} does not exist", "is in two rows"],
        "y": [f"t1 and flair are the same file, {tmp_path / 'b.nii.gz'}"],
        "../z": ["its name would name another folder; leave slashes and the dot in front out"],
        "v": ["has no image"],
    }


def test_an_unclosed_quote_loses_no_rows(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{case}.nii.gz" for case in "abcd"))
    sheet = tmp_path / "s.csv"
    rows = ["case,t1,note", "a,a.nii.gz,", 'b,b.nii.gz,"left side', "c,c.nii.gz,"]
    for head in ([], ["sep=,"]):
        for more in ([], [f"x{i},x{i}.nii.gz,{'z' * 99}" for i in range(1500)]):  # a csv field has an upper limit
            sheet.write_text("\n".join([*head, *rows, *more]))
            with pytest.raises(ValueError, match=rf"s\.csv cannot be read from line {len(head) + 3} on"):
                read_sheet(sheet, ["t1"])
    sheet.write_text('case,t1,note\na,"a.nii.gz,\nb,b.nii.gz",\nc,c.nii.gz,"seen\ntwice"\n')
    with pytest.raises(ValueError, match=r"a cell of t1 has a line break, 'a\.nii\.gz,\\nb,b\.nii\.gz'\. Most likely"):
        read_sheet(sheet, ["t1"])
    sheet.write_text('case,t1,note\n"a","a.nii.gz",5" coil\nc,c.nii.gz,"seen\ntwice"\n')
    assert [case.name for case in read_sheet(sheet, ["t1"]).cases] == ["a", "c"]


def test_columns_that_are_no_modality(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    sheet = tmp_path / "s.csv"
    sheet.write_text(f"case,t1,age,comment\na,a.nii.gz,61,{'x' * 400}\nb,b.nii.gz,48,seen twice\n")
    with pytest.raises(ValueError, match=r"no cell of age, comment is a file .*'61'.* --modalities t1"):
        read_sheet(sheet)
    assert len(read_sheet(sheet, ["t1"]).cases) == 2
    predicted = read_sheet(sheet, known=["flair", "T1w"])
    assert predicted.modalities == ("t1", "age", "comment")
    assert [list(case.images) for case in predicted.cases] == [["t1"], ["t1"]]
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match=r"none of its files exists, the first is .*relative to the sheet's folder"):
        read_sheet(sheet.rename(tmp_path / "elsewhere" / "s.csv"), ["t1"])
