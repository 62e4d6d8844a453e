"""`benchmarks/gpu.py` at tiny sizes on the CPU, and the page made from what it wrote."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("step", "cost_page", "gpu_sections", "gpu", "gpu_page")
QUICK = ("about", "no_wait", "correctness", "precision", "mamba", "counter", "training_step", "prediction", "graph")
CHECKED_ELSEWHERE = ("compile", "distributed", "training", "designs", "profile", "ceilings")
"""The rest: minutes of compiling, processes that import torch again, or the same functions once more."""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        del sys.modules[name]


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--tiny"]
    output = folder / "gpu.json"
    subprocess.run([*command, "--output", str(output), *arguments], check=False)
    assert [file.name for file in folder.iterdir()] == ["gpu.json"]
    return json.loads(output.read_text())


def test_every_section_is_tried(scripts: SimpleNamespace) -> None:
    assert list(scripts.gpu_sections.FUNCTIONS) == list(scripts.gpu.SECTIONS)
    assert {*QUICK, *CHECKED_ELSEWHERE} == set(scripts.gpu.SECTIONS)


def test_sections_write_what_the_page_reads(scripts: SimpleNamespace, tmp_path: Path) -> None:
    result = run(tmp_path, "--sections", *QUICK)
    assert [name for name, section in result.items() if "error" in section] == []
    assert all(section["finished"] for section in result.values())
    for entry in (result["correctness"][design] for design in ("region_aware", "mmformer")):
        assert entry["gradient_relative"] < 1e-5
        assert entry["finite"]
    page = scripts.gpu_page.page(result)
    assert "made without a GPU" in page
    ratios = page.split("## The ratios")[1].split("## ")[0].splitlines()
    assert sum("not measured" in line for line in ratios) == 2, "only peak memory needs a GPU"
    for name in result:
        scripts.gpu_page.page({key: value for key, value in result.items() if key != name})


@pytest.mark.slow
@pytest.mark.skipif("MGML_REAL_DATA" not in os.environ, reason="needs the cubes of real patients")
def test_the_training_on_the_cubes(tmp_path: Path) -> None:
    result = run(tmp_path, "--sections", "training")["training"]
    assert "error" not in result
    assert (result["variant"], result["steps"]) == ("mgml", 4)
    assert 0 <= result["validation"]["mean"] <= 100


@pytest.mark.slow
def test_the_sections_that_take_longer(scripts: SimpleNamespace, tmp_path: Path) -> None:
    sections = [name for name in CHECKED_ELSEWHERE if name != "training"]
    result = run(tmp_path, "--sections", "about", *sections)
    assert [name for name, section in result.items() if "error" in section] == []
    assert result["distributed"]["gradient_relative"] < 1e-3
    assert result["distributed"]["finite"]
    assert result["compile"]["graphs"] == 1
    page = scripts.gpu_page.page(result)
    assert "compiled / eager step not measured" not in page
    assert "| `mmformer` |" in page


def test_a_section_that_breaks_hangs_or_dies_loses_nothing_else(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import os, sys, time, types\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import gpu\n"
        "def good(settings):\n    yield 'value', 1\n"
        "def raising(settings):\n    yield 'before', 2\n    raise ValueError('broken')\n"
        "def dying(settings):\n    yield 'before', 3\n    os._exit(7)\n"
        "def hanging(settings):\n    yield 'before', 4\n    time.sleep(600)\n"
        "functions = {'good': good, 'raising': raising, 'dying': dying, 'hanging': hanging, 'last': good}\n"
        "fake = sys.modules['gpu_sections'] = types.ModuleType('gpu_sections')\n"
        "fake.FUNCTIONS, fake.Settings = functions, types.SimpleNamespace\n"
        "gpu.SECTIONS.clear()\n"
        "gpu.SECTIONS.update({name: gpu.Section(1 if name == 'hanging' else 60) for name in functions})\n"
        "if __name__ == '__main__':\n    sys.exit(gpu.main())\n"
    )
    output = tmp_path / "gpu.json"
    command = [sys.executable, str(broken), "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, check=False)
    result = json.loads(output.read_text())
    assert done.returncode == 1
    assert result["good"]["value"] == result["last"]["value"] == 1
    assert "ValueError: broken" in result["raising"]["error"]
    assert "exit code 7" in result["dying"]["error"]
    assert "stopped after 1 s" in result["hanging"]["error"]
    assert [result[name]["before"] for name in ("raising", "dying", "hanging")] == [2, 3, 4]
    few = [*command, "--sections", "good"]
    assert subprocess.run(few, check=False).returncode == 1, "nothing says that it is of the same code"
    assert json.loads(output.read_text()) == result, "what was measured is not lost"
    partial = output.with_name("gpu.partial.json")
    assert set(json.loads(partial.read_text())) == {"about", "good"}
    state = {"commit": "abc", "device": "cpu"}
    broken.write_text(
        broken.read_text().replace(
            "'good': good, 'raising'", f"'about': lambda s: {state}.items(), 'good': good, 'raising'"
        )
    )
    output.write_text(json.dumps({**result, "about": state}))
    assert subprocess.run([*few, "about"], check=False).returncode == 0
    joined = json.loads(output.read_text())
    assert set(joined) == {"about", "good", "last"}, "of the same code, so what went well before stays"
    assert not partial.exists()


def test_a_process_that_cannot_begin_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "gpu_sections.py").write_text("raise ImportError('torch')\n")
    script = tmp_path / "gpu.py"
    script.write_text((FOLDER / "gpu.py").read_text())
    output = tmp_path / "out" / "gpu.json"
    command = [sys.executable, str(script), "--device", "cpu", "--output", str(output), "--skip", "compile", "counter"]
    assert subprocess.run(command, check=False).returncode == 1
    result = json.loads(output.read_text())
    assert len(result) > 10
    assert all("before it began" in section["error"] for name, section in result.items() if name != "about")


def test_page_without_a_result(scripts: SimpleNamespace) -> None:
    page = scripts.gpu_page.page({})
    assert "no GPU yet, nothing here is measured" in page
    assert page.count("not measured") > 30
