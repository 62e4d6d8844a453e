"""Paired comparisons: known effects, slow references, and ``mgml compare``."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_cases import NAMES, synthetic_evaluation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, wilcoxon

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.scoring.derived import ALL, inversions
from nnunetv2_mgml.scoring.info import EvaluationInfo
from nnunetv2_mgml.scoring.results import AVERAGE, save_evaluation
from nnunetv2_mgml.scoring.statistics import (
    EXACT_CASES,
    bootstrap_interval,
    compare_evaluations,
    compare_inversions,
    holm,
    wilcoxon_p,
)


def exact_wilcoxon(differences: np.ndarray) -> float:
    """All sign patterns, one by one; zeros are ranked, then dropped."""
    ranks = rankdata(np.abs(differences))[differences != 0]
    signs = differences[differences != 0] > 0
    total = ranks.sum()
    observed = abs(ranks[signs].sum() - total / 2)
    sums = [
        sum(r for r, sign in zip(ranks, pattern, strict=True) if sign)
        for pattern in itertools.product((0, 1), repeat=len(ranks))
    ]
    return float(np.mean([abs(s - total / 2) >= observed - 1e-9 for s in sums]))


class TestWilcoxon:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(-4, 6), min_size=4, max_size=9))
    def test_against_all_sign_patterns_with_ties_and_zeros(self, values):
        differences = np.array(values) / 10
        assert wilcoxon_p(differences) == pytest.approx(exact_wilcoxon(differences) if differences.any() else 1)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 1000), st.integers(2, 60))
    def test_against_scipys_exact_test_without_ties(self, seed, count):
        differences = np.random.default_rng(seed).normal(0.3, 1, size=count)
        assert wilcoxon_p(differences) == pytest.approx(wilcoxon(differences, method="exact").pvalue)

    def test_many_cases_use_the_approximation_without_a_jump(self):
        differences = np.random.default_rng(3).normal(0.15, 1, size=EXACT_CASES + 1)
        assert wilcoxon_p(differences) == pytest.approx(wilcoxon_p(differences[:-1]), rel=0.25)

    def test_no_difference(self):
        assert wilcoxon_p(np.zeros(10)) == 1
        assert math.isnan(wilcoxon_p(np.array([0.5])))


class TestBootstrap:
    def test_covers_the_true_mean_about_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        hits = 0
        for seed in range(300):
            low, high = bootstrap_interval(rng.normal(0.2, 1, size=40), draws=500, seed=seed)
            hits += low <= 0.2 <= high
        assert 0.89 <= hits / 300 <= 0.98

    def test_agrees_with_the_normal_interval_for_many_cases(self):
        values = np.random.default_rng(1).normal(0.1, 0.5, size=2000)
        low, high = bootstrap_interval(values)
        half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)

    def test_seeded(self):
        values = np.random.default_rng(2).normal(size=17)
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)

    def test_constant_and_single(self):
        assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)
        assert all(math.isnan(v) for v in bootstrap_interval(np.array([1.0])))


class TestHolm:
    def test_worked_example(self):
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_against_the_definition(self, p):
        order = np.argsort(p, kind="stable")
        expected, running = np.zeros(len(p)), 0.0
        for position, index in enumerate(order):
            running = max(running, (len(p) - position) * p[index])
            expected[index] = min(1, running)
        np.testing.assert_allclose(holm(p), expected)

    def test_missing_tests_do_not_count(self):
        np.testing.assert_allclose(holm([0.02, math.nan, 0.03]), [0.04, math.nan, 0.04])


class TestCompareEvaluations:
    def test_a_known_effect_is_found_and_nothing_else(self):
        base = synthetic_evaluation("base", cases=30)
        better = synthetic_evaluation("better", cases=30)
        noise = np.random.default_rng(9).normal(scale=0.01, size=len(better.table))
        hit = (better.table.subset == "t1ce") & (better.table.region == "enhancing tumor")
        better.table["value"] += noise + np.where(hit & (better.table.metric == "dice"), 0.05, 0)
        table = compare_evaluations([base, better], ["dice"])
        assert len(table) == 3 * 16
        row = table[(table.subset == "t1ce") & (table.region == "enhancing tumor")].iloc[0]
        assert row.difference == pytest.approx(0.05, abs=0.01)
        assert row.ci_low < row.difference < row.ci_high
        assert row.ci_low > 0.03
        assert row.p_holm < 1e-4
        assert row.n == 30
        others = table[(table.subset != AVERAGE) & ~((table.subset == "t1ce") & (table.region == "enhancing tumor"))]
        assert (others.p_holm > 0.05).all()
        assert (table.p_holm >= table.p).all()

    def test_difference_is_method_minus_baseline(self):
        both = [synthetic_evaluation("A"), synthetic_evaluation("B", shift=-0.1)]
        table = compare_evaluations(both, ["dice", "hd95"])
        np.testing.assert_allclose(table[table.metric == "dice"].difference, -0.1)
        hd95 = table[table.metric == "hd95"]
        np.testing.assert_allclose(hd95.difference, 0)
        assert (hd95.p == 1).all()
        np.testing.assert_allclose(table.method_mean - table.baseline_mean, table.difference)

    def test_average_rows_compare_case_means(self):
        a, b = synthetic_evaluation("A"), synthetic_evaluation("B", seed=1)
        table = compare_evaluations([a, b], ["dice"])
        row = table[(table.subset == AVERAGE) & (table.region == "whole tumor")].iloc[0]
        means = [e.values("dice", "whole tumor").mean(axis=1) for e in (a, b)]
        assert row.difference == pytest.approx((means[1] - means[0]).mean())

    def test_cases_without_a_value_leave_both_sides(self):
        a, b = synthetic_evaluation("A", policy="nan"), synthetic_evaluation("B", shift=0.1, policy="nan")
        gone = (a.table.subset == "t1") & (a.table.case < "case_05")
        a.table.loc[gone & (a.table.region == "tumor core"), "value"] = math.nan
        table = compare_evaluations([a, b], ["dice"])
        counts = table[table.region == "tumor core"].set_index("subset").n
        assert counts["t1"] == 7
        assert counts["t2"] == counts[AVERAGE] == 12
        np.testing.assert_allclose(table.difference, 0.1)

    def test_several_methods_are_each_compared_with_the_first(self):
        table = compare_evaluations(
            [synthetic_evaluation(n, shift=s) for n, s in (("A", 0), ("B", 0.1), ("C", 0.2))], ["dice"]
        )
        assert table.groupby("method").difference.mean().to_dict() == pytest.approx({"B": 0.1, "C": 0.2})
        assert set(table.baseline) == {"A"}

    def test_other_cases_are_refused_unless_shared_ones_are_asked_for(self):
        a, b = synthetic_evaluation("A"), synthetic_evaluation("B", cases=10)
        with pytest.raises(ValueError, match=r"10 are shared, 2 are not \(case_10, case_11\).*--common_cases"):
            compare_evaluations([a, b], ["dice"])
        assert (compare_evaluations([a, b], ["dice"], common_cases=True).n == 10).all()

    def test_one_evaluation_is_not_a_comparison(self):
        with pytest.raises(ValueError, match="at least two"):
            compare_evaluations([synthetic_evaluation()], ["dice"])


class TestCommand:
    def test_writes_all_files(self, tmp_path, capsys):
        for name, shift in (("A", 0.0), ("B", 0.1)):
            save_evaluation(synthetic_evaluation(name, shift), tmp_path / name)
        assert (
            cli.main(
                [
                    "compare",
                    str(tmp_path / "A"),
                    str(tmp_path / "B"),
                    "-o",
                    str(tmp_path / "out"),
                    "--metrics",
                    "dice",
                    "hd95",
                ]
            )
            == 0
        )
        out = tmp_path / "out"
        assert sorted(p.name for p in out.iterdir()) == [
            "comparison.csv",
            "comparison.json",
            "comparison.md",
            "figures",
            "table.md",
            "table.tex",
        ]
        assert sorted(p.name for p in (out / "figures").iterdir()) == ["differences_dice.png", "differences_hd95.png"]
        table = pd.read_csv(out / "comparison.csv")
        assert len(table) == 2 * 3 * (len(NAMES) + 1)
        content = json.loads((out / "comparison.json").read_text())
        assert len(content["rows"]) == len(table)
        assert content["rows"][0]["difference"] == pytest.approx(0.1)
        markdown = capsys.readouterr().out
        assert "| WT | flair | 12 |" in markdown
        assert "+10.00" in markdown

    def test_inversions_are_compared_by_case(self, tmp_path, capsys):
        a, b = synthetic_evaluation("A"), synthetic_evaluation("B", seed=1)
        for evaluation in (a, b):
            save_evaluation(evaluation, tmp_path / evaluation.name)
        assert cli.main(["compare", str(tmp_path / "A"), str(tmp_path / "B"), "-o", str(tmp_path / "out")]) == 0
        rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["inversions"]
        assert [row["region"] for row in rows] == ["whole tumor", "tumor core", "enhancing tumor", "all"]
        for row in rows:
            ours, theirs = (
                inversions(e)[ALL if row["region"] == "all" else row["region"]].share for e in (a, b)
            )  # every case has all 50 pairs
            assert (row["baseline_mean"], row["method_mean"]) == pytest.approx((ours, theirs))
            assert row["difference"] == pytest.approx(theirs - ours)
            assert row["ci_low"] < row["difference"] < row["ci_high"]
        text = capsys.readouterr().out
        assert f"| all regions | B | 12 | {100 * rows[-1]['baseline_mean']:.2f} |" in text
        assert compare_inversions([a.restricted(["t1"]), b.restricted(["t1"])]).empty
        assert compare_inversions([a, synthetic_evaluation("C", metrics=["hd95"])]).empty

    def test_without_o_it_is_only_printed(self, tmp_path, capsys, monkeypatch):
        for name in ("A", "B"):
            save_evaluation(synthetic_evaluation(name), tmp_path / name)
        monkeypatch.chdir(tmp_path)
        assert cli.main(["compare", "A", "B"]) == 0
        assert "| WT | flair | 12 |" in capsys.readouterr().out
        assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "B"]

    @pytest.mark.parametrize(
        ("info", "message"),
        [
            ({"min_region_voxels": {"enhancing tumor": 500}}, r"differ in min_region_voxels .*'enhancing tumor': 500"),
            ({"ignore_label": 4}, "differ in ignore_label"),
        ],
    )
    def test_other_scoring_rules_are_refused(self, tmp_path, capsys, info, message):
        save_evaluation(synthetic_evaluation("A"), tmp_path / "A")
        save_evaluation(dataclasses.replace(synthetic_evaluation("B"), info=EvaluationInfo(**info)), tmp_path / "B")
        assert cli.main(["compare", str(tmp_path / "A"), str(tmp_path / "B")]) == 2
        assert re.search(message, capsys.readouterr().err)

    def test_one_name_twice_gives_way_to_the_folders(self, tmp_path, capsys):
        """Two plans of one trainer have one name."""
        for folder, name in (("A", "same"), ("B", "same"), ("C", "other")):
            save_evaluation(synthetic_evaluation(name), tmp_path / folder)
        folders = [str(tmp_path / folder) for folder in "ABC"]
        assert cli.main(["compare", *folders, "-o", str(tmp_path / "out")]) == 0
        rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
        assert {row["method"] for row in rows} == {"B", "other"}
        assert "# Comparison with A" in (tmp_path / "out" / "comparison.md").read_text()

    @pytest.mark.parametrize("cases", [1, 12])
    def test_a_seed_below_zero_is_named(self, tmp_path, capsys, cases):
        for name in ("A", "B"):
            whole = synthetic_evaluation(name)
            save_evaluation(whole.restricted(cases=whole.cases[:cases]), tmp_path / name)
        assert cli.main(["compare", str(tmp_path / "A"), str(tmp_path / "B"), "--seed", "-1"]) == 2
        assert capsys.readouterr().err == "error: --seed must be a whole number of at least 0, got -1.\n"

    def test_names_must_differ(self, tmp_path, capsys):
        folders = [str(tmp_path / name / "evaluation") for name in ("A", "B")]
        for folder in folders:
            save_evaluation(synthetic_evaluation("same"), Path(folder))
        assert cli.main(["compare", *folders, "-o", str(tmp_path / "out")]) == 2
        assert "called evaluation; tell them apart with --names" in capsys.readouterr().err
        assert cli.main(["compare", *folders, "-o", str(tmp_path / "out"), "--names", "x", "y"]) == 0
        assert "# Comparison with x" in (tmp_path / "out" / "comparison.md").read_text()
