"""Finding cases whose numbering has holes, and deciding what each of them has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_cases import write_image

from nnunetv2_mgml.inference.inputs import Case, CaseError, cases_from_lists, find_cases, parse_missing, resolve
from nnunetv2_mgml.inference.planning import check_places, plan_cases, refuse_incomplete
from nnunetv2_mgml.modalities import canonical_name, parse_subset
from nnunetv2_mgml.upstream.plain_errors import PlainError

CHANNELS = ("t1", "t1ce", "t2", "flair")
ENDING = ".nii.gz"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def find(folder: Path) -> dict[str, Case]:
    return {case.name: case for case in find_cases(folder, ENDING, CHANNELS)}


def test_a_hole_does_not_shift_the_channels_behind_it(tmp_path: Path) -> None:
    cases = find(touch(tmp_path, "b_0000.nii.gz", "b_0002.nii.gz", "b_0003.nii.gz", "a_1_0003.nii.gz"))
    assert list(cases) == ["a_1", "b"]
    assert {c: Path(p).name for c, p in cases["b"].files.items()} == {
        0: "b_0000.nii.gz",
        2: "b_0002.nii.gz",
        3: "b_0003.nii.gz",
    }
    assert list(cases["a_1"].files) == [3]
    assert resolve(cases["b"], "auto", CHANNELS) == (True, False, True, True)


def test_hidden_files_folders_and_other_names_are_no_cases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a_0000.nii.gz", "._a_0001.nii.gz", "notes.txt", "a_0002.json", "label.nii.gz")
    (tmp_path / "b_0000.nii.gz").mkdir()
    cases = find(tmp_path)
    assert list(cases) == ["a"]
    assert list(cases["a"].files) == [0]
    assert "label.nii.gz" in caplog.text


def test_a_broken_link_is_a_file_that_cannot_be_read_not_a_missing_modality(tmp_path: Path) -> None:
    touch(tmp_path, "a_0000.nii.gz")
    (tmp_path / "a_0001.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    assert resolve(find(tmp_path)["a"], "auto", CHANNELS) == (True, True, False, False)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "it is empty"),
        (("p-one.nii.gz", "p-two.nii.gz"), "CASE_0001.nii.gz (t1ce)"),
        (("p_0000.nii",), "CASE_0000.nii.gz (t1)"),
    ],
)
def test_a_folder_without_cases_says_how_files_are_named(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match="No case in") as error:
        find(touch(tmp_path, *names))
    assert words in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find(tmp_path / "nowhere")


@settings(max_examples=60, deadline=None)
@given(files=st.sets(st.integers(0, 3), min_size=1), named=st.sets(st.integers(0, 3), max_size=3), auto=st.booleans())
def test_resolve_is_set_arithmetic(files: set[int], named: set[int], auto: bool) -> None:
    case = Case("p", {c: f"p_{c:04d}.nii.gz" for c in files})
    missing = ["auto"] * auto + [CHANNELS[c] for c in named]
    if not missing:
        missing = None
    expected = files - named if auto else set(range(4)) - named
    if not expected or not expected <= files:
        with pytest.raises(CaseError, match="Case p: "):
            resolve(case, missing, CHANNELS)
    else:
        assert {c for c, there in enumerate(resolve(case, missing, CHANNELS)) if there} == expected


def test_names_take_aliases_commas_and_any_case() -> None:
    assert parse_missing(["T1Gd,FLAIR"], CHANNELS).allowed == (True, False, True, False)
    wish = parse_missing(["AUTO", "t1c"], CHANNELS)
    assert (wish.auto, wish.allowed) == (True, (True, False, True, True))
    assert parse_missing(["auto"], CHANNELS).allowed == (True,) * 4


def test_a_name_with_a_plus_is_one_name() -> None:
    """Contrast-enhanced T1 is often called T1+C; as the channel is, or by that other name of it."""
    for channels in (("T1", "T1+C", "T2", "FLAIR"), CHANNELS):
        enhanced = canonical_name("T1+C")
        where = [canonical_name(c) for c in channels].index(enhanced)
        assert parse_missing(["t1+c"], channels).allowed == tuple(c != where for c in range(4))
        assert parse_subset("T1+C+flair", channels) == tuple(canonical_name(c) in (enhanced, "flair") for c in channels)
    odd = ("t1", "c", "a,b")
    assert parse_missing("t1+c", odd).allowed == (False, False, True)
    assert parse_subset("a,b + c", odd) == (False, True, True)
    with pytest.raises(ValueError, match="Unknown modality 'd'"):
        parse_missing("t1+d", odd)


def test_a_name_with_a_blank_is_one_name() -> None:
    for text in ("T2 FLAIR", " t2 flair "):
        assert parse_missing(text, CHANNELS).allowed == (True, True, True, False)
    assert parse_missing(["T2 FLAIR, t1ce"], CHANNELS).allowed == (True, False, True, False)
    for several in ("t2,flair", "t2+flair", ["t2", "flair"]):
        assert parse_missing(several, CHANNELS).allowed == (True, True, False, False)
    wish = parse_missing("auto t1 t1ce", CHANNELS)
    assert (wish.auto, wish.allowed) == (True, (False, False, True, True))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["dwi"], "Unknown modality 'dwi'"),
        (["t1", "t1ce", "t2", "flair"], "All modalities"),
        (["auto", "t1", "t1ce", "t2", "flair"], "All modalities"),
        ([], "at least one"),
        ([","], "at least one"),
    ],
)
def test_wrong_names_are_an_error_of_the_command_not_of_a_case(missing: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        resolve(Case("p", {0: "x"}), missing, CHANNELS)
    assert not isinstance(error.value, CaseError)


def test_an_absent_file_is_named_with_what_was_found() -> None:
    with pytest.raises(CaseError, match=r"Case p: no file for t1ce \(_0001\); found t1 \(_0000\), flair \(_0003\)"):
        resolve(Case("p", {0: "a", 3: "b"}), ["t2"], CHANNELS)


def test_no_modality_left() -> None:
    with pytest.raises(CaseError, match=r"Case p: no modality is left; found t1 .*told to ignore t1 "):
        resolve(Case("p", {0: "a"}), ["auto", "t1"], CHANNELS)


def test_a_channel_number_beyond_the_model(tmp_path: Path) -> None:
    case = find(touch(tmp_path, "p_0000.nii.gz", "p_0004.nii.gz"))["p"]
    with pytest.raises(CaseError, match=r"Case p: .*p_0004.nii.gz has channel number 0004.* 4 channels"):
        resolve(case, "auto", CHANNELS)


def test_two_files_for_one_channel(tmp_path: Path) -> None:
    case = find(touch(tmp_path, "p_0000.nii.gz", "p_0000.nii", "p_0001.nii.gz"))["p"]
    with pytest.raises(CaseError, match=r"Case p: two files for channel 0000: .*nii.gz and .*nii"):
        resolve(case, "auto", CHANNELS)
    assert resolve(case, ["auto", "t1"], CHANNELS) == (False, True, False, False)
    twice = cases_from_lists([["/a/p_0000.nii.gz", "/b/p_0000.nii.gz"]], ENDING, CHANNELS)[0]
    with pytest.raises(CaseError, match=r"two files for channel 0000: /a/p_0000.nii.gz and /b/p_0000.nii.gz"):
        resolve(twice, "auto", CHANNELS)


def test_a_file_of_another_format_is_not_taken_for_a_missing_modality(tmp_path: Path) -> None:
    case = find(touch(tmp_path, "p_0000.nii.gz", "p_0001.mha"))["p"]
    with pytest.raises(CaseError, match=r"p_0001.mha has channel number 0001, but the model reads .nii.gz"):
        resolve(case, "auto", CHANNELS)
    assert resolve(case, ["auto", "t1ce"], CHANNELS) == (True, False, False, False)


def test_lists_of_files_keep_their_order_and_their_holes() -> None:
    cases = cases_from_lists([["/x/b_0002.nii.gz", None, "/y/b_0000.nii.gz"], ["/x/a_0001.nii.gz"]], ENDING, CHANNELS)
    assert [case.name for case in cases] == ["b", "a"]
    assert cases[0].files == {0: "/y/b_0000.nii.gz", 2: "/x/b_0002.nii.gz"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["/x/a_t1.nii.gz"], "is not named CASE_0000.nii.gz"),
        (["/x/a_0000.nii.gz", "/x/b_0001.nii.gz"], "different cases"),
        ([None], "no modality is left; found no file"),
    ],
)
def test_lists_with_wrong_names(files: list[str | None], words: str) -> None:
    with pytest.raises(CaseError, match=words):
        resolve(cases_from_lists([files], ENDING, CHANNELS)[0], "auto", CHANNELS)


def plan(source: object, target: object, **kwargs: object) -> tuple[list[str], list[str]]:
    options = {"overwrite": True, "part_id": 0, "num_parts": 1, "save_probabilities": False, **kwargs}
    todo, done = plan_cases(source, target, None, ENDING, CHANNELS, **options)  # type: ignore[arg-type]
    return [p.case.name for p in todo], [p.case.name for p in done]


@given(cases=st.integers(1, 7), num_parts=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_parts_cover_every_case_once(cases: int, num_parts: int) -> None:
    lists = [[f"/x/c{i}_0000.nii.gz"] for i in range(cases)]
    parts = [plan(lists, "/out", part_id=i, num_parts=num_parts)[0] for i in range(num_parts)]
    assert sorted(name for part in parts for name in part) == [f"c{i}" for i in range(cases)]


def test_continuing_skips_what_is_complete(tmp_path: Path) -> None:
    for name in "ab":
        write_image(tmp_path / f"{name}.nii.gz", np.zeros((2, 3, 4), np.uint8))
    np.savez(tmp_path / "b.npz", probabilities=np.zeros((1, 2, 3, 4)))
    lists = [[f"/x/{name}_0000.nii.gz"] for name in "abc"]
    assert plan(lists, str(tmp_path), overwrite=False) == (["c"], ["a", "b"])
    assert plan(lists, str(tmp_path), overwrite=False, save_probabilities=True) == (["a", "c"], ["b"])
    assert plan(lists, str(tmp_path)) == (["a", "b", "c"], [])
    (tmp_path / "a.nii.gz").write_bytes(b"")
    (tmp_path / "b.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:40])
    assert plan(lists, str(tmp_path), overwrite=False) == (["a", "c"], ["b"])
    assert plan(lists, str(tmp_path), overwrite=False, save_probabilities=True) == (["a", "b", "c"], [])


def test_two_cases_of_one_name_need_outputs_of_their_own() -> None:
    lists = [["/x/a_0000.nii.gz"], ["/y/a_0000.nii.gz"]]
    with pytest.raises(ValueError, match="named a"):
        plan(lists, "/out")
    assert plan(lists, ["/out/x", "/out/y"])[0] == ["a [0]", "a [1]"]
    with pytest.raises(ValueError, match="2 cases but 1 output"):
        plan(lists, ["/out/x"])


def test_a_segmentation_among_the_images_is_doubted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("p_0001_0000", "p_0001_0002", "p_0001", "q_0000"):
        (tmp_path / f"{name}{ENDING}").touch()
    assert [case.name for case in find_cases(tmp_path, ENDING, CHANNELS)] == ["p", "p_0001", "q"]
    assert "perhaps segmentations, or without the channel in their names" in caplog.text
    assert f"names: p_0001{ENDING} (case p_0001). If so, move them out of the input folder." in caplog.text
    caplog.clear()
    (tmp_path / f"p_0001{ENDING}").unlink()
    find_cases(tmp_path, ENDING, CHANNELS)
    assert not caplog.text


def test_input_and_output_are_two_folders(tmp_path: Path) -> None:
    for name in ("in", "stage"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for target in (tmp_path / "in", f"{tmp_path}/link", f"{tmp_path}/stage/../in"):
        with pytest.raises(ValueError, match="is the input folder"):
            check_places(str(tmp_path / "in"), target)
    with pytest.raises(ValueError, match="is that of the previous stage's predictions"):
        check_places(tmp_path / "in", tmp_path / "stage", str(tmp_path / "stage"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        check_places(tmp_path / "nowhere", tmp_path / "out")
    check_places(tmp_path / "in", tmp_path / "out")
    check_places([["a_0000.nii.gz"]], [str(tmp_path / "in" / "a")])


def test_no_segmentation_replaces_an_image(tmp_path: Path) -> None:
    image = tmp_path / f"a{ENDING}"
    image.touch()
    sheet = tmp_path / "cases.csv"
    sheet.write_text(f"case,t1\na,{image}\n")
    options = {"overwrite": True, "part_id": 0, "num_parts": 1, "save_probabilities": False}
    with pytest.raises(ValueError, match=f"case a would replace an image, {image}"):
        plan_cases(sheet, tmp_path, None, ENDING, CHANNELS, **options)  # type: ignore[arg-type]


def test_a_part_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="part_id must be 0 to 1"):
        plan([["/x/a_0000.nii.gz"]], "/out", part_id=2, num_parts=2)


def test_folders_with_the_names_of_brats_and_sheets(tmp_path: Path) -> None:
    """Modalities are matched by name, in the model's order; what it does not know is left out."""
    folder = tmp_path / "val" / "BraTS-GLI-00001-000"
    folder.mkdir(parents=True)
    for suffix in ("t1c", "t2f", "seg"):
        (folder / f"BraTS-GLI-00001-000-{suffix}.nii.gz").touch()
    other = tmp_path / "val" / "Brats18_X"
    other.mkdir()
    (other / "Brats18_X_t1.nii.gz").touch()
    cases = find_cases(tmp_path / "val", ".nii.gz", ("flair", "t1", "t1ce"))
    assert [(case.name, list(case.files)) for case in cases] == [("BraTS-GLI-00001-000", [0, 2]), ("Brats18_X", [1])]
    assert cases[0].files[0].endswith("-t2f.nii.gz")
    assert resolve(cases[1], ["auto"], ("flair", "t1", "t1ce")) == (False, True, False)
    with pytest.raises(ValueError, match="No case in"):
        find_cases(tmp_path / "val", ".nii.gz", ("dwi", "adc"))
    with pytest.raises(ValueError, match="No case in"):
        find_cases(tmp_path / "val", ".png", ("flair", "t1"))
    sheet = tmp_path / "in.csv"
    sheet.write_text("case,pet,FLAIR,adc\nA,,val/Brats18_X/Brats18_X_t1.nii.gz,\nB,,gone.nii.gz,\n")
    cases = find_cases(sheet, ".nii.gz", ("adc", "flair"))
    assert [(case.name, list(case.files)) for case in cases] == [("A", [1]), ("B", [])]
    with pytest.raises(CaseError, match=r"Case B: .*gone\.nii\.gz does not exist"):
        resolve(cases[1], ["auto"], ("adc", "flair"))
    with pytest.raises(ValueError, match="has pet, FLAIR, adc; the model's modalities are t1"):
        find_cases(sheet, ".nii.gz", ("t1",))


