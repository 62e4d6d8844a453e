"""What the benchmarks count: they are run by hand, so only their counting is tested."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import own_designs

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion.selective_scan import selective_scan
from nnunetv2_mgml.plans.options import FUSION_REVISION

FOLDER = Path(__file__).parents[2] / "benchmarks"
SIZE = {"patch": 16, "batch": 4, "stages": 3}
SMALL = Namespace(patch=16, batch=2, stages=3, width_factor=0.25, device="cpu", plan=None)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("step", "cost", "cost_page", "speed_case", "memory")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("terms", ["plain", "mgml", "shipped"])
@pytest.mark.parametrize("design", ["region_aware", "mmformer", "imfuse"])
def test_memory_is_counted_on_shapes_as_on_data(benchmarks: SimpleNamespace, design: str, terms: str) -> None:
    """The two differ by no more than the 16-bit copies autocast makes of the parameters."""
    step = benchmarks.memory.training_step(design, terms, SIZE, 0.25)
    copies = 2 * sum(p.numel() for p in step.learner.network.parameters())
    real = benchmarks.memory.saved_bytes(step, fake=False)
    fake = benchmarks.memory.saved_bytes(benchmarks.memory.training_step(design, terms, SIZE, 0.25))
    assert abs(fake - real) <= copies
    assert real > 10 * copies


def test_memory_grows_with_the_terms(benchmarks: SimpleNamespace) -> None:
    saved = [
        benchmarks.memory.saved_bytes(benchmarks.memory.training_step("region_aware", terms, SIZE, 0.25))
        for terms in ("plain", "mgml", "shipped")
    ]
    assert saved[0] < saved[1] < saved[2]


def test_page_of_memory_has_the_peak_of_a_step(benchmarks: SimpleNamespace) -> None:
    """More with every term, and more than the weights."""
    counted = [benchmarks.memory.counted("region_aware", terms, SIZE, 0.25) for terms in ("plain", "mgml", "shipped")]
    assert counted[0].weights < counted[0].peak < counted[1].peak < counted[2].peak
    text = benchmarks.memory.page({"region_aware": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.04]]}, Namespace(width_factor=0.25))
    assert "| `region_aware` | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 6.0 |" in text


def test_flops_contain_attention_and_scans(benchmarks: SimpleNamespace) -> None:
    query = torch.randn(1, 2, 10, 4)
    two_products = 2 * 2 * 2 * 10 * 10 * 4
    keep = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    assert benchmarks.cost.flops(lambda: F.scaled_dot_product_attention(query, query, query)) == two_products
    assert benchmarks.cost.flops(lambda: F.scaled_dot_product_attention(query, query, query, keep)) == two_products
    u, a, b = torch.randn(2, 6, 3), -torch.rand(3, 5), torch.randn(2, 6, 5)
    counted = benchmarks.cost.flops(lambda: selective_scan(u, u.abs(), a, b, b, torch.ones(3)))
    assert counted == 7 * 2 * 6 * 3 * 5


def test_page_of_what_was_measured(benchmarks: SimpleNamespace) -> None:
    """Medians; a ratio is the median of the turns' ratios, not the ratio of the medians."""
    training = {"plain": [1.0, 2.0, 4.0], "mgml": [1.5, 2.0, 8.0], "shipped": [3.0, 4.0, 4.0]}
    prediction = {"four": [1.0, 2.0, 2.0], "one": [0.25, 1.0, 0.5], "fifteen": [4.0] * 3, "separately": [15.0] * 3}
    row = {
        "training": {"seconds": training, "commit": "abc"},
        "prediction": {"seconds": prediction, "gflop": 3.0, "million": 2.0, "fusion_million": 1.0, "commit": "def"},
        **{
            f"memory_{terms}": {"mebibytes": size, "commit": "abc"}
            for terms, size in (("plain", 100.0), ("mgml", 110.0), ("shipped", 125.0))
        },
    }
    plan = benchmarks.cost.plan_of(SMALL)
    text = benchmarks.cost.page({"mfi": row}, plan, Namespace(**vars(SMALL), repeats=3))
    assert "commit\nabc, def: 4 modalities, 16x16x16 patch, 3 stages" in text
    assert (
        "| `mfi` | 2.00 (1.00) | 3.0 | 2.00 | 2.00 (x 1.50) | 4.00 (x 2.00) | 100 | 110 (x 1.10) | 125 (x 1.25) | - |"
    ) in text.splitlines()
    assert "| `mfi` | 2.00 | 0.50 (x 0.25) | 4.00 (x 2.00) | 15.00 (x 7.50) | - |\n" in text
    assert "†" not in text
    assert "Not measured: `concat`, `demoseg`, " in text
    now = {**row, "prediction": {**row["prediction"], "fusion_revision": FUSION_REVISION}}
    for sfusion, old in ((row, True), (now, False)):
        rows = {**dict.fromkeys(benchmarks.step.DESIGNS, row), "sfusion": sfusion}
        text = benchmarks.cost.page(rows, plan, Namespace(**vars(SMALL), repeats=3))
        assert text.count("| `sfusion` † |") == 2 * old
        assert ("measured before the design changed: `sfusion` with interpolated scores" in text) == old
        assert "Not measured" not in text


