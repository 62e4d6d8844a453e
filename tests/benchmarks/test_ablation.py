"""The ablation of `benchmarks/ablation`: its settings are valid, and its tables say what the result files say."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from fusion_cases import own_designs

from nnunetv2_mgml.ext import mgml_trainers
from nnunetv2_mgml.modalities import BRATS_CHANNELS, all_subsets, subset_name
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.phantom import Difficulty

FOLDER = Path(__file__).parents[2] / "benchmarks" / "ablation"
MODULES = (
    "settings",
    "data",
    "collect",
    "pages",
    "equal_time_page",
    "whole_volume_page",
    "figure",
    "report",
    "run",
    "run_seconds",
)
SUBSETS = [subset_name(subset, BRATS_CHANNELS) for subset in all_subsets(4)]


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """The scripts as modules, with an empty results folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    loaded = {name: importlib.import_module(name) for name in MODULES}
    monkeypatch.setattr(loaded["settings"], "RESULTS", tmp_path)
    yield SimpleNamespace(**loaded, folder=tmp_path)
    for name in MODULES:
        del sys.modules[name]


def finish(ablation: SimpleNamespace, run: Any, dice: np.ndarray) -> None:
    """Write a result file; ``dice`` (regions, subsets, cases) in 0 to 1."""
    regions = ("whole_tumor", "tumor_core", "enhancing_tumor")
    subsets = run.subsets or SUBSETS
    content = {
        "resolved": run.resolved,
        "hours": {"training": 0.1, "evaluation": 0.01},
        "commit": "0" * 40,
        "code_changed": False,
        "versions": {"torch": "2"},
        "cases": [f"case_{number}" for number in range(dice.shape[2])],
        "dice": {r: {s: list(map(float, dice[i, j])) for j, s in enumerate(subsets)} for i, r in enumerate(regions)},
    }
    run.file.parent.mkdir(parents=True, exist_ok=True)
    run.file.write_text(json.dumps(content))


def test_settings_are_valid(ablation: SimpleNamespace) -> None:
    settings = ablation.settings.read_settings()
    runs = ablation.settings.all_runs(settings)
    assert len({run.file for run in runs}) == len(runs) == len({run.name for run in runs})
    for run in runs:
        Options().updated({k: v for k, v in run.options.items() if k not in ablation.settings.OF_PLANS})
        assert hasattr(mgml_trainers, run.trainer), run.trainer
        assert run.design in fusion_designs()
    Difficulty(**settings["datasets"]["phantom"]["difficulty"])
    counts = list(map(int, settings["datasets"]["phantom"]["split"].split(":")))
    assert sum(counts) == settings["datasets"]["phantom"]["cases"]
    assert counts[0] >= 60
    assert counts[2] >= 40
    with pytest.raises(ValueError, match="Allowed: main"):
        ablation.settings.all_runs(settings, ["mian"])


def test_a_result_counts_only_for_the_settings_it_was_made_with(ablation: SimpleNamespace) -> None:
    settings = ablation.settings.read_settings()
    run = ablation.settings.all_runs(settings, ["main"])[0]
    assert not run.finished()
    finish(ablation, run, np.zeros((3, 15, 4)))
    assert run.finished()
    assert [r.run.name for r in ablation.collect.finished(settings)] == [run.name]
    content = json.loads(run.file.read_text())
    for config, finished in (({"an_option": 1}, False), ({"temperature": None}, False), ({}, True)):
        stored = {**content["resolved"], "config": {**content["resolved"]["config"], **config}}
        run.file.write_text(json.dumps({**content, "resolved": stored}))
        assert run.finished() == finished
    del stored["config"]["temperature"]  # as if that option had come later
    run.file.write_text(json.dumps({**content, "resolved": stored}))
    assert run.finished()
    run.file.write_text(json.dumps(content))
    assert not replace(run, options={**run.options, "temperature": 3.0}).finished()
    assert not replace(run, dataset_settings={**run.dataset_settings, "seed": 1}).finished()


