"""`benchmarks/speed.py` at tiny sizes: every key of its table, and the page made from them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("speed_case", "speed_page", "subsets", "loader", "memory", "gpu_page", "gpu_sections", "cost_page", "step")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run at tiny sizes writes."""
    folder = tmp_path_factory.mktemp("speed")
    subprocess.run([sys.executable, str(FOLDER / "speed.py"), "--tiny", "--folder", str(folder)], check=True)
    assert sorted(file.name for file in folder.iterdir()) == ["speed.json", "speed.md"]
    return folder


@pytest.mark.slow
def test_every_key_is_measured(scripts: SimpleNamespace, measured: Path) -> None:
    result: dict[str, Any] = json.loads((measured / "speed.json").read_text())
    for key, goal in scripts.speed_page.GOALS.items():
        if key not in result:
            assert key.startswith(("bfloat16", "openvino"))
            continue
        assert result[key]["value"] > 0
        assert (result[key]["goal"], result[key]["how"]) == (goal.at_most, goal.how)
    assert {"processor", "torch", "date", "commit"} <= set(result)
    profile = result["profile"]
    assert set(profile["training_step"]) == {"network", "loss", "backward", "optimiser", "loader"}
    for name in ("prediction", "prediction_at_2_mm"):
        assert tuple(profile[name]) == scripts.speed_case.PARTS
        assert all(profile[name][part] > 0 for part in ("reading", "preprocessing", "network", "export"))
    assert profile["prediction_at_2_mm"]["resampling"] > profile["prediction"]["resampling"]


@pytest.mark.slow
def test_page_says_what_is_met(scripts: SimpleNamespace, measured: Path) -> None:
    result = json.loads((measured / "speed.json").read_text())
    assert (measured / "speed.md").read_text() == scripts.speed_page.page(result)
    result["loader_ratio"] |= {"value": 1.02, "scatter": 0.0}  # not those of tiny runs, which differ
    result["export_share"]["value"] = 0.16
    lines = scripts.speed_page.page(result).splitlines()
    assert any(
        line.startswith("| a batch of our loader / of nnU-Net's | 1.02 | 0% |") and "| yes |" in line for line in lines
    )
    assert any(line.startswith("| share of a whole case") and "| **no** |" in line for line in lines)


def test_page_before_anything_is_measured(scripts: SimpleNamespace) -> None:
    page = scripts.speed_page.page({})
    assert "Not measured yet" in page
    assert page.count("not measured") == len(scripts.speed_page.GOALS)


def test_page_says_what_a_run_does_not_decide(scripts: SimpleNamespace) -> None:
    """Goals within the scatter, what ran once, differences that noise made zero, and parts that are missing."""

    def entry(value: float, scatter: float, turns: int) -> dict[str, Any]:
        return {"value": value, "scatter": scatter, "seconds": {"of": [1.0] * turns, "beside": [1.0] * turns}}

    about = {"load_before": 0.1, "date": "2026-11-29T00:00:00", "tiny": False}
    result = {**about, "loader_ratio": entry(1.01, 0.1, 5), "one_of_four_ratio": entry(0.5, 0.1, 5)}
    result["export_share"] = {"value": 0.06, "scatter": None}
    result["default_step_time_ratio"] = entry(1.1, 0.0, 1)
    cells = [line.strip("| ").split(" | ") for line in scripts.speed_page.page(result).splitlines() if " | " in line]
    told = {row[0]: row[2:5] for row in cells}
    assert told["a batch of our loader / of nnU-Net's"] == ["10%", "1.02", "yes, within scatter"]
    assert told["a patch from one modality / from four"] == ["10%", "0.40", "**no**"]
    assert told["the default's step / without our terms"] == ["-", "1.20", "yes"]
    assert told["share of a whole case that is not the network"] == ["-", "0.15", "yes"]
    step = {"network": 1.0, "loss": 1.0, "backward": 2.0, "optimiser": 0.0, "loader": 0.1}
    result["profile"] = {"training_step": step, "forward_passes": {"encode": 1.0}}
    assert "| optimiser | below the scatter | - |" in scripts.speed_page.page(result)
    result["profile"]["prediction_at_2_mm"] = {"network": 2.0, "resampling": 3.0}
    assert "it is 0.60, resampling first" in scripts.speed_page.page(result)


def test_stopwatch_gives_time_to_the_innermost_part(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(scripts.speed_case.time, "perf_counter", lambda: next(ticks))
    watch = scripts.speed_case.Stopwatch()
    with watch.part("export"), watch.part("resampling"):
        pass
    assert (watch.seconds["export"], watch.seconds["resampling"]) == (1.0 + 3.0, 2.0)


def test_peak_counts_what_lives_and_what_a_step_adds(scripts: SimpleNamespace) -> None:
    """The same every time, and above what is saved for the backward pass and lives anyway."""
    size = {"patch": 16, "batch": 2, "stages": 3}
    memory = scripts.memory
    peaks = [memory.peak_of_step(in_float32(scripts, size)) for _ in range(2)]
    assert peaks[0] == peaks[1]
    step = in_float32(scripts, size)
    weights = 4 * sum(p.numel() for p in step.learner.network.parameters())
    assert peaks[0] > memory.saved_bytes(step, fake=False) + 2 * weights


def in_float32(scripts: SimpleNamespace, size: dict[str, int]) -> Any:
    torch.manual_seed(0)
    step = scripts.memory.training_step("region_aware", "shipped", size, 0.25)
    step.precision = "float32"
    return step