def test_the_page_of_costs_marks_what_its_results_say() -> None:
    """docs/costs.md and benchmarks/results/cost.json: rows of designs that have changed since."""
    measured = json.loads((FOLDER / "results" / "cost.json").read_text())
    (old,) = (row for key, row in measured.items() if key.startswith("sfusion patch 80 "))
    page = (FOLDER.parent / "docs" / "costs.md").read_text()
    assert ("| `sfusion` † |" in page) == ("fusion_revision" not in old["prediction"])
    rows = page.split("Not measured: ")[-1]
    assert [name for name in own_designs() if f"`{name}`" not in rows] == [], "measured, or said not to be"


@pytest.mark.parametrize("design", ["region_aware_full", "sfusion"])
def test_one_step_of_each_row(benchmarks: SimpleNamespace, design: str) -> None:
    step = benchmarks.cost.training_step(design, "shipped", SMALL)
    before = [p.clone() for p in step.learner.network.parameters()]
    assert step().isfinite()
    after = step.learner.network.parameters()
    assert any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
    options = benchmarks.step.DESIGNS[design].get("fusion_options", {})
    assert all(step.learner.network.fusion.options[key] == value for key, value in options.items())


@pytest.mark.parametrize("conditional", [False, True])
def test_stock_step_sees_only_what_is_visible(benchmarks: SimpleNamespace, conditional: bool) -> None:
    plan = benchmarks.step.make_plan((16, 16, 16), 3)
    learner = benchmarks.step.StockLearner(plan, width_factor=0.25, conditional=conditional)
    batch = benchmarks.step.random_batch(plan, 2)
    hidden = torch.where(batch.visible[:, :, None, None, None], batch.x, torch.nan)
    assert torch.equal(learner.loss(batch), learner.loss(batch._replace(x=hidden)))
    learner.network.decoder.deep_supervision = False
    subsets = torch.tensor([[True, False, True, True], [False, True, False, False]])
    together = learner.predict(batch.x, subsets)
    assert together.shape == (2, 2, 3, 16, 16, 16)
    told = (subsets[1:2].expand(2, -1),) if conditional else ()
    alone = learner.network(torch.where(subsets[1][None, :, None, None, None], batch.x, 0), *told)
    assert torch.equal(together[:, 1], alone)


def test_predictions_agree(benchmarks: SimpleNamespace) -> None:
    plan = benchmarks.step.make_plan((16, 16, 16), 3)
    learner = benchmarks.step.Learner(plan, {"width_factor": 0.25})
    x = benchmarks.step.random_batch(plan, 1).x
    with torch.inference_mode():
        told = {name: predict() for name, predict in benchmarks.step.predictions(learner, x, all_subsets(4)).items()}
    assert torch.allclose(told["fifteen"], told["separately"], atol=1e-4)
    assert torch.equal(told["four"], told["separately"][:, all_subsets(4).index((True,) * 4)])