def test_difference_is_paired_by_seed_and_case(ablation: SimpleNamespace) -> None:
    settings = ablation.settings.read_settings()
    for run in ablation.settings.all_runs(settings, ["main"]):
        if run.variant in ("baseline", "mgml") and run.seed < 2:
            dice = np.random.default_rng(run.seed).random((3, 15, 4)) * 0.5
            finish(ablation, run, dice + (0.01 * (run.seed + 1) if run.variant == "mgml" else 0))
    results = ablation.collect.finished(settings)
    first, second = (ablation.collect.select(results, "main", variant=v) for v in ("baseline", "mgml"))
    change = ablation.collect.difference(first, second)
    assert change.per_seed == pytest.approx((1, 2))
    assert (change.mean, change.low, change.high) == pytest.approx((1.5, 1.5, 1.5))
    assert change.regions == pytest.approx({"WT": 1.5, "TC": 1.5, "ET": 1.5})
    assert set(change.subsets) == set(SUBSETS)
    assert ablation.collect.difference(first[:1], second[1:]) is None
    values = ablation.collect.statistics(second)
    means = [r.dice.mean() for r in second]
    assert values["mean"] == pytest.approx(np.mean(means))
    assert values["sd"] == pytest.approx(np.std(means, ddof=1))


def test_summary_and_page(ablation: SimpleNamespace) -> None:
    settings = ablation.settings.read_settings()
    assert "No finished runs yet." in ablation.pages.page(settings, [])
    for number, run in enumerate(ablation.settings.all_runs(settings)):
        cases = 3 if run.dataset_settings["kind"] == "real" else 4
        finish(ablation, run, np.full((3, len(run.subsets or SUBSETS), cases), 0.5 + 0.001 * number))
    results = ablation.collect.finished(settings)
    summary = ablation.report.summary(settings, results)
    cubes = summary.pop("cubes")
    assert set(summary) == set(own_designs()), "every design is in benchmarks/ablation/settings.json"
    of_main = set(settings["groups"]["main"]["variants"])
    assert set(summary["region_aware"]) == of_main
    others = set(settings["variants"]) - of_main
    assert all(name in settings["groups"]["brains"]["variants"] for name in others), "every variant is trained"
    assert set(summary["region_aware"]["mgml"]) == {"mean", "sd", "seeds", "WT", "TC", "ET"}
    assert {"modality_dropout", "baseline", "mgml"} <= set(cubes["region_aware"])
    for figures in cubes["region_aware"].values():
        assert set(figures) == {"mean", "sd", "seeds", "WT", "TC", "ET", "inversions", "by_count"}
        assert figures["mean"] == pytest.approx(sum(figures[r] for r in ("WT", "TC", "ET")) / 3, abs=0.02)
    assert summary["region_aware"]["baseline"]["seeds"] >= 3
    page = ablation.pages.page(settings, results)
    assert "No finished runs" not in page
    assert all(f"`{name}`" in page for name in (*settings["variants"], *own_designs()))
    assert "`teaching=better`" in page
    assert "`fusion_options={'grid': 4}`" in page
    weights = page.split("| complete_view_weight |")[1].split("\n\n")[0]
    assert [line.split(" | ")[0] for line in weights.splitlines()[2:]] == ["| 0", "| 0.1", "| 0.3", "| 1"]
    ablation.figure.draw(results, ablation.folder / "figure.png")
    assert (ablation.folder / "figure.png").stat().st_size > 10_000


