"""``mgml report``: what the page says, that it is whole in itself, and what the viewer is given."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_cases import SHAPE, score, write, write_evaluation, write_volumes
from report_page import VOID, Page, assert_self_contained, tiles

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.presentation.report.charts import Picture
from nnunetv2_mgml.presentation.report.page import Pictures, Viewer, build_page, viewer_data
from nnunetv2_mgml.scoring.metrics import get_metric

CASES = ["case_a", "case_b", "case_c"]
NASTY = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``evaluation`` with predictions, ``imagesTs``, ``labelsTs``; case_b lacks a modality."""
    root = tmp_path_factory.mktemp("report")
    info = {"source": {"kind": "predictions", "labels": str(root / "labelsTs")}}
    write_evaluation(root / "evaluation", CASES, info=info)
    write_volumes(root, root / "evaluation", CASES)
    (root / "imagesTs" / "case_b_0001.nii.gz").unlink()
    return root


@pytest.fixture(scope="module")
def page(evaluated: Path) -> tuple[str, Page]:
    output = evaluated / "out" / "page.html"
    assert (
        cli.main(
            [
                "report",
                str(evaluated / "evaluation"),
                "-i",
                str(evaluated / "imagesTs"),
                "-o",
                str(output),
                "--title",
                "A & B",
                "--max_cases",
                "2",
            ]
        )
        == 0
    )
    assert [file.name for file in output.parent.iterdir()] == ["page.html"]
    text = output.read_text(encoding="utf-8")
    return text, assert_self_contained(text)


# --- the page ---


def test_page_has_summary_tables_figures_and_viewer(page: tuple[str, Page]):
    _, parsed = page
    assert ("title", "A & B") in parsed.texts
    assert {a["id"] for a in parsed.find("section")} == {"summary", "tables", "figures", "viewer", "sheets"}
    assert [a["id"] for a in parsed.find("table", **{"class": "sortable"})] == [
        "table-dice",
        "table-cases",
        "table-worth",
        "table-inversions",
        "table-hd95",
    ]
    pictures = parsed.find("img")
    assert len(pictures) == 3 + 1 + 2  # charts, overview of the cases, one sheet per case
    assert all(a["alt"] for a in pictures)
    seen = " ".join(text for _, text in parsed.texts)
    for expected in ("7 of 7", "Shapley", "policy 'nan'", "radiological", "2 of 3 cases", "lesion (labels 1, 2)"):
        assert expected in seen, expected


