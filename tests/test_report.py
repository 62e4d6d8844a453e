"""``mgml report``: what the page says, that it is whole in itself, and what the viewer is given."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_cases import DATASET, SHAPE, score, write, write_evaluation, write_volumes

from nnunetv2_mgml import cli
from nnunetv2_mgml.evaluation.metrics import get_metric
from nnunetv2_mgml.evaluation.report import content, sprites
from nnunetv2_mgml.evaluation.report.cases import CaseVolumes, spread_cases
from nnunetv2_mgml.evaluation.report.charts import Picture
from nnunetv2_mgml.evaluation.report.page import Pictures, Viewer, build_page, viewer_data
from nnunetv2_mgml.evaluation.report.sheets import label_names, telling_subsets
from nnunetv2_mgml.modalities import all_subsets, subset_name

CASES = ["case_a", "case_b", "case_c"]
NASTY = "<img src=x onerror=alert(1)>\"'</script><script>alert(2)</script>"
VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Collects tags with attributes, checks nesting, and keeps texts by the tag they are in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    def viewer(self) -> dict[str, Any]:
        """The viewer's data as the script will read it."""
        index = next(i for i, (t, a) in enumerate(self.tags) if a.get("id") == "viewer-data")
        assert self.tags[index][1]["type"] == "application/json"
        return json.loads(next(text for tag, text in self.texts if tag == "script" and text.startswith("{")))