def test_runs_of_equal_time_get_their_steps_by_the_table(
    ablation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `run_seconds.py` wrote; a step that was not timed is asked for."""
    settings = ablation.settings.read_settings()
    table = tmp_path / "seconds.json"
    monkeypatch.setattr(ablation.settings, "STEP_SECONDS", table)
    monkeypatch.setattr(ablation.run_seconds, "STEP_SECONDS", table)
    groups = ablation.settings.equal_time_groups(settings)
    assert groups == ["brains", "equal_time"]
    with pytest.raises(
        ValueError, match=r"has no step of baseline_full_resolution, baseline on brains; .*run_seconds.py"
    ):
        ablation.settings.all_runs(settings, ["brains"])
    seconds = {
        "baseline": 0.2,
        "mgml": 0.4,
        "modality_dropout": 0.1,
        "conditional_dropout": 0.16,
        "mgml_paper_terms": 0.3,
        "baseline_full_resolution": 0.25,
        "mgml_full_resolution": 0.5,
        "mgml_half_teacher": 0.35,
        "baseline_conditional": 0.25,
        "mgml_conditional": 0.5,
        "modality_dropout_narrow": 0.05,
        "conditional_dropout_narrow": 0.125,
        "baseline_narrow": 0.15,
        "mgml_narrow": 0.3,
        "baseline_shared": 0.2,
        "mgml_shared": 0.25,
    }
    ends = ("full_resolution", "half_teacher", "conditional", "narrow", "shared")
    full = {name for name in seconds if name.endswith(ends)}

    def train(run: Any, work: Path, log: Path) -> Path:
        assert (run.options["num_epochs"], run.options["num_iterations_per_epoch"]) == (3, 2)
        model = work / run.name
        (model / "fold_0").mkdir(parents=True)
        rows = "\n".join(f"{epoch},{2 * seconds[run.variant] * (9 if epoch == 0 else 1)}" for epoch in range(3))
        (model / "fold_0" / "mgml_training_log.csv").write_text(f"epoch,seconds\n{rows}\n")
        return model

    monkeypatch.setattr(ablation.run_seconds, "train", train)
    monkeypatch.setattr(ablation.run_seconds, "prepare", lambda work, data: None)
    command = ["run_seconds.py", "--work", str(tmp_path), "--epochs", "3", "--steps", "2", "--output", str(table)]
    monkeypatch.setattr(sys, "argv", command)
    ablation.run_seconds.main()
    measured = json.loads(table.read_text())["seconds"]
    assert {name: set(of) for name, of in measured.items()} == {
        "brains": {"baseline", "mgml", "modality_dropout", "conditional_dropout", *full},
        "phantom": set(seconds) - full,  # the baseline too, though its runs are another group's
    }
    assert measured["brains"]["mgml"]["median"] == pytest.approx(0.4), "the first epoch does not count"
    assert not list(tmp_path.glob("seconds_*")), "the models are not kept"
    steps = {r.variant: r.options["num_iterations_per_epoch"] for r in ablation.settings.all_runs(settings, ["brains"])}
    assert {name: steps[name] for name in full} == {
        "baseline_full_resolution": 50,
        "mgml_full_resolution": 25,
        "mgml_half_teacher": 36,
        "baseline_conditional": 50,
        "mgml_conditional": 25,
        "modality_dropout_narrow": 250,
        "conditional_dropout_narrow": 100,
        "baseline_narrow": 83,
        "mgml_narrow": 42,
        "baseline_shared": 62,
        "mgml_shared": 50,
    }
    assert {k: n for k, n in steps.items() if k not in full} == {
        "baseline": 62,
        "mgml": 31,
        "modality_dropout": 125,
        "conditional_dropout": 78,
    }
    monkeypatch.setattr(sys, "argv", [*command, "--groups", "brains", "--variants", "mgml"])
    seconds |= {"mgml": 0.8, "baseline": 0.9}
    ablation.run_seconds.main()
    again = json.loads(table.read_text())["seconds"]["brains"]
    assert [again[name]["median"] for name in ("mgml", "baseline")] == pytest.approx([0.8, 0.2]), "one is timed alone"
    beside = [*command, "--groups", "brains", "--variants", "mgml_narrow", "--beside"]
    monkeypatch.setattr(sys, "argv", [*beside, "baseline"])
    ablation.run_seconds.main()
    scaled = json.loads(table.read_text())["seconds"]["brains"]
    assert scaled["mgml_narrow"]["median"] == pytest.approx(0.3 * 0.2 / 0.9), "as if of the table's code"
    assert scaled["baseline"]["median"] == pytest.approx(0.2), "what it is scaled by stays"
    monkeypatch.setattr(sys, "argv", [*beside, "mgml_paper_terms"])
    with pytest.raises(SystemExit):
        ablation.run_seconds.main()
    monkeypatch.setattr(sys, "argv", [*command, "--groups", "brains", "--variants", "nobody"])
    with pytest.raises(SystemExit):
        ablation.run_seconds.main()
    of_main = {r.options["num_iterations_per_epoch"] for r in ablation.settings.all_runs(settings, ["main"])}
    assert of_main == {50}, "other groups are at equal steps"


def test_whole_brains_are_compared_on_the_folds_that_all_have(ablation: SimpleNamespace) -> None:
    settings = ablation.settings.read_settings()
    few = {"baseline", "mgml", "modality_dropout", "conditional_dropout"}
    runs = [run for run in ablation.settings.all_runs(settings, ["brains"]) if run.variant in few]

    def page() -> tuple[str, dict[str, list[str]]]:
        text = ablation.whole_volume_page.brains(settings, ablation.collect.finished(settings))
        rows = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `"))
        return text, {row[0]: row[1:] for row in rows}

    for run in runs:
        if run.variant == "modality_dropout" or (run.variant == "mgml" and run.fold == 2):
            continue
        dice = np.full((3, 15, 4), 0.5 + (0.05 if run.variant == "mgml" else 0))
        dice[:, :, run.fold] += 0.1
        dice[:, -1] -= 0.02  # all four score less than every subset of them
        finish(ablation, run, dice)
    text, rows = page()
    assert set(rows) == {"`baseline`", "`mgml`", "`conditional_dropout`"}
    assert "So far 2 of 3 folds, with 8 cases. Not finished: `modality_dropout`, `" in text
    assert rows["`mgml`"][-3:] == ["+5.00", "+5.00 to +5.00", "+5.00"]
    assert "3 of 3 folds, with 12 cases:" in text, "those that have more are shown on it as well"
    assert text.count("| `conditional_dropout` |") == 2
    assert rows["`baseline`"][-3:] == ["-", "-", "-"]
    mean, *_, one, two, three, four, inversions, seeds, _, _ = rows["`baseline`"][:-3]
    assert float(mean) == pytest.approx(52.5 - 2 / 15, abs=0.006)
    assert [one, two, three, four] == ["52.5", "52.5", "52.5", "50.5"]
    assert float(inversions) == pytest.approx(100 * 14 / 50, abs=0.06), "of 50 nested pairs the 14 below all four"
    assert seeds == "1"
    finish(ablation, next(r for r in runs if r.variant == "modality_dropout" and r.fold == 2), np.full((3, 15, 4), 0.5))
    text, rows = page()
    assert set(rows) == {"`baseline`", "`mgml`", "`conditional_dropout`", "`modality_dropout`"}, "no fold in common"
    assert "1 of 3 folds, with 4 cases:" in text
    assert "On what all of them have" not in text
    for run in runs:
        finish(ablation, run, np.full((3, 15, 4), 0.5))
    text, rows = page()
    assert set(rows) == {"`baseline`", "`mgml`", "`conditional_dropout`", "`modality_dropout`"}
    assert "So far" not in text
    rivals = ("modality_dropout_narrow", "conditional_dropout_narrow", "baseline_narrow", "mgml_narrow")
    others = (
        "mgml_half_teacher",
        "baseline_conditional",
        "mgml_conditional",
        *rivals,
        "baseline_shared",
        "mgml_shared",
    )
    told = ", ".join(f"`{name}`" for name in others)
    assert f"Not finished: `baseline_full_resolution`, `mgml_full_resolution`, {told}." in text
    assert "` against `" not in text, "nothing of the default yet"
    of_brains = ablation.settings.all_runs(settings, ["brains"])
    for run in of_brains:
        if run.variant == "mgml_shared" and run.seed == 0:
            finish(ablation, run, np.full((3, 15, 4), 0.5))
    assert "`mgml_shared` against `mgml`: +0.00, " in page()[0]
    for name in ("baseline_shared", "mgml_conditional", "baseline_conditional", *rivals[:2]):
        for run in [r for r in of_brains if r.variant == name and r.seed == 0][:2]:
            finish(ablation, run, np.full((3, 15, 4), 0.4 + run.fold / 50))
        told = rf"`mgml_shared` against `{name}`: \+9\.00, .* per fold \+10\.00 \+8\.00\."
        assert re.search(told, page()[0]) is not None


def test_results_of_before_are_of_a_decoder_at_full_resolution(ablation: SimpleNamespace) -> None:
    """What stands in no older result is what it was; of a stock network it says nothing."""
    settings = ablation.settings.read_settings()
    runs = {run.variant: run for run in ablation.settings.all_runs(settings, ["brains"]) if run.fold == 0}
    for run in runs.values():
        finish(ablation, run, np.full((3, 15, 4), 0.5))
        content = json.loads(run.file.read_text())
        content["resolved"]["config"].pop("modality_decoder_scale")
        run.file.write_text(json.dumps(content))
    of_today = {"baseline", "mgml", "mgml_half_teacher", "baseline_narrow", "mgml_narrow"}
    of_today |= {"baseline_conditional", "mgml_conditional", "baseline_shared", "mgml_shared"}
    assert {name for name, run in runs.items() if not run.finished()} == of_today


def test_a_narrow_stock_network_has_narrow_plans(
    ablation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The width is no option of the plugin: `mgml plan` gets it as features of nnU-Net's plans."""
    commands: list[list[str]] = []
    monkeypatch.setattr(ablation.run, "call", lambda work, log, command: commands.append(command))
    runs = {run.variant: run for run in ablation.settings.all_runs(ablation.settings.read_settings())}
    ablation.run.train(runs["conditional_dropout_narrow"], tmp_path, tmp_path / "log.txt")
    ablation.run.train(runs["conditional_dropout"], tmp_path, tmp_path / "log.txt")
    narrow, train, whole, _ = commands
    assert narrow[:2] == whole[:2] == ["mgml", "plan"]
    assert "features_per_stage=0.5" in narrow
    assert not any(word.startswith("features_per_stage") for word in whole)
    assert not any(ablation.settings.STOCK_WIDTH in word for word in narrow)
    assert "nnUNetTrainerModalityDropout_conditional" in train


def test_real_cases_are_asked_for_by_folder(
    ablation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MGML_REAL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"real cases \(brats2021\); it is not set"):
        ablation.data.write_real(tmp_path / "out", (2, 2, 2), ["brats2021"])
    monkeypatch.setenv("MGML_REAL_DATA", str(tmp_path))
    (tmp_path / "brats2021").mkdir()
    with pytest.raises(FileNotFoundError, match=r"without brats2018_2mm\."):
        ablation.data.write_real(tmp_path / "out", (2, 2, 2), ["brats2018_2mm", "brats2021"])


def test_only_one_subset_is_seen(ablation: SimpleNamespace) -> None:
    from nnunetv2_mgml.dataloading.masking import build_sampler

    sampler = build_sampler(Options().updated(ablation.settings.only("t1+t2")).sampling, BRATS_CHANNELS)
    rng = np.random.default_rng(0)
    drawn = sampler.sample(np.ones((200, 4), bool), rng)
    assert (drawn == [True, False, True, False]).all()


def test_resampling_keeps_extent_and_labels(ablation: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    labels = sitk.GetImageFromArray(rng.choice([0, 1, 2, 4], (15, 24, 24)).astype(np.uint8))
    image = sitk.GetImageFromArray(np.full((15, 24, 24), 100, np.int16))
    half = ablation.data.resampled(labels, (2, 2, 2), labels=True)
    assert half.GetSize() == (12, 12, 8)
    assert half.GetSpacing() == (2, 2, 2)
    assert set(np.unique(sitk.GetArrayFromImage(half))) == {0, 1, 2, 4}
    smooth = sitk.GetArrayFromImage(ablation.data.resampled(image, (2, 2, 2), labels=False))
    assert np.allclose(smooth[1:-1], 100, atol=1)


def test_rows_of_a_design_that_changed_are_marked(ablation: SimpleNamespace) -> None:
    """Version 0.1 kept no revision of the designs; old and new runs are never compared."""
    settings = ablation.settings.read_settings()
    runs = {(r.design, r.variant): r for r in ablation.settings.all_runs(settings, ["designs"])}
    assert set(settings["changed_designs"]) <= set(own_designs())
    for run in runs.values():
        finish(ablation, run, np.full((3, 15, 4), 0.5))
    for design, variant in (("uhved", "baseline"), ("uhved", "mgml"), ("sfusion", "mgml"), ("mean", "baseline")):
        file = runs[design, variant].file
        content = json.loads(file.read_text())
        del content["resolved"]["config"]["fusion_revision"]
        file.write_text(json.dumps(content))
    results = ablation.collect.finished(settings)
    page = ablation.pages.page(settings, results)
    rows = {line.split(" | ")[0][2:]: line for line in page.splitlines() if line.startswith("| `")}
    assert rows["`uhved`"].count("†") == 2
    assert "+0.00" in rows["`uhved`"]
    assert "†" not in rows["`mean`"], "a design that is as it was"
    assert [ablation.run.of_old_design(runs["uhved", v]) for v in ("baseline", "mgml")] == [True, True]
    pair = [ablation.collect.select(results, design="sfusion", variant=v) for v in ("baseline", "mgml")]
    assert ablation.collect.difference(*pair) is None
    assert "`sfusion`" not in rows


def test_every_table_marks_old_designs(ablation: SimpleNamespace) -> None:
    """Also those that show no means: Dice per subset, and the headroom."""
    settings = ablation.settings.read_settings()
    for run in ablation.settings.all_runs(settings, ["main", "headroom"]):
        finish(ablation, run, np.full((3, len(run.subsets or SUBSETS), 4), 0.5))
        content = json.loads(run.file.read_text())
        if run.variant != "mgml":
            content["resolved"]["config"].pop("fusion_revision", None)
        run.file.write_text(json.dumps(content))
    page = ablation.pages.page(settings, ablation.collect.finished(settings))
    heading = next(line for line in page.splitlines() if line.startswith("| present | "))
    assert heading == "| present | `modality_dropout` | `baseline` † | `mgml_paper_terms` † | `mgml` |"
    rows = page.split("## Headroom")[1].split("\n## ")[0].splitlines()
    rows = [row for row in rows if row.startswith("| t1 |")]
    assert [row.count("†") for row in rows] == [2]


def test_the_readme_marks_what_the_page_marks() -> None:
    """Figures of the ablation in README.md stand with the same sign in docs/results.md."""
    root = FOLDER.parents[1]
    page, readme = ((root / name).read_text() for name in ("docs/results.md", "README.md"))
    figures = re.findall(r"\| (\d\d\.\d\d ± \d\.\d\d(?: [†‡])*) \|", readme)
    assert len(figures) >= 4
    assert [figure for figure in figures if f"| {figure} |" not in page] == []
    assert ("†" in "".join(figures)) == ("marked †" in readme)
