"""The report in a real browser: headless Chromium, driven by playwright. Skipped where either is missing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_cases import write_evaluation, write_volumes

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.presentation.report.sprites import choose_slices

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install 'nnunetv2-mgml[browser]')"
)
CHROMIUM = os.environ.get("MGML_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

NASTY = "a' onclick='x\"><img src=x onerror=alert(1)>"
OUR_OWN_READING = "Multiple readback operations using getImageData"
"""Chromium warns that these tests read the canvases more than once; the page itself does not."""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    cases = ["case_a", "case_b", "case_c"]
    write_evaluation(root / "evaluation", cases, info={"source": {"labels": str(root / "labelsTs")}})
    write_volumes(root, root / "evaluation", cases)
    (root / "imagesTs" / "case_b_0001.nii.gz").unlink()
    assert cli.main(["report", str(root / "evaluation"), "-i", str(root / "imagesTs"), "--title", NASTY]) == 0
    return root / "evaluation" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The opened page; fails at the end on any console message, script error, dialog or foreign request."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.set_default_timeout(60_000)
    opened = context.new_page()
    trouble: list[str] = []
    opened.on(
        "console",
        lambda message: (
            None if OUR_OWN_READING in message.text else trouble.append(f"console {message.type}: {message.text}")
        ),
    )
    opened.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: trouble.append(f"dialog: {dialog.message}"))
    opened.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("data:", report.as_uri()))
            else trouble.append(f"request: {request.url[:80]}")
        ),
    )
    opened.goto(report.as_uri())
    shown(opened)
    yield opened
    context.close()
    assert trouble == []


def shown(page: Any, *parts: str) -> str:
    """Wait until the viewer shows all of these (``case|subset|modality|slice``) and return what it shows."""
    page.wait_for_function(
        "parts => { const s = document.getElementById('viewer-app').dataset.shown; "
        "return s && parts.every(p => s.split('|').includes(p)); }",
        arg=list(parts),
    )
    return page.get_attribute("#viewer-app", "data-shown")


def colours(page: Any, canvas: str) -> np.ndarray:
    """Pixels of a canvas, ``(y, x, 3)``."""
    width, height, values = page.evaluate(
        "id => { const c = document.getElementById(id); "
        "return [c.width, c.height, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]; }",
        canvas,
    )
    return np.array(values).reshape(height, width, 4)[..., :3]


def coloured(page: Any, canvas: str) -> np.ndarray:
    """Where an overlay is, on the grid of the image (two canvas pixels per image pixel): not grey. ``(y, x)`` bool."""
    pixels = colours(page, canvas).astype(int)
    vivid = np.ptp(pixels, axis=2) > 40
    height, width = vivid.shape
    return vivid.reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3)) == 4


def test_page_loads_and_shows_something(page: Any, tmp_path: Path):
    assert page.inner_text("h1") == NASTY
    for picture in page.locator("main img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth > 100")
    assert page.is_visible("#viewer-app")
    for name in ("viewer-image", "viewer-reference", "viewer-prediction"):
        assert colours(page, name).std() > 20
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_viewer_draws_the_ground_truth_where_it_is(page: Any):
    page.uncheck("#viewer-outline")
    page.fill("#viewer-opacity", "100")
    assert shown(page, "case_a").split("|")[:3] == ["case_a", "dwi+adc+flair", "flair"]
    truth = coloured(page, "viewer-reference")
    np.testing.assert_array_equal(coloured(page, "viewer-prediction"), truth)  # all modalities: not shifted
    assert truth.sum() == 6 * 7
    page.select_option("#viewer-subset", "DWI")
    shown(page, "dwi")
    # the made-up prediction from one modality lies two pixels further down
    np.testing.assert_array_equal(coloured(page, "viewer-prediction"), np.roll(truth, 2, 0))
    np.testing.assert_array_equal(coloured(page, "viewer-reference"), truth)


def test_switches_work(page: Any):
    first = colours(page, "viewer-image")
    page.check("input[name=modality][value=dwi]")
    shown(page, "dwi")
    assert not np.array_equal(colours(page, "viewer-image"), first)
    page.select_option("#viewer-case", "case_c")
    assert shown(page, "case_c").split("|")[0] == "case_c"
    assert page.inner_text("#viewer-scores tbody tr >> nth=0").split("\t") == ["DWI", "50.00", "40.00"]
    page.fill("#viewer-slice", "0")
    labels = np.zeros((12, 2, 2), int)
    labels[4:8] = 1
    low = int(choose_slices([labels])[0])
    shown(page, str(low))
    assert page.inner_text("#viewer-slice-text") == f"{low + 1} of 12"
    assert not coloured(page, "viewer-reference").any()  # below the lesion
    page.click("#viewer-scores tbody tr:has-text('ADC + FLAIR') >> nth=0")
    shown(page, "adc+flair")
    assert page.inner_text("#viewer-prediction-text") == "Prediction from ADC + FLAIR"
    assert page.input_value("#viewer-subset") == str(
        page.locator("#viewer-subset option").all_inner_texts().index("ADC + FLAIR")
    )


def test_keys_move_through_slices_and_subsets(page: Any):
    start = int(shown(page).split("|")[3])
    page.focus("#viewer-panels")
    page.keyboard.press("ArrowUp")
    shown(page, str(start + 1))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    shown(page, str(start - 1))
    page.keyboard.press("ArrowRight")
    shown(page, "dwi")  # from the last subset on to the first
    page.keyboard.press("ArrowLeft")
    shown(page, "dwi+adc+flair")
    for _ in range(20):
        page.keyboard.press("ArrowUp")
    assert page.input_value("#viewer-slice") == page.get_attribute("#viewer-slice", "max")


def test_a_missing_modality_is_said(page: Any):
    page.select_option("#viewer-case", "case_b")
    page.check("input[name=modality][value=adc]")
    shown(page, "case_b", "adc")
    assert page.inner_text("#viewer-image-text") == "ADC is missing in this case"


def test_tables_sort(page: Any):
    def column(index: int) -> list[float]:
        cells = page.locator(f"#table-dice tbody td:nth-child({index + 1})").all_inner_texts()
        return [float(re.match(r"[\d.]+", cell).group()) for cell in cells]

    head = "#table-dice thead th:nth-child(5)"
    unsorted = column(4)
    page.click(f"{head} button")
    assert column(4) == sorted(unsorted)
    assert page.get_attribute(head, "aria-sort") == "ascending"
    page.focus(f"{head} button")
    page.keyboard.press("Enter")
    assert column(4) == sorted(unsorted, reverse=True)
    page.click("#table-dice thead th:nth-child(4) button")
    assert page.get_attribute(head, "aria-sort") is None
    assert column(3) == sorted(column(3))
    assert page.inner_text("#table-dice tfoot th") == "mean over subsets"
    page.click("summary:has-text('of each case')")
    page.click("#table-cases thead th:nth-child(1) button")
    page.click("#table-cases thead th:nth-child(1) button")
    assert page.locator("#table-cases tbody td:nth-child(1)").all_inner_texts() == ["case_c", "case_b", "case_a"]


def test_narrow_screens_do_not_scroll_sideways(page: Any):
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_without_javascript_tables_and_figures_are_there(browser: Any, report: Path):
    context = browser.new_context(java_script_enabled=False, offline=True)
    opened = context.new_page()
    opened.goto(report.as_uri())
    assert opened.locator("#table-dice tbody tr").count() == 7
    assert opened.is_visible("#table-dice")
    assert opened.is_visible("#figures img >> nth=0")
    assert opened.is_visible("#sheets img >> nth=0")
    assert not opened.is_visible("#viewer-app")
    assert opened.is_visible("noscript p") or "needs JavaScript" in opened.inner_text("#viewer")
    context.close()