def assert_self_contained(text: str) -> Page:
    """Nothing in the page may be fetched from anywhere."""
    page = Page(text)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    assert not page.find("iframe") + page.find("object") + page.find("embed")
    styles = " ".join(t for tag, t in page.texts if tag == "style")
    scripts = " ".join(t for tag, t in page.texts if tag == "script" and not t.startswith("{"))
    assert not re.search(r"@import|url\(", styles)
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(|eval\(|innerHTML", scripts)
    [policy] = [a["content"] for a in page.find("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    return page


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
    assert cli.main(["report", str(evaluated / "evaluation"), "-i", str(evaluated / "imagesTs"), "-o", str(output),
                     "--title", "A & B", "--max_cases", "2"]) == 0
    assert [file.name for file in output.parent.iterdir()] == ["page.html"]
    text = output.read_text(encoding="utf-8")
    return text, assert_self_contained(text)


# --- the page ---


def test_page_has_summary_tables_figures_and_viewer(page: tuple[str, Page]):
    _, parsed = page
    assert ("title", "A & B") in parsed.texts
    assert {a["id"] for a in parsed.find("section")} == {"summary", "tables", "figures", "viewer", "sheets"}
    assert [a["id"] for a in parsed.find("table", **{"class": "sortable"})] == [
        "table-dice", "table-cases", "table-worth", "table-hd95"]
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
    data = viewer_data(evaluation, get_metric("dice"), [{"name": NASTY}], {1: NASTY, 2: "b"},
                       {1: "#000000", 2: "#ffffff"})
    text = build_page(evaluation, "t", Pictures(), Viewer(data, NASTY))
    parsed = assert_self_contained(text)
    assert parsed.viewer()["cases"][0]["name"] == NASTY
    assert len(parsed.find("script")) == 3  # data, tables, viewer


# --- numbers ---


def test_numbers_of_the_page_are_those_of_the_evaluation(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    metric = content.headline_metric(evaluation)
    table = content.subset_table(evaluation, metric)
    assert table.heads == ["DWI", "ADC", "FLAIR", "n", "lesion", "core", "mean"]
    for row, subset in zip(table.rows, evaluation.subsets, strict=True):
        assert [cell.text for cell in row[:3]] == ["●" if on else "○" for on in subset]
        expected = [100 * np.mean([score(i, subset, region) for i in range(3)]) for region in ("lesion", "core")]
        assert [row[4].key, row[5].key] == pytest.approx(expected)
        assert row[6].key == pytest.approx(np.mean(expected))
        assert row[4].note == " ± 2.00"
    full = [100 * np.mean([score(i, s, "lesion") for i in range(3)]) for s in evaluation.subsets]
    assert table.foot[0].key == pytest.approx(np.mean(full))
    cases = content.case_table(evaluation, metric)
    assert [row[0].text for row in cases.rows] == CASES
    assert cases.rows[1][1].key == pytest.approx(100 * score(1, (True,) * 3, "lesion"))
    assert cases.rows[0][4].text == "ADC"  # the first of the two worst single modalities
    worth = content.worth_by_region(evaluation, metric)
    assert sum(value.shapley for value in worth["lesion"].values()) == pytest.approx(
        100 * np.mean([score(i, (True,) * 3, "lesion") for i in range(3)]))
    headline = content.findings(evaluation, metric)
    assert headline[0].label == "mean Dice with all modalities"
    assert headline[-1].value == "DWI"


def test_missing_values_and_subsets_are_left_out(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES, subsets=[(True, False, False), (True, True, True)])
    metric = content.headline_metric(evaluation)
    assert content.worth_table(evaluation, metric) is None
    evaluation.table.loc[evaluation.table["subset"] == "dwi", "value"] = np.nan
    table = content.subset_table(evaluation, metric)
    assert table.rows[0][-1] == content.Cell("n/a", "")
    assert [f.label for f in content.findings(evaluation, metric)] == ["mean Dice with all modalities",
                                                                       "mean Dice over 2 subsets"]
    assert_self_contained(build_page(evaluation, "partial", Pictures()))


def test_four_brats_modalities_follow_the_papers_row_order(tmp_path: Path):
    dataset = {**DATASET, "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}
    table = content.subset_table(write_evaluation(tmp_path, CASES, dataset), get_metric("dice"))
    assert table.heads[:4] == ["FLAIR", "T1ce", "T1", "T2"]
    assert [[c.text for c in row[:4]].index("●") for row in table.rows[:4]] == [0, 1, 2, 3]


def test_only_distances_are_not_enough(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    only = evaluation.table[evaluation.table["metric"] == "hd95"]
    with pytest.raises(ValueError, match="more is better"):
        content.headline_metric(type(evaluation)("x", only, evaluation.channels, evaluation.regions, "nan"))


def test_cases_are_spread_from_worst_to_best(tmp_path: Path):
    names = [f"c{i}" for i in range(9)]
    evaluation = write_evaluation(tmp_path, names)
    metric = content.headline_metric(evaluation)
    assert spread_cases(evaluation, metric, 3) == ["c0", "c4", "c8"]
    assert spread_cases(evaluation, metric, 1) == ["c4"]
    assert spread_cases(evaluation, metric, 99) == names


def test_label_names_say_what_a_label_is_in_overlapping_regions(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    assert label_names(evaluation) == {1: "lesion without core", 2: "core"}
    brats = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    four = write_evaluation(tmp_path / "b", CASES, {**DATASET, "labels": brats, "regions_class_order": [1, 2, 3]})
    assert label_names(four) == {1: "WT without TC", 2: "TC without ET", 3: "ET"}


@pytest.mark.parametrize(("modalities", "count"), [(2, 3), (3, 7), (4, 9), (5, 6), (6, 7)])
def test_sheets_show_single_modalities_one_missing_and_all(tmp_path: Path, modalities: int, count: int):
    dataset = {**DATASET, "channel_names": {str(i): f"m{i}" for i in range(modalities)}}
    evaluation = write_evaluation(tmp_path, ["a"], dataset)
    chosen = telling_subsets(evaluation)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen[-1] == (True,) * modalities
    assert chosen[:modalities] == all_subsets(modalities)[:modalities]


# --- the viewer's data ---


def decode(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def tiles(case: dict[str, Any], uri: str) -> np.ndarray:
    """Cut a sprite as viewer.js does, ``(n, y, x)``."""
    sheet = decode(uri)
    result = []
    for index in range(len(case["slices"])):
        top = index // case["columns"] * case["tileHeight"]
        left = index % case["columns"] * case["tileWidth"]
        result.append(sheet[top:top + case["height"], left:left + case["width"]])
    return np.array(result)


@given(depth=st.integers(1, 90), extent=st.tuples(st.integers(0, 89), st.integers(0, 89)), most=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_chosen_slices_are_few_even_and_hold_the_best(depth: int, extent: tuple[int, int], most: int):
    labels = np.zeros((depth, 3, 3), int)
    low, high = sorted(min(e, depth - 1) for e in extent)
    labels[low:high + 1, 1, 1] = 1
    labels[(low + high) // 2] = 1
    chosen = sprites.choose_slices([labels, np.zeros_like(labels)], most)
    assert 1 <= len(chosen) <= most
    assert (low + high) // 2 in chosen
    assert len(set(np.diff(chosen))) <= 1
    assert chosen.min() >= max(low - sprites.MARGIN, 0)
    assert chosen.max() <= min(high + sprites.MARGIN, depth - 1)


def test_sprites_hold_the_very_labels_and_nearly_the_image():
    rng = np.random.default_rng(0)
    reference = np.zeros((6, 30, 41), np.uint8)
    reference[1:5, 5:25, 8:33] = rng.choice([0, 1, 2, 4], size=(4, 20, 25))
    smooth = np.cumsum(np.cumsum(rng.normal(size=reference.shape), 1), 2)
    image = 300 + 50 * smooth / np.abs(smooth).max()
    volumes = CaseVolumes("c", {"dwi": image}, reference, {"dwi": np.roll(reference, 2, 2)}, (1.0, 2.0, 0.5))
    case = sprites.viewer_case(volumes, [1, 2, 4])
    assert case["aspect"] == 4.0
    assert case["factor"] == 1
    step = sprites.grey_step([1, 2, 4])
    ranks = np.round(tiles(case, case["reference"]) / step).astype(int)
    np.testing.assert_array_equal(np.array([0, 1, 2, 4])[ranks], reference[case["slices"]])
    shown = tiles(case, case["images"]["dwi"]).astype(float)
    expected = np.clip((image - np.percentile(image, 0.5)) / np.ptp(np.percentile(image, (0.5, 99.5))) * 255, 0, 255)
    assert np.abs(shown - expected[case["slices"]]).mean() < 4


def test_large_slices_are_reduced_and_masks_stay_aligned():
    labels = np.zeros((1, 600, 512), np.uint8)
    labels[0, 300:420, 90:180] = 1
    volumes = CaseVolumes("c", {"ct": labels * 100.0 + 1}, labels, {"ct": labels}, (1.0, 1.0, 1.0))
    case = sprites.viewer_case(volumes, [1])
    assert case["factor"] == 3
    assert max(case["height"], case["width"]) <= sprites.MAX_SIDE
    mask = tiles(case, case["reference"])[0] > 0
    bright = tiles(case, case["images"]["ct"])[0] > 128
    assert mask.sum() == 40 * 30
    assert (mask != bright).mean() < 0.01


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
        assert cli.main(["report", str(evaluated / "evaluation"), "-i", str(evaluated / "imagesTs"), "-o",
                         str(tmp_path / "r.html"), "--cases", "case_b"]) == 0
    finally:
        lost.write_bytes(kept)
    [case] = assert_self_contained((tmp_path / "r.html").read_text()).viewer()["cases"]
    assert set(case["images"]) == {"dwi", "flair"}
    assert "adc" not in case["predictions"]
    assert len(case["predictions"]) == 6


def test_size_is_bounded_and_said(evaluated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def run(megabytes: str) -> int:
        return cli.main(["report", str(evaluated / "evaluation"), "-i", str(evaluated / "imagesTs"), "-o",
                         str(tmp_path / "r.html"), "--max_megabytes", megabytes])

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


def test_comparison_draws_predictions_side_by_side(evaluated: Path, tmp_path: Path, capsys):
    for name in ("A", "B"):
        info = {"source": {"kind": "folder", "images": str(evaluated / "imagesTs"),
                           "labels": str(evaluated / "labelsTs")}}
        write_evaluation(tmp_path / name, CASES, info=info)
        shutil.copytree(evaluated / "evaluation" / "predictions", tmp_path / name / "predictions")
    command = ["compare", str(tmp_path / "A"), str(tmp_path / "B"), "--names", "ours", "theirs", "-o"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "figures" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(tmp_path / "B" / "predictions")
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path / "none")]) == 0
    assert "the predictions of 'theirs' are no longer there" in capsys.readouterr().out
    assert not (tmp_path / "none" / "figures" / "predictions.png").exists()


# --- errors ---


@pytest.mark.parametrize(("extra", "message"), [
    (["--cases", "nobody"], "no case nobody"), (["-l", "/nowhere"], "/nowhere does not exist"),
    (["--max_cases", "0"], "--max_cases must be at least 1"), (["--max_megabytes", "0.0001"], "Not even one case"),
    (["--predictions", "/nowhere"], "/nowhere does not exist"),
    (["--training_log", "/nowhere.csv"], "/nowhere.csv"), (["--internals"], "names no model")])
def test_mistakes_are_named(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str],
                            message: str):
    output = tmp_path / "r.html"
    assert cli.main(["report", str(evaluated / "evaluation"), "-i", str(evaluated / "imagesTs"), "-o", str(output),
                     *extra]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_volumes_on_another_grid_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_evaluation(tmp_path / "evaluation", ["a"])
    write_volumes(tmp_path, tmp_path / "evaluation", ["a"])
    write(tmp_path / "imagesTs" / "a_0001.nii.gz", np.zeros((3, 4, 5), np.int16))
    arguments = ["report", str(tmp_path / "evaluation"), "-i", str(tmp_path / "imagesTs")]
    assert cli.main(arguments) == 2
    assert "where its label maps are; give the folder with -l" in capsys.readouterr().err
    assert cli.main([*arguments, "-l", str(tmp_path / "labelsTs")]) == 2
    assert "Case a: adc has shape (3, 4, 5)" in capsys.readouterr().err


def test_training_log_becomes_a_figure(evaluated: Path, tmp_path: Path):
    log = tmp_path / "mgml_training_log.csv"
    log.write_text("epoch,lr,train_total,w_f\n0,0.01,2.0,0.5\n1,0.009,1.5,0.6\n")
    assert cli.main(["report", str(evaluated / "evaluation"), "-o", str(tmp_path / "r.html"), "--training_log",
                     str(log)]) == 0
    assert ("figcaption", "Losses, meta-parameters and pseudo Dice over 2 epochs.") in Page(
        (tmp_path / "r.html").read_text()).texts