def test_page_without_images_has_no_viewer(evaluated: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", str(evaluated / "evaluation")]) == 0
    file = evaluated / "evaluation" / "report.html"
    assert str(file) in capsys.readouterr().out
    parsed = assert_self_contained(file.read_text(encoding="utf-8"))
    assert {a["id"] for a in parsed.find("section")} == {"summary", "tables", "figures"}
    assert file.stat().st_size < 1_000_000


def test_controls_have_labels(page: tuple[str, Page]):
    _, parsed = page
    for tag in ("select", "input", "canvas"):
        assert parsed.find(tag)
    stack: list[str] = []
    labelled = []

    class Nesting(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag in ("select", "input"):
                labelled.append("label" in stack)
            if tag not in VOID:
                stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            stack.pop()

    Nesting().feed(page[0])
    assert len(labelled) == 5
    assert all(labelled)
    assert all(a.get("aria-label") for a in parsed.find("canvas"))
    assert all(a.get("scope") == "col" for a in parsed.find("th") if "colspan" not in a)


def test_names_from_outside_cannot_inject_html(tmp_path: Path):
    info = {"model": {"folder": NASTY}, "source": {"labels": NASTY}}
    evaluation = write_evaluation(tmp_path, [NASTY, "b"], info=info)
    picture = Picture(NASTY, NASTY, "data:image/png;base64,AAAA")
    text = build_page(evaluation, NASTY, Pictures(charts=[picture]))
    parsed = assert_self_contained(text)
    assert NASTY not in text
    assert not [a for a in parsed.find("img") if a["src"] == "x"]
    assert len(parsed.find("script")) == 1
    assert ("title", NASTY) in parsed.texts
    assert any(a["alt"] == f"{NASTY}. {NASTY}" for a in parsed.find("img"))


def test_nasty_case_name_stays_inside_the_viewer_data(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, [NASTY])
    data = viewer_data(
        evaluation,
        get_metric("dice"),
        [{"name": NASTY, "sides": None}],
        {1: NASTY, 2: "b"},
        {1: "#000000", 2: "#ffffff"},
    )
    text = build_page(evaluation, "t", Pictures(), Viewer(data, NASTY))
    parsed = assert_self_contained(text)
    assert parsed.viewer()["cases"][0]["name"] == NASTY
    assert len(parsed.find("script")) == 3  # data, tables, viewer


# --- the viewer's data ---


def test_viewer_gets_every_case_subset_and_modality(page: tuple[str, Page], evaluated: Path):
    data = page[1].viewer()
    assert [case["name"] for case in data["cases"]] == ["case_a", "case_c"]
    names = [subset_name(s, ("dwi", "adc", "flair")) for s in all_subsets(3)]
    assert [s["name"] for s in data["subsets"]] == names
    assert data["titles"] == {"dwi": "DWI", "adc": "ADC", "flair": "FLAIR"}
    assert [label["name"] for label in data["labels"]] == ["lesion without core", "core"]
    for case in data["cases"]:
        assert set(case["images"]) == {"dwi", "adc", "flair"}
        assert set(case["predictions"]) == set(case["scores"]) == set(names)
        assert case["slices"][case["best"]] in (5, 6)
        assert case["depth"] == SHAPE[0]
        assert tiles(case, case["predictions"]["dwi"]).any()
    assert data["cases"][0]["scores"]["adc"]["core"] == f"{100 * score(0, (False, True, False), 'core'):.2f}"


def test_a_case_may_lack_modalities_and_predictions(evaluated: Path, tmp_path: Path):
    lost = evaluated / "evaluation" / "predictions" / "adc" / "case_b.nii.gz"
    kept = lost.read_bytes()
    lost.unlink()
    try:
        assert (
            cli.main(
                [
                    "report",
                    str(evaluated / "evaluation"),
                    "-i",
                    str(evaluated / "imagesTs"),
                    "-o",
                    str(tmp_path / "r.html"),
                    "--cases",
                    "case_b",
                ]
            )
            == 0
        )
    finally:
        lost.write_bytes(kept)
    [case] = assert_self_contained((tmp_path / "r.html").read_text()).viewer()["cases"]
    assert set(case["images"]) == {"dwi", "flair"}
    assert "adc" not in case["predictions"]
    assert len(case["predictions"]) == 6


def test_size_is_bounded_and_said(evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def run(megabytes: str) -> int:
        return cli.main(
            [
                "report",
                str(evaluated / "evaluation"),
                "-i",
                str(evaluated / "imagesTs"),
                "-o",
                str(tmp_path / "r.html"),
                "--max_megabytes",
                megabytes,
            ]
        )

    assert run("15") == 0
    cases = Page((tmp_path / "r.html").read_text()).viewer()["cases"]
    one = len(json.dumps(cases[0]))
    assert run(str(1.5 * one / 1e6)) == 0
    parsed = Page((tmp_path / "r.html").read_text())
    assert len(parsed.viewer()["cases"]) == 1
    assert any("2 did not fit" in text for _, text in parsed.texts)
    assert "case_b" in caplog.text


def test_images_of_the_evaluation_are_used_unless_unwanted_or_gone(evaluated: Path, tmp_path: Path, capsys, caplog):
    def sections(folder: str, *extra: str) -> set[str | None]:
        info = {"source": {"kind": "folder", "images": folder, "labels": str(evaluated / "labelsTs")}}
        write_evaluation(tmp_path / "e", CASES, info=info)
        shutil.copytree(evaluated / "evaluation" / "predictions", tmp_path / "e" / "predictions", dirs_exist_ok=True)
        assert cli.main(["report", str(tmp_path / "e"), *extra]) == 0
        return {a["id"] for a in Page((tmp_path / "e" / "report.html").read_text()).find("section")}

    images = str(evaluated / "imagesTs")
    assert "viewer" in sections(images)
    assert "viewer" not in sections(images, "--no_images")
    assert "with images" not in capsys.readouterr().out.splitlines()[-1]
    assert "viewer" not in sections(str(tmp_path / "gone"))
    assert "no longer in" in caplog.text


def test_without_predictions_there_is_no_viewer_unless_it_is_asked_for(evaluated: Path, tmp_path: Path, capsys, caplog):
    info = {"source": {"kind": "folder", "images": str(evaluated / "imagesTs"), "labels": str(evaluated / "labelsTs")}}
    write_evaluation(tmp_path / "e", CASES, info=info)
    advice = (
        f"No predictions: {tmp_path / 'e' / 'predictions'} does not exist. Name the folders with -i, -l, "
        f"--predictions and --dataset_json, or ask for a page without images with --no_images."
    )
    assert cli.main(["report", str(tmp_path / "e")]) == 0
    assert [record.message for record in caplog.records] == [f"No slice viewer. {advice}"]
    assert "with images" not in capsys.readouterr().out
    sections = Page((tmp_path / "e" / "report.html").read_text()).find("section")
    assert {a["id"] for a in sections} == {"summary", "tables", "figures"}
    for asked in (["-i", str(evaluated / "imagesTs")], ["--cases", "case_a"], ["--internals"]):
        assert cli.main(["report", str(tmp_path / "e"), *asked]) == 2
        assert capsys.readouterr().err == f"error: {advice}\n"
    assert cli.main(["report", str(tmp_path / "e"), "--no_images"]) == 0


def test_images_are_found_as_by_the_evaluation(evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Under the names of BraTS, in a folder per case, and by a sheet."""
    for case in CASES:
        (tmp_path / "brats" / case).mkdir(parents=True)
        shutil.copy(evaluated / "imagesTs" / f"{case}_0002.nii.gz", tmp_path / "brats" / case / f"{case}_flair.nii.gz")
    rows = [f"{case},brats/{case}/{case}_flair.nii.gz" for case in CASES]
    (tmp_path / "sheet.csv").write_text("\n".join(["case,flair", *rows]) + "\n")
    for source in ("brats", "sheet.csv"):
        source_info = {"kind": "folder", "images": str(tmp_path / source), "labels": str(evaluated / "labelsTs")}
        folder = tmp_path / f"evaluation of {source}"
        write_evaluation(folder, CASES, info={"source": source_info})
        shutil.copytree(evaluated / "evaluation" / "predictions", folder / "predictions")
        assert cli.main(["report", str(folder)]) == 0
        assert "viewer" in {a["id"] for a in Page((folder / "report.html").read_text()).find("section")}
    assert "viewer" not in caplog.text


def test_a_case_that_cannot_be_shown_is_left_out_unless_it_is_asked_for(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    shutil.copytree(evaluated / "imagesTs", tmp_path / "images")
    for file in (tmp_path / "images").glob("case_a*"):
        file.unlink()
    info = {"source": {"kind": "folder", "images": str(tmp_path / "images"), "labels": str(evaluated / "labelsTs")}}
    write_evaluation(tmp_path / "e", CASES, info=info)
    shutil.copytree(evaluated / "evaluation" / "predictions", tmp_path / "e" / "predictions")
    assert cli.main(["report", str(tmp_path / "e")]) == 0
    assert "Not in the viewer: Case case_a: no image" in caplog.text
    assert "The viewer holds 2 of 3 cases" in (tmp_path / "e" / "report.html").read_text()
    assert cli.main(["report", str(tmp_path / "e"), "--cases", "case_a", "case_b"]) == 2
    assert "error: Case case_a: no image" in capsys.readouterr().err
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    assert cli.main(["report", str(tmp_path / "e")]) == 0
    assert "No slice viewer: no case can be shown" in caplog.text
    sections = Page((tmp_path / "e" / "report.html").read_text()).find("section")
    assert {a["id"] for a in sections} == {"summary", "tables", "figures"}


def test_comparison_draws_predictions_side_by_side(evaluated: Path, tmp_path: Path, capsys):
    for name in ("A", "B"):
        info = {
            "source": {"kind": "folder", "images": str(evaluated / "imagesTs"), "labels": str(evaluated / "labelsTs")}
        }
        write_evaluation(tmp_path / name, CASES, info=info)
        shutil.copytree(evaluated / "evaluation" / "predictions", tmp_path / name / "predictions")
    command = ["compare", str(tmp_path / "A"), str(tmp_path / "B"), "--names", "ours", "theirs", "-o"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "figures" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "B" / "predictions")
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path / "none")]) == 0
    assert f"side by side: No predictions: {tmp_path / 'B' / 'predictions'} does not exist." in capsys.readouterr().out
    assert not (tmp_path / "none" / "figures" / "predictions.png").exists()


def test_comparison_is_not_written_into_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("A", "B", "C"):
        write_evaluation(tmp_path / name, CASES)
        (tmp_path / name / "table.md").write_text(f"of {name}")
    (tmp_path / "link").symlink_to(tmp_path / "A")
    command = ["compare", str(tmp_path / "A"), str(tmp_path / "B"), "--names", "ours", "theirs", "-o"]
    for name, why in (("A", "one of the compared"), ("link", "one of the compared"), ("C", "holds an evaluation")):
        assert cli.main([*command, str(tmp_path / name)]) == 2
        assert f"-o {tmp_path / name} {'is ' if 'one' in why else ''}{why}" in capsys.readouterr().err
    for name in ("A", "B", "C"):
        assert (tmp_path / name / "table.md").read_text() == f"of {name}"
        assert not (tmp_path / name / "comparison.csv").exists()


# --- errors ---


def test_nothing_but_a_page_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evaluation = tmp_path / "evaluation"
    write_evaluation(evaluation, CASES)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, message in (
        ("evaluation/results.csv", "is no name of a page: it must end in .html or .htm"),
        ("new", "or be a folder that exists"),
        ("mine.html", "exists and was not written by mgml report"),
    ):
        assert cli.main(["report", str(evaluation), "-o", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_gets_a_page_of_the_usual_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_evaluation(tmp_path / "evaluation", CASES)
    (tmp_path / "pages").mkdir()
    for _ in range(2):  # the second replaces the first
        assert cli.main(["report", str(tmp_path / "evaluation"), "-o", str(tmp_path / "pages")]) == 0
        assert f"report: {tmp_path / 'pages' / 'report.html'}" in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "evaluation"), "-o", str(tmp_path / "pages" / "A.HTM")]) == 0
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == ["A.HTM", "report.html"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--cases", "nobody"], "no case nobody"),
        (["-l", "/nowhere"], "/nowhere does not exist"),
        (["--max_cases", "0"], "error: --max_cases must be at least 1, got 0. For no viewer use --no_images.\n"),
        (["--max_megabytes", "0.0001"], "Not even one case"),
        (["--predictions", "/nowhere"], "/nowhere does not exist"),
        (["--training_log", "/nowhere.csv"], "/nowhere.csv"),
        (["--internals"], "names no model"),
        (["--internals", "nobody"], "error: The evaluation has no case nobody. It has: case_a, case_b, case_c.\n"),
        (["-f", "3"], "error: -f would change what --internals shows. Give --internals too, or leave it out.\n"),
        (["-m", "x", "-chk", "y", "-device", "cuda", "--trust_checkpoint"], "-m, -chk, -device, --trust_checkpoint"),
    ],
)
def test_mistakes_are_named(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
):
    output = tmp_path / "r.html"
    assert (
        cli.main(
            ["report", str(evaluated / "evaluation"), "-i", str(evaluated / "imagesTs"), "-o", str(output), *extra]
        )
        == 2
    )
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--cases", "case_a"], "--cases"),
        (["-l", "labels", "--max_cases", "2"], "-l, --max_cases"),
        (["--predictions", "p", "--dataset_json", "d", "--max_megabytes", "1"], "--predictions, --dataset_json, --max"),
    ],
)
def test_no_images_and_what_only_a_viewer_uses(
    evaluated: Path, capsys: pytest.CaptureFixture[str], extra: list[str], named: str
) -> None:
    assert cli.main(["report", str(evaluated / "evaluation"), "--no_images", *extra]) == 2
    assert f"--no_images wants no slice viewer, which is what {named}" in capsys.readouterr().err


def test_cases_without_known_images(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(evaluated / "evaluation"), "--cases", "case_a"]) == 2
    assert "error: The images of the evaluation are not known. Name the folders with -i" in capsys.readouterr().err


def test_volumes_on_another_grid_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_evaluation(tmp_path / "evaluation", ["a"])
    write_volumes(tmp_path, tmp_path / "evaluation", ["a"])
    write(tmp_path / "imagesTs" / "a_0001.nii.gz", np.zeros((3, 4, 5), np.int16))
    arguments = ["report", str(tmp_path / "evaluation"), "-i", str(tmp_path / "imagesTs")]
    assert cli.main(arguments) == 2
    assert "does not say where its label maps are. Name the folders with -i, -l" in capsys.readouterr().err
    assert cli.main([*arguments, "-l", str(tmp_path / "labelsTs")]) == 2
    assert "Case a: adc has shape (3, 4, 5)" in capsys.readouterr().err


def test_training_log_becomes_a_figure(evaluated: Path, tmp_path: Path):
    log = tmp_path / "mgml_training_log.csv"
    log.write_text("epoch,lr,train_total,w_f\n0,0.01,2.0,0.5\n1,0.009,1.5,0.6\n")
    assert (
        cli.main(["report", str(evaluated / "evaluation"), "-o", str(tmp_path / "r.html"), "--training_log", str(log)])
        == 0
    )
    assert ("figcaption", "Losses, meta-parameters and pseudo Dice over 2 epochs.") in Page(
        (tmp_path / "r.html").read_text()
    ).texts
