"""The trainings on the cubes: what they draw, how they are scored, and a run from the command line."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_mgml.dataloading.masking import SubsetSampler
from nnunetv2_mgml.modalities import all_subsets

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = (
    "step",
    "cubes_variants",
    "cubes_data",
    "cubes_scores",
    "cubes_specialists",
    "cubes_training",
    "cubes_table",
    "cubes_goals",
    "equal_time_page",
    "cubes_figure",
    "cubes_work",
    "cubes",
    "case_quality_page",
)
SMALL = "patch=16,stages=3"


@pytest.fixture
def cubes(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    for folder in (FOLDER, FOLDER / "ablation"):
        monkeypatch.syspath_prepend(str(folder))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``MGML_REAL_DATA`` names it, with 24 made-up patients of 20^3 voxels."""
    root = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    labels = np.zeros((24, 20, 20, 20), np.uint8)
    for label, edge in ((2, 12), (1, 8), (4, 4)):
        labels[:, 10 - edge // 2 : 10 + edge // 2, 4 : 4 + edge, 4 : 4 + edge] = label
    images = rng.integers(1, 60, (24, 4, 20, 20, 20)) + 40 * labels[:, None]
    images[:, :, :2] = 0
    (root / "brats2020_cubes").mkdir()
    names = np.array([f"patient_{n:03}" for n in range(24)])
    np.savez(root / "brats2020_cubes" / "cubes.npz", images=images.astype(np.uint8), labels=labels, patients=names)
    return root


def test_cubes_are_normalised_inside_the_brain(cubes: SimpleNamespace, folder: Path) -> None:
    read = cubes.cubes_data.read_cubes(folder / "brats2020_cubes" / "cubes.npz")
    assert read.images.shape == (24, 4, 20, 20, 20)
    assert (read.images[:, :, :2] == 0).all()
    inside = read.images[:, :, 2:].flatten(2)
    assert torch.allclose(inside.mean(2), torch.zeros(24, 4), atol=1e-4)
    assert torch.allclose(inside.std(2), torch.ones(24, 4), atol=1e-2)
    assert [int(n) for n in read.regions[0].flatten(1).sum(1)] == [12**3, 8**3, 4**3]


def test_split_depends_on_names_and_seed_alone(cubes: SimpleNamespace) -> None:
    names = [f"patient_{n:03}" for n in range(288)]
    parts = cubes.cubes_data.split(names)
    assert {part: len(cases) for part, cases in parts.items()} == {"test": 60, "validation": 36, "train": 192}
    assert sorted(case for cases in parts.values() for case in cases) == list(range(288))
    backwards = cubes.cubes_data.split(names[::-1])
    assert {names[::-1][case] for case in backwards["test"]} == {names[case] for case in parts["test"]}
    assert cubes.cubes_data.split(names, seed=1) != parts


def test_longer_trainings_begin_with_the_same_draws(cubes: SimpleNamespace) -> None:
    sampler = SubsetSampler("uniform_subset", (0.5,) * 4)
    short, long = (cubes.cubes_data.draw([3, 5, 8], steps, 2, 16, 20, sampler, seed=4) for steps in (10, 25))
    assert all(torch.equal(one, two[:10]) for one, two in zip(short, long, strict=True))
    assert set(long.case.flatten().tolist()) == {3, 5, 8}
    assert long.visible.any(2).all()
    assert (long.start >= 0).all()
    assert (long.start <= 4).all()


def test_patients_lack_modalities_at_the_published_rates(cubes: SimpleNamespace) -> None:
    """A patient lacks the same in every training, and nobody everything; a fixed sampler hides nothing beside."""
    data = cubes.cubes_data
    patients = [f"patient_{n:03}" for n in range(288)]
    has = data.left_by_rate(patients)
    rates = dict(zip(data.CHANNELS, 1 - has.mean(0), strict=True))
    assert rates == pytest.approx(data.MISSING_RATES, abs=0.07)
    assert has.any(1).all()
    np.testing.assert_array_equal(data.left_by_rate(patients[100:110]), has[100:110])
    for kind in ("fixed", "uniform_subset"):
        draws = data.draw(list(range(288)), 200, 2, 16, 20, SubsetSampler(kind, (0.5,) * 4), seed=4, has=has)
        np.testing.assert_array_equal(draws.available, has[draws.case])
        assert torch.equal(draws.visible, draws.available) == (kind == "fixed")
        assert not (draws.visible & ~draws.available).any()
        assert draws.visible.any(2).all()


def test_patches_are_flipped_and_scaled_inside_the_brain(cubes: SimpleNamespace) -> None:
    images = torch.arange(2 * 4 * 5**3).reshape(2, 4, 5, 5, 5).float()
    images[0, :, 4] = 0
    data = cubes.cubes_data.Cubes(images, images[:, :3] % 7 == 0, ["a", "b"])
    draws = cubes.cubes_data.Draws(
        torch.tensor([0, 1]),
        torch.tensor([[1, 0, 2], [0, 1, 1]]),
        torch.tensor([[True, False, True], [False, True, False]]),
        torch.tensor([[2.0] * 4, [1.0] * 4]),
        torch.tensor([[1.0] * 4, [0.0] * 4]),
        torch.ones(2, 4, dtype=torch.bool),
        torch.ones(2, 4, dtype=torch.bool),
    )
    patches, regions = cubes.cubes_data.cut(data, draws, 3)
    first = images[0, :, 1:4, 0:3, 2:5].flip(1, 3)
    assert torch.equal(patches[0], torch.where(first != 0, 2 * first + 1, 0))
    assert torch.equal(patches[1], images[1, :, 0:3, 1:4, 1:4].flip(2))
    assert torch.equal(regions[1], data.regions[1, :, 0:3, 1:4, 1:4].flip(2))
    whole, _ = cubes.cubes_data.cut(data, draws._replace(start=torch.zeros(2, 3, dtype=torch.int64)), 5)
    assert (whole[0, :, 0] == 0).all(), "outside the brain stays zero"


def test_dice_follows_the_rules(cubes: SimpleNamespace) -> None:
    scores = cubes.cubes_scores
    logits = torch.full((1, 3, 4, 4, 4), -1.0)
    logits[0, 2, 0, 0, :3] = 1  # three voxels of enhancing tumour: none
    predicted = scores.to_regions(logits)
    assert predicted.sum((2, 3, 4)).tolist() == [[3, 3, 0]]
    logits[0, 2, 0, 0, 3] = 1
    assert scores.to_regions(logits).sum((2, 3, 4)).tolist() == [[4, 4, 4]]
    empty, some = torch.zeros(4, 4, 4, dtype=torch.bool), predicted[0, 0]
    assert scores.dice_of(empty, empty) == 1
    assert scores.dice_of(some, empty) == 0
    assert scores.dice_of(some, some | (torch.arange(64) == 63).reshape(4, 4, 4)) == pytest.approx(6 / 7)


def test_inversions_count_nested_pairs(cubes: SimpleNamespace) -> None:
    subsets = all_subsets(4)
    counts = np.array([sum(subset) for subset in subsets])
    rising = np.broadcast_to(counts / 10, (3, 2, 15)).swapaxes(1, 2)
    assert cubes.cubes_scores.inversions(rising, subsets, 0.01) == 0
    assert cubes.cubes_scores.inversions(1 - rising, subsets, 0.01) == 100
    assert cubes.cubes_scores.inversions(1 - rising / 50, subsets, 0.01) == 0, "less than a point"
    assert cubes.cubes_scores.inversions(1 - rising / 50, subsets, 0) == 100
    assert cubes.cubes_scores.inversions(rising[:, :1], subsets[:1], 0) is None
    told = cubes.cubes_scores.summary(rising, subsets)
    assert told["by_count"] == {"1": 10, "2": 20, "3": 30, "4": 40}
    assert told["mean"] == pytest.approx(1000 * counts.mean() / 100, abs=1e-3)


def test_variants(cubes: SimpleNamespace) -> None:
    run = cubes.cubes_variants.Run("baseline:learning_rate=0.005,only=t1+flair,temperature=3", 1, 100)
    assert (run.training["learning_rate"], run.training["only"]) == (0.005, "t1+flair")
    assert run.options["temperature"] == 3
    assert run.options["soft_label"] == "none"
    assert run.subsets == [(True, False, False, True)]
    assert run.file_name() == "baseline_learning_rate_0.005_only_t1+flair_temperature_3__100__seed1.json"
    assert cubes.cubes_variants.Run("mgml", 1, 100).file_name(equal_time=True) == "mgml__100_equal_time__seed1.json"


def test_the_array_of_jobs_is_the_whole_table(cubes: SimpleNamespace, tmp_path: Path) -> None:
    runs = cubes.cubes_variants.whole_table([0, 1, 2], 6000)
    assert len({(run.name, run.seed) for run in runs}) == len(runs)
    alone = [run for run in runs if cubes.cubes_specialists.of_subset(run.name)]
    assert {run.name.partition(":")[0] for run in alone} == {cubes.cubes_goals.SPECIALISTS}, "those the goals read"
    assert sorted(run.subsets[0] for run in alone if run.seed == 0) == sorted(all_subsets(4))
    assert sum(run.seed > 0 for run in alone) == 2 * 5, "five of them with three seeds"
    few = [run for run in runs if run.training["patients"] == 30]
    assert {run.timed_as for run in few} == set(cubes.cubes_variants.SETTINGS["variants"]) - {"passion"}
    lacking = [run.timed_as for run in runs if run.training["lacking"]]
    assert set(lacking) == {"baseline", "mgml", "modality_dropout", "passion"}
    script = (FOLDER / "ablation" / "cubes.sbatch").read_text()
    assert f"#SBATCH --array=0-{len(runs) - 1}\n" in script
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    known = {"MGML_REAL_DATA": "data", "SLURM_ARRAY_TASK_ID": "7", "PYTHON": str(python), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", FOLDER / "ablation" / "cubes.sbatch"],
        env={**known, "SLURM_SUBMIT_DIR": str(FOLDER.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    script_file, *arguments = done.stdout.split()
    assert (FOLDER.parent / script_file).is_file()
    args = cubes.cubes.parser().parse_args(arguments)
    assert (args.job, args.table, args.test, args.equal_time) == (7, True, True, "baseline")
    assert args.output == Path("cubes_work/7")
    with pytest.raises(ValueError, match="Allowed: modality_dropout, conditional_dropout, baseline"):
        _ = cubes.cubes_variants.Run("basline", 0, 1).training


def finished(cubes: SimpleNamespace, variant: str, seed: int, values: np.ndarray, **more: Any) -> dict[str, Any]:
    """A result with Dice ``(R, S, N)`` in [0, 1] on test patients."""
    subsets = all_subsets(4)
    told = {"test": cubes.cubes_scores.summary(values, subsets), "dice": cubes.cubes_scores.cases_of(values, subsets)}
    base = {"nominal_steps": 100, "steps": 100, "equal_time": None, "seconds_per_step_alone": 0.0123, "device": "a GPU"}
    return {"variant": variant, "seed": seed, "commit": "abc", "code_changed": False, **base, **told, **more}


def test_table_pairs_by_seed_and_patient(cubes: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    baselines = [rng.random((3, 15, 8)) * 0.9 for _ in range(3)]
    results = [finished(cubes, "baseline", seed, values) for seed, values in enumerate(baselines)]
    better = [values + 0.01 * (seed + 1) for seed, values in enumerate(baselines[:2])]
    results += [finished(cubes, "mgml", seed, values) for seed, values in enumerate(better)]
    results.append(finished(cubes, "mgml", 0, better[0], equal_time="baseline", steps=80))
    text = cubes.cubes_table.tables(results, "test")
    same_steps, same_time = text.split("The time of 100 steps of baseline, test patients")
    row = next(line for line in same_steps.splitlines() if line.startswith("| `mgml`"))
    assert row.endswith("| 2 | 100 | 12.3 | 1.23 | +1.50 | +1.50 to +1.50 | +1.00 +2.00 |")
    assert " | 80 | 12.3 | 0.984 | - | - | - |" in same_time, "the baseline of another budget is none"
    assert "a GPU; commit abc." in same_steps
    means = [line.split(" | ")[1] for line in same_steps.splitlines() if line.startswith("| `")]
    assert [" ± " in mean for mean in means] == [True, False], "of two seeds there is no deviation worth telling"
    assert "No finished runs yet" in cubes.cubes_table.tables(results, "validation")
    variant, other = cubes.cubes_table.PAIRS[0]
    assert f"`{variant}` against" not in text
    results += [finished(cubes, other, seed, values) for seed, values in enumerate(baselines)]
    results += [finished(cubes, variant, 2, baselines[2] + 0.03)]
    text = cubes.cubes_table.tables(results, "test")
    assert f"`{variant}` against `{other}`: +3.00, 95 % interval +3.00 to +3.00; per seed +3.00." in text
    full = "modality_decoder_scale=0"
    older = [finished(cubes, f"baseline:{full}", 0, baselines[0]), finished(cubes, f"mgml:{full}", 0, better[0])]
    assert cubes.cubes_table.tables(older, "test").splitlines()[5].endswith("| +1.00 | +1.00 to +1.00 | +1.00 |")
    text = cubes.cubes_table.tables([*older, finished(cubes, "baseline", 0, better[0])], "test")
    assert [line.split(" | ")[-3] for line in text.splitlines()[4:]] == ["-1.00", "+0.00", "-"], "where there is one"


def test_results_are_what_their_names_say(cubes: SimpleNamespace) -> None:
    """So that no finished training is repeated; of two ideas the code is gone."""
    gone = ("complete_first=", "conditional=")
    for file in sorted((FOLDER / "ablation" / "results" / "cubes").glob("*/*.json")):
        content = json.loads(file.read_text())
        run = cubes.cubes_variants.Run(content["variant"], content["seed"], content["nominal_steps"])
        assert file.name == run.file_name(bool(content["equal_time"]))
        if not any(name in run.name for name in gone):
            assert content["options"] == run.options, file.name
            known = {**cubes.cubes_variants.SETTINGS["training"], **content["training"]}
            assert known == run.training, file.name
            scale = (content["resolved"] or {}).get("modality_decoder_scale")  # a stock network has none
            assert scale in (None, 0 if "modality_decoder_scale=0" in run.name else 1)
            norms = (content["resolved"] or {}).get("conditional_norms", False)
            assert norms is ("conditional_norms=true" in run.name)


def test_trainings_of_few_patients_are_a_table_of_their_own(
    cubes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose baseline had as few; and a result of uncommitted code is marked."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 15, 8)) * 0.5
    few = {"training": {"patients": 30, "only": None}, "equal_time": "baseline"}
    results = [finished(cubes, "baseline", 0, values + 0.2, training={"patients": None}, equal_time="baseline")]
    results += [
        finished(cubes, f"{name}:patients=30", 0, values + more, **few)
        for name, more in (("baseline", 0), ("mgml", 0.01))
    ]
    results += [finished(cubes, "mgml:temperature=3,patients=30", 0, values - 0.01, **few, code_changed=True)]
    (tmp_path / "cpu").mkdir()
    for number, result in enumerate(results):
        (tmp_path / "cpu" / f"{number}.json").write_text(json.dumps(result))
    monkeypatch.setattr(cubes.cubes_table, "RESULTS", tmp_path)
    text = cubes.cubes_table.tables(cubes.cubes_table.read("cpu"), "test")
    assert "The time of 100 steps of baseline, 30 patients to train, test patients" in text
    assert "commits abc, abc* (* with uncommitted changes)" in text
    rows = [line for line in text.splitlines() if line.startswith("| `mgml")]
    assert [(row.split(" | ")[0], row.split(" | ")[-3]) for row in rows] == [
        ("| `mgml`", "+1.00"),
        ("| `mgml:temperature=3`", "-1.00"),
    ]
    assert len(cubes.cubes_table.headline_budget()[1]) == 1, "the goals are of all patients"


def test_specialists_beside_one_model(cubes: SimpleNamespace) -> None:
    """Rows in the order of the subsets, paired by patient, means over seeds; none of them in the main table."""
    rng = np.random.default_rng(0)
    subsets, t1, all_four = all_subsets(4), (True, False, False, False), (True,) * 4
    one = rng.random((3, 15, 8)) * 0.8
    results = [finished(cubes, "conditional_dropout", seed, one + 0.02 * seed) for seed in (0, 1)]
    for name, subset, ahead in (("t1+t1ce+t2+flair", all_four, 0.05), ("t1", t1, -0.01)):
        values = one[:, [subsets.index(subset)]] + ahead
        told = {"test": cubes.cubes_scores.summary(values, [subset])}
        told["dice"] = cubes.cubes_scores.cases_of(values, [subset])
        results.append({**results[0], "variant": f"modality_dropout:only={name}", **told})
    results.append({**results[-1], "variant": "modality_dropout:only=t1,patients=30"})
    text = cubes.cubes_table.tables(results, "test")
    assert "| `modality_dropout:only=t1`" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| t1", "| mean of"))]
    assert [row.split(" | ")[0] for row in rows] == ["| t1", "| t1+t1ce+t2+flair", "| mean of these 2"]
    assert [row.split(" | ", 3)[3].split(" | ", 1)[1] for row in rows] == [
        "-2.00 | -2.00 to -2.00 |",  # 1 behind the first seed, 3 behind the second
        "+4.00 | +4.00 to +4.00 |",
        "+1.00 | +1.00 to +1.00 |",
    ]
    told = cubes.cubes_specialists.gap(results)
    assert told == {
        "model": "conditional_dropout",
        "specialists": "modality_dropout",
        "mean": 1.0,
        "subsets": {"t1": -2.0, "t1+t1ce+t2+flair": 4.0},
    }
    assert cubes.cubes_specialists.gap(results[:2]) is None
    assert cubes.cubes_specialists.gap(results[2:]) is None


def test_the_headline_is_of_the_budget_with_specialists(
    cubes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer training of one model alone does not become the table that the page begins with; it stands beside."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 15, 8)) * 0.5
    about = {"equal_time": "baseline", "training": {"patients": None, "only": None}, "curve": []}
    about["validation"] = {"mean": 50.0}
    results = [finished(cubes, "baseline", 0, values, **about)]
    results += [
        finished(cubes, "conditional_dropout", 0, values + better, nominal_steps=steps, steps=2 * steps, **about)
        for steps, better in ((50, 0.0), (100, 0.02), (400, 0.06))
    ]
    (tmp_path / "cpu").mkdir()
    monkeypatch.setattr(cubes.cubes_table, "RESULTS", tmp_path)

    def headline() -> str:
        for number, result in enumerate(results):
            (tmp_path / "cpu" / f"{number}.json").write_text(json.dumps(result))
        words: str = cubes.cubes_table.headline_budget()[0]
        return words

    assert headline().startswith("the time of 400 steps"), "the largest while there are no specialists"
    assert "trained for shorter" not in cubes.equal_time_page.cubes()
    t1 = (True, False, False, False)
    of_t1 = values[:, [all_subsets(4).index(t1)]] + 0.05
    alone = {"test": cubes.cubes_scores.summary(of_t1, [t1]), "dice": cubes.cubes_scores.cases_of(of_t1, [t1])}
    results.append({**results[0], **alone, "variant": "modality_dropout:only=t1"})
    assert headline().startswith("the time of 100 steps of baseline, ")
    page = cubes.equal_time_page.cubes()
    rows = [line.split(" | ") for line in page.split("trained for shorter")[1].splitlines() if line.startswith("| ")]
    assert [(row[1], row[-2]) for row in rows[1:]] == [("0.5", "+5.00"), ("1", "+3.00"), ("4", "-1.00")]
    assert "At equal *steps*" not in page
    longer = {**about, "curve": [{"step": 200, "mean": 40.0}, {"step": 600, "mean": 60.0}]}
    results[3] |= {"curve": [{"step": 400, "mean": 45.0}, {"step": 800, "mean": 65.0}]}
    results.append(finished(cubes, cubes.cubes_goals.DEFAULT, 0, values + 0.05, nominal_steps=400, steps=600, **longer))
    headline()
    page = cubes.equal_time_page.cubes()
    assert "At equal *steps* of the longest trainings, 600, the default has 60.0 and `conditional_dropout` 55.0" in page
    rows = [line.split(" | ") for line in page.split("trained for shorter")[1].splitlines() if line.startswith("| ")]
    assert [(row[0], row[1], row[-2]) for row in rows[4:5]] == [(f"| `{cubes.cubes_goals.DEFAULT}`", "4", "+0.00")]
    order = [line for line in page.splitlines() if line.startswith("The time of ")]
    assert order[0].startswith("The time of 100 steps"), "the table with most runs comes first"


def test_goals_are_held_against_what_was_measured(cubes: SimpleNamespace) -> None:
    """Paired by seed; a seed that never gets there, a region behind, a model that is missing are told."""
    rng = np.random.default_rng(0)
    baseline, default = cubes.cubes_variants.BASELINE, cubes.cubes_variants.DEFAULT
    t1, makers = (True, False, False, False), (cubes.cubes_scores.summary, cubes.cubes_scores.cases_of)
    subsets, values = all_subsets(4), [rng.random((3, 15, 8)) * 0.5 + 0.2 for _ in range(3)]
    of_dropout = [each + rng.normal(0, 0.002, each.shape) for each in values]

    def curve(*dice: float) -> list[dict[str, float]]:
        return [{"step": 25 * (n + 1), "mean": mean} for n, mean in enumerate(dice)]

    results = [finished(cubes, baseline, s, each, curve=curve(30, 35, 39, 40)) for s, each in enumerate(values)]
    results += [finished(cubes, "modality_dropout", s, each) for s, each in enumerate(of_dropout)]
    behind = values[0] + 0.02
    behind[2] -= 0.03  # two regions 2 points ahead, the third 1 behind
    results.append(finished(cubes, default, 0, behind, curve=curve(10, 20, 30, 39.9)))
    ahead = [finished(cubes, "conditional_dropout", s, values[s] + 0.04, curve=curve(20, 41, 45)) for s in (1, 2)]
    results += ahead
    of_t1 = np.mean(values[1:], 0)[:, [subsets.index(t1)]] + 0.043
    alone = {name: make(of_t1, [t1]) for name, make in zip(("test", "dice"), makers, strict=True)}
    results.append({**results[0], **alone, "variant": "modality_dropout:only=t1"})
    changes = {default: SimpleNamespace(mean=1.0, low=-0.1, high=2.0), "conditional_dropout": None}
    lines = cubes.cubes_goals.table(results, changes).splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    by_goal = {row[0]: row[1:] for row in rows}
    assert by_goal["at least 1.5 ahead of the baseline, interval above 0"] == [
        "+1.00 (+1.00 to +1.00)", "**no**", "+4.00 (+4.00 to +4.00)", "yes",
    ]  # fmt: skip
    rival = by_goal["at least 3 ahead of modality dropout, interval above 0"]
    assert [rival[1], rival[3]] == ["**no**", "yes"]
    assert by_goal["the baseline's final Dice in at most half of its time"] == [
        "never",
        "**no**",
        "after 0.25 to 0.50 of it",
        "yes",
    ]
    later = [{**r, "curve": curve(20, 30, 41)} if r["variant"] == "conditional_dropout" else r for r in results]
    assert "after 0.50 to 0.75 of it | **no** |" in cubes.cubes_goals.table(later, {})
    between = [{**r, "curve": curve(20, 41) if r["seed"] == 1 else curve(20, 30, 41)} for r in ahead]
    told = cubes.cubes_goals.table([*results[:6], *between], {})
    assert "after 0.38 to 0.62 of it | open |" in told, "nobody looked at the half"
    assert by_goal["no region and no number of modalities behind the baseline"][:2] == ["-1.00 (ET)", "**no**"]
    assert by_goal["no region and no number of modalities behind the baseline"][3] == "yes"
    assert by_goal["at most 0.5 behind the specialists"][2:] == ["0.30 (0.30 to 0.30), 1 of 15", "yes"]
    assert by_goal["fewer inversions than the baseline"][3] == "**no**", "as many are not fewer"
    assert by_goal["ahead of the baseline on whole brains, interval above 0"] == [
        "+1.00 (-0.10 to +2.00)", "**no**", "not measured", "-",
    ]  # fmt: skip
    half = [
        finished(cubes, "conditional_dropout", s, values[0], nominal_steps=50, validation={"mean": mean})
        for s, mean in ((1, 41.0), (2, 40.0), (3, 10.0))
    ]
    known = [{**r, "validation": {"mean": 40.0}} if r["variant"] == baseline else r for r in results]
    assert "41.0 for 40.0, 40.0 for 40.0 in half of it | yes |" in cubes.cubes_goals.table(known, {}, half)
    half[0]["validation"]["mean"] = 39.9
    told = cubes.cubes_goals.table(known, {}, half)
    assert "| never | **no** | 39.9 for 40.0, 40.0 for 40.0 in half of it | **no** |" in told
    without = cubes.cubes_goals.table(ahead, {})
    assert without.count("not measured | - ") == 14
    assert "yes" not in without


def test_figure_has_curves_and_what_every_subset_scores(
    cubes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A marked curve per variant, its seeds thinly, a column of points per variant, a bar per specialist."""
    rng = np.random.default_rng(0)
    points = [{"step": step, "mean": 50.0 + step} for step in (1, 2)]
    about = {"training": {"only": None}, "curve": points, "seconds_per_step_alone": 6.0, "device": "CUDA"}
    results = [finished(cubes, name, seed, rng.random((3, 15, 4)), **about) for name in "ab" for seed in (0, 1)]
    alone = {"test": cubes.cubes_scores.summary(rng.random((3, 1, 4)), [(True, False, False, False)])}
    results.append({**results[0], **alone, "variant": "modality_dropout:only=t1", "training": {"only": "t1"}})
    drawn: list[Any] = []
    monkeypatch.setattr(cubes.cubes_figure, "save", lambda figure, path: drawn.extend(figure.axes))
    cubes.cubes_figure.draw(results, tmp_path / "cubes.png")
    left, right = drawn
    assert [len(line.get_xdata()) for line in left.lines] == [2] * 6
    assert list(left.lines[2].get_xdata()) == pytest.approx([0.1, 0.2])
    assert [line.get_label() for line in right.lines] == ["a", "b", "modality_dropout, one model for each subset"]
    of_seeds = [r["test"]["subsets"]["t1"] for r in results[:2]]
    assert right.lines[0].get_xdata()[0] == pytest.approx(np.mean(of_seeds))
    assert list(right.lines[2].get_ydata()) == [0]


def test_a_step_on_a_cpu_is_as_long_as_its_equal_time_took_it(
    cubes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run measured beside others does not count where the table was measured on the idle machine."""
    table = tmp_path / "seconds.json"
    table.write_text(json.dumps({"seconds": {"baseline": {"median": 0.5}}}))
    monkeypatch.setattr(cubes.cubes_table, "STEP_SECONDS", table)
    result = {"variant": "mgml", "seed": 0, "nominal_steps": 10, "steps": 8, "equal_time": "baseline"}
    result.update(seconds_per_step_alone=0.9, device="CPU, 1 thread")
    assert cubes.cubes_table.seconds_per_step(result) == pytest.approx(0.5 * 10 / 8)
    for change in ({"equal_time": None}, {"device": "NVIDIA"}, {"equal_time": "mgml"}):
        assert cubes.cubes_table.seconds_per_step({**result, **change}) == 0.9
    told = {**result, "seconds_per_step": 0.7}
    assert cubes.cubes_table.seconds_per_step(told) == 0.7, "the table may be of another machine by now"


def test_steps_are_never_fewer_than_the_time_allows(cubes: SimpleNamespace, folder: Path) -> None:
    data = cubes.cubes_data.read_cubes(folder / "brats2020_cubes" / "cubes.npz")
    run = cubes.cubes_variants.Run(f"baseline:{SMALL}", 0, 2)
    training = cubes.cubes_training.Training(run, data, range(20), capacity=5)
    training.set_steps(5)
    with pytest.raises(ValueError, match="would do 6 steps, but draws were made for 5"):
        training.set_steps(6)


def result_of(run: Any, **changes: Any) -> dict[str, Any]:
    """What a run writes, as far as it matters for whether it is finished."""
    about = {"training": run.training, "options": run.options, "finished": True, "device": "CPU, 1 thread"}
    known = {"variant": run.name, "seed": run.seed, "nominal_steps": run.steps, "equal_time": None}
    return {**known, **about, "cut": False, **changes}


def test_a_result_is_finished_when_it_has_all_that_is_asked_for(
    cubes: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cubes.cubes, "RESULTS", tmp_path)
    run = cubes.cubes_variants.Run("mgml", 0, 100)
    (tmp_path / "cpu").mkdir()

    def finished_with(result: dict[str, Any], *arguments: str) -> bool:
        (tmp_path / "cpu" / run.file_name()).write_text(json.dumps(result))
        answer: bool = cubes.cubes.finished(run, "cpu", cubes.cubes.parser().parse_args(arguments))
        return answer

    assert finished_with(result_of(run))
    assert not finished_with(result_of(run), "--test"), "it was not scored on test patients"
    assert finished_with(result_of(run, test={}), "--test")
    cut = result_of(run, cut=True)
    assert not finished_with(cut), "its steps are fewer than asked for"
    assert finished_with(cut, "--seconds", "100")
    of_a_gpu = result_of(run, device="NVIDIA H200")
    del of_a_gpu["cut"]
    assert not finished_with(of_a_gpu)
    assert not finished_with(result_of(run, options={"temperature": 3}))


def test_a_stopped_call_loses_no_finished_run(
    cubes: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one whose part it left, nor one that ended while others went on."""
    results, parts = tmp_path / "results", tmp_path / "parts"
    parts.mkdir()
    monkeypatch.setattr(cubes.cubes, "RESULTS", results)
    names = [f"baseline:{SMALL}", f"mgml:{SMALL}"]
    runs = [cubes.cubes_variants.Run(name, 0, 4) for name in names]
    left = parts / cubes.cubes.part_name("eager", runs[:1], False)
    left.write_text(json.dumps([result_of(runs[0]), result_of(runs[1], device="NVIDIA")]))
    started: list[str] = []

    class Process:
        """Does a run at once; while it does the second one the call is stopped."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            worker = json.loads(command[command.index("--worker") + 1])
            started.append(worker[0][0])
            if len(started) > 1:
                raise KeyboardInterrupt
            run = cubes.cubes_variants.Run(*worker[0])
            Path(command[command.index("--part") + 1]).write_text(json.dumps([result_of(run)]))

        def wait(self, timeout: float | None) -> None:
            pass

    monkeypatch.setattr(cubes.cubes.subprocess, "Popen", Process)
    command = ["cubes.py", "--variants", *names, f"complete_view:{SMALL}", "--steps", "4", "--parallel", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(parts)])
    with pytest.raises(KeyboardInterrupt):
        cubes.cubes.main()
    assert started == [names[1], f"complete_view:{SMALL}"], "the first was there already"
    assert sorted(file.name for file in (results / "cpu").iterdir()) == sorted(run.file_name() for run in runs)
    monkeypatch.setattr(sys, "argv", [*command, "--job", "3"])
    with pytest.raises(SystemExit):
        cubes.cubes.main()


def test_two_trainings_of_one_seed_are_the_same_and_learn(cubes: SimpleNamespace, folder: Path) -> None:
    data = cubes.cubes_data.read_cubes(folder / "brats2020_cubes" / "cubes.npz")
    run = cubes.cubes_variants.Run(f"mgml:{SMALL}", 0, 6)
    first = cubes.cubes_training.Training(run, data, range(20))
    first.advance(6)
    second = cubes.cubes_training.Training(run, data, range(20))
    second.advance(6)
    assert torch.equal(first.losses, second.losses)
    assert first.losses[-1] < first.losses[0]
    assert float(first.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.002 * (1 / 6) ** 0.9)


def test_passion_knows_how_rare_modalities_are_and_learns_from_every_epoch(
    cubes: SimpleNamespace, folder: Path
) -> None:
    data = cubes.cubes_data.read_cubes(folder / "brats2020_cubes" / "cubes.npz")
    run = cubes.cubes_variants.Run(f"passion:lacking=true,ramp_up_fraction=0,{SMALL}", 0, 40)
    training = cubes.cubes_training.Training(run, data, range(20))
    balance = dict(training.learner.objective.terms)["rebalancing"].balance
    has = cubes.cubes_data.left_by_rate(data.patients)[:20]
    np.testing.assert_allclose(balance.count_weights, 20 / has.sum(0))
    training.advance(1)
    assert balance.beta.tolist() == [1.0] * 4
    training.advance(1)
    assert len(set(balance.beta.tolist())) > 1, "the first of twenty epochs is over"
    complete = cubes.cubes_training.Training(cubes.cubes_variants.Run(f"passion:{SMALL}", 0, 40), data, range(20))
    assert dict(complete.learner.objective.terms)["rebalancing"].balance.count_weights.tolist() == [1.0] * 4


class FakeGenerator:
    """Has the interface of a GPU's generator."""

    def clone_state(self) -> FakeGenerator:
        return FakeGenerator()

    def manual_seed(self, seed: int) -> None:
        pass

    def graphsafe_get_state(self) -> FakeGenerator:
        return self

    def graphsafe_set_state(self, state: FakeGenerator) -> None:
        pass


class FakeStream(str):
    """Does nothing."""

    def wait_stream(self, other: Any) -> None:
        pass


class FakeEvent:
    """Of work that is done at once."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, cubes: SimpleNamespace) -> list[Any]:
    """CUDA's graphs and streams replaced: a replay does the step again, on the CPU. Returns what was replayed."""
    captured: list[Any] = []
    replayed: list[Any] = []

    class FakeGraph:
        def replay(self) -> None:
            replayed.append(self.training)
            self.training._step()

    @contextmanager
    def capture(graph: FakeGraph, stream: Any) -> Iterator[None]:
        assert stream == "stream"
        captured.append(graph)
        yield

    plain = cubes.cubes_training.Training._capture

    def capture_of(training: Any) -> None:
        plain(training)
        captured[-1].training = training
        training.counter.sub_(1)  # a capture does nothing

    fakes = {
        "Stream": lambda device: FakeStream("stream"),
        "current_stream": lambda device: None,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Event": FakeEvent,
        "default_generators": [FakeGenerator()],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cubes.cubes_training.Training, "_capture", capture_of)
    return replayed


def test_runs_side_by_side_as_graphs(
    cubes: SimpleNamespace, graphs: list[Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGML_REAL_DATA", str(folder))
    monkeypatch.setattr(
        cubes.cubes_work, "seconds_per_step", lambda training: (training.advance(1), len(training.run.name))[1]
    )
    names = [f"baseline:{SMALL}", f"modality_dropout:{SMALL}", f"no_such_thing:{SMALL}"]
    table = {"seconds": {name: {"median": len(name)} for name in names}}
    (tmp_path / "seconds.json").write_text(json.dumps(table))
    monkeypatch.setattr(cubes.cubes_work, "STEP_SECONDS", tmp_path / "seconds.json")  # the fake GPU is a CPU
    arguments = ["--steps", "12", "--points", "3", "--seconds", "1000", "--equal_time", names[0]]
    args = cubes.cubes.parser().parse_args(["--how", "graph", "--part", str(tmp_path / "part.json"), *arguments])
    args.deadline = time.time() + 1000
    runs = [cubes.cubes_variants.Run(name, 0, 12) for name in names]
    assert cubes.cubes_work.work(args, runs) == 1, "one of the runs cannot be done"
    one, two = json.loads((tmp_path / "part.json").read_text())
    assert (one["finished"], two["finished"]) == (True, True)
    assert (one["how"], two["how"]) == ("graph", "graph")
    assert (one["steps"], two["steps"]) == (12, round(12 * len(names[0]) / len(names[1])))
    assert [point["step"] for point in one["curve"]] == [7, 8, 12], "the first point was passed before"
    assert len(graphs) == one["steps"] + two["steps"] - 2 * 6, "six steps each come before the capture"


def test_a_job_times_a_reference_it_does_not_train(cubes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As every job of the array but the reference's own."""
    monkeypatch.setattr(cubes.cubes_work, "seconds_per_step", lambda training: len(training.run.name))
    reference, name = f"baseline:{SMALL}", f"modality_dropout:{SMALL}"
    args = SimpleNamespace(equal_time=reference, steps=12, how="eager")
    progress = SimpleNamespace(training=OnlySteps(cubes.cubes_variants.Run(name, 0, 12)), alone=len(name))
    monkeypatch.setattr(cubes.cubes_work, "Training", lambda run, *_: OnlySteps(run))
    cubes.cubes_work.equalise([progress], args, None, [])
    assert progress.training.steps == round(12 * len(reference) / len(name))


class OnlySteps:
    """A training on a GPU of which only the number of steps matters."""

    def __init__(self, run: Any) -> None:
        self.run, self.device = run, SimpleNamespace(type="cuda")

    def set_steps(self, steps: int) -> None:
        self.steps = steps


def test_equal_time_on_a_cpu_goes_by_the_table(
    cubes: SimpleNamespace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by its own script; what it lacks is asked for."""
    table = tmp_path / "seconds.json"
    names = [f"baseline:{SMALL}", f"modality_dropout:{SMALL}"]
    command = [sys.executable, str(FOLDER / "ablation" / "cubes_seconds.py"), "--turns", "2", "--steps", "1"]
    for name in names:  # the second adds to what the first wrote
        done = [*command, "--output", str(table), "--variants", name]
        subprocess.run(done, check=True, env={**os.environ, "MGML_REAL_DATA": str(folder)})
    content = json.loads(table.read_text())
    assert set(content["seconds"]) == set(names)
    assert all(entry["median"] > 0 for entry in content["seconds"].values())
    elsewhere = {**content, "processor": "another", "seconds": {names[0]: {"median": 1e3, "quartiles": [1e3, 1e3]}}}
    table.write_text(json.dumps(elsewhere))
    done = [*command, "--output", str(table), "--variants", names[1], "--beside", names[0]]
    subprocess.run(done, check=True, env={**os.environ, "MGML_REAL_DATA": str(folder)})
    added = json.loads(table.read_text())
    assert (added["processor"], added["seconds"][names[0]]) == ("another", elsewhere["seconds"][names[0]])
    entry = added["seconds"][names[1]]
    assert (entry["beside"], entry["timed_on"]["processor"]) == (names[0], content["processor"])
    assert 1 < entry["median"] < 1e6, "so many times the step it was timed beside"
    content["seconds"] = {names[0]: {"median": 0.5}, names[1]: {"median": 0.2}}
    table.write_text(json.dumps(content))
    monkeypatch.setattr(cubes.cubes_work, "STEP_SECONDS", table)
    training = OnlySteps(cubes.cubes_variants.Run(f"{names[1]},only=t1,learning_rate=0.1", 0, 100))
    training.device = torch.device("cpu")
    args = SimpleNamespace(equal_time=names[0], steps=100, how="eager")
    progress = SimpleNamespace(training=training)
    cubes.cubes_work.equalise([progress], args, None, [])
    assert (training.steps, progress.given) == (250, 0.2)
    args.equal_time = "mgml"
    with pytest.raises(ValueError, match=r"has no step of mgml. Measure it .* --variants mgml"):
        cubes.cubes_work.equalise([SimpleNamespace(training=training)], args, None, [])


def test_one_run_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "ablation" / "cubes.py"), "--variants", f"mgml:{SMALL}"]
    command += [f"modality_dropout:{SMALL},only=t1ce+flair", "--steps", "8", "--points", "2", "--test"]
    command += ["--output", str(tmp_path), "--parts_only", "--again", "--parallel", "1", "--seconds", "300"]
    subprocess.run(command, check=True, env={**os.environ, "MGML_REAL_DATA": str(folder)})
    ours, stock = (
        json.loads(next(tmp_path.glob(f"part_{name}_*.json")).read_text())[0] for name in ("mgml", "modality")
    )
    for content in (ours, stock):
        assert content["finished"]
        assert [point["step"] for point in content["curve"]] == [4, 8]
        assert content["split"] == {"seed": 2026, "test": 5, "validation": 3, "train": 16}
        assert content["validation"]["mean"] == pytest.approx(content["curve"][-1]["mean"])
        assert {"processor", "commit", "code_changed"} <= set(content)
        assert not content["cut"]
    assert set(ours["dice"]) == {"whole_tumor", "tumor_core", "enhancing_tumor"}
    assert all(len(subsets) == 15 for subsets in ours["dice"].values())
    assert all(len(values) == 5 for subsets in ours["dice"].values() for values in subsets.values())
    assert list(stock["dice"]["whole_tumor"]) == ["t1ce+flair"]


def test_the_page_on_case_quality_is_what_was_measured(cubes: SimpleNamespace) -> None:
    content = json.loads((FOLDER / "results" / "case_quality.json").read_text())
    assert cubes.case_quality_page.page(content) == (FOLDER.parent / "docs" / "case-quality.md").read_text()
    assert len(cubes.case_quality_page.scatter(content).axes) == 3


def test_warm_starts_are_compared_and_the_page_has_what_was_measured(folder: Path, tmp_path: Path) -> None:
    with np.load(folder / "brats2020_cubes" / "cubes.npz") as stored:  # four stages need edges of whole multiples of 8
        larger = {
            name: np.pad(stored[name], [(0, 0)] * (stored[name].ndim - 3) + [(2, 2)] * 3)
            for name in ("images", "labels")
        }
        (tmp_path / "brats2020_cubes").mkdir()
        np.savez(tmp_path / "brats2020_cubes" / "cubes.npz", patients=stored["patients"], **larger)
    command = [sys.executable, str(FOLDER / "ablation" / "cubes_warm_start.py"), "--seeds", "1"]
    command += ["--forms", "multi_encoder_whole", "--stock_steps", "2", "--steps", "4", "--patch", "16"]
    command += ["--scored", "2", "--patients", "3", "--output", str(tmp_path / "warm_start.json")]
    subprocess.run(command, check=True, env={**os.environ, "MGML_REAL_DATA": str(tmp_path)})
    content = json.loads((tmp_path / "warm_start.json").read_text())
    assert content["patients"] == {"stock": 8, "ours": 3, "validation": 2}
    assert [(row["start"], row["steps"]) for row in content["rows"]] == [
        (start, steps) for start in ("scratch", "stock weights") for steps in (1, 2, 4)
    ]

    measured = json.loads((FOLDER / "ablation" / "results" / "warm_start.json").read_text())
    rows = [list(rows) for _, rows in groupby(measured["rows"], key=lambda row: (row["form"], row["start"]))]
    page = (FOLDER.parent / "docs" / "fine-tune.md").read_text()
    for row in rows:
        assert " | ".join(f"{entry['dice']:.2f}" for entry in row) in page, row