def test_columns_that_the_model_does_not_know_are_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "in.csv").write_text("case,t1,flare,dwi\nA,a.nii.gz,,\nB,a.nii.gz,gone.nii.gz,\n")
    assert [case.files for case in find_cases(tmp_path / "in.csv", ".nii.gz", CHANNELS)] == [
        {0: str(tmp_path / "a.nii.gz")}
    ] * 2
    assert caplog.messages == ["Not of this model and left out: flare, dwi"]


def test_what_stock_prediction_lacks_is_seen_before_it_starts() -> None:
    def said(*cases: list[str]) -> str:
        try:
            refuse_incomplete(cases, ".nii.gz", ("t1", "t2", "flair"))
        except PlainError as error:
            return str(error)
        return ""

    whole = [f"in/a_000{c}.nii.gz" for c in range(3)]
    assert said(whole, [name.replace("a_", "b_") for name in whole]) == ""
    assert said(["in/a_0000.nii.gz"], ["in/b_0000.nii.gz"]) == "", "one file may hold all channels"
    assert said(whole, ["in/b_0001.nii.gz"]).startswith("1 of 2 case(s) lack modalities: b (t1, flair). Nothing")
    assert said(["x.nii.gz", "y.nii.gz", "z.nii.gz"]) == "", "lists may have any names"
    assert "x (flair)" in said(["in/x.nii.gz", "in/y.nii.gz"])
