"""Figures: what is drawn (artists and texts, not pixels), files and side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from figure_cases import texts
from matplotlib.figure import Figure

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.presentation.figures import style
from nnunetv2_mgml.presentation.figures.differences import difference_intervals
from nnunetv2_mgml.presentation.figures.shapley import shapley_bars
from nnunetv2_mgml.presentation.figures.subsets import score_by_count, subset_heatmap
from nnunetv2_mgml.presentation.figures.training import training_curves
from nnunetv2_mgml.scoring.shapley import ModalityWorth, modality_worth

# --- scores ---


def test_heatmap_shows_every_value_and_which_modalities_are_present():
    subsets = all_subsets(3)
    scores = np.linspace(0.1, 0.9, 14).reshape(7, 2)
    scores[2, 1] = np.nan
    figure = subset_heatmap(scores, subsets, ["DWI", "ADC", "FLAIR"], ["core", "all"], value_format="{:.2f}")
    seen = texts(figure)
    for value in scores[np.isfinite(scores)]:
        assert f"{value:.2f}" in seen
    assert "n/a" in seen
    assert {"DWI", "ADC", "FLAIR", "core", "all", "Dice"} <= set(seen)
    dots = figure.axes[0].collections
    filled = np.array([[colour[0] < 0.5 for colour in column.get_facecolors()] for column in dots]).T
    assert [tuple(row) for row in filled] == subsets


def test_heatmap_refuses_scores_of_another_shape():
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(3, 2\)"):
        subset_heatmap(np.zeros((2, 2)), all_subsets(2), ["a", "b"], ["x", "y"])


def test_bright_means_good_also_for_distances():
    good, bad = (
        subset_heatmap(np.array([[1.0], [2.0], [3.0]]), all_subsets(2), ["a", "b"], ["x"], reverse=reverse)
        .axes[1]
        .images[0]
        for reverse in (True, False)
    )
    assert sum(good.cmap(good.norm(1.0))[:3]) > sum(good.cmap(good.norm(3.0))[:3])
    assert sum(bad.cmap(bad.norm(1.0))[:3]) < sum(bad.cmap(bad.norm(3.0))[:3])


def test_score_by_count_draws_the_mean_over_subsets_of_a_size():
    subsets = all_subsets(3)
    scores = np.array([[0.1], [0.2], [np.nan], [0.5], [0.6], [0.7], [0.9]])
    lines = score_by_count(scores, subsets, ["lesion"]).axes[0].lines
    mean = next(line for line in lines if line.get_label() == "lesion")
    assert mean.get_ydata() == pytest.approx([0.15, 0.6, 0.9])
    assert mean.get_xdata() == pytest.approx([1, 2, 3])


def test_shapley_bars_have_the_height_of_the_values():
    worth = {"WT": modality_worth({(True, False): 0.5, (False, True): 0.7, (True, True): 0.8}, ["DWI", "ADC"])}
    figure = shapley_bars(worth, ["DWI", "ADC"])
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert heights == pytest.approx([0.3, 0.5])
    assert {"0.30", "0.50", "WT", "Shapley value (Dice)"} <= set(texts(figure))


def test_differences_are_drawn_with_their_intervals():
    values = np.array([[[1.0, 0.5, 2.0], [-1.0, -2.0, 0.0]], [[np.nan] * 3, [3.0, np.nan, np.nan]]])
    figure = difference_intervals({"ours": values, "theirs": values + 1}, ["T1", "T2"], ["WT", "ET"], "base", "Dice")
    first = figure.axes[0].containers[0]
    segment = first.lines[2][0].get_segments()[0]
    np.testing.assert_allclose(segment[:, 0], [0.5, 2.0])
    seen = " ".join(texts(figure))
    assert all(word in seen for word in ("ours", "theirs", "WT", "ET", "method minus base"))
    with pytest.raises(ValueError, match=r"'ours' have shape \(1, 3\)"):
        difference_intervals({"ours": np.zeros((1, 3))}, ["T1"], ["WT"], "base")


def test_lines_and_labels_differ_in_colour_and_marker():
    styles = [style.line_style(i) for i in range(len(style.CYCLE))]
    assert len({s["color"] for s in styles}) == len({s["marker"] for s in styles}) == len(style.CYCLE)
    every = [tuple(style.line_style(i).items()) for i in range(2 * len(style.CYCLE))]
    assert len(set(every)) == len(every)
    assert len(set(style.LABEL_CYCLE)) == len(style.LABEL_CYCLE)
    assert style.label_colours([0, 4, 1, 2]) == dict(zip((1, 2, 4), style.LABEL_CYCLE, strict=False))


# --- training ---

ROW = {
    "epoch": 0,
    "lr": 0.01,
    "train_segmentation": 1.0,
    "train_total": 2.0,
    "t1": 0.75,
    "t2": 0.85,
    "w_f": 0.5,
    "beta": 3.0,
    "alpha": 4.0,
    "pseudo_dice_WT": 0.2,
    "pseudo_dice_mean": 0.2,
    "seconds": 3,
}


def test_training_curves_hold_the_log():
    rows = [{**ROW, "epoch": e, "w_f": 0.5 + 0.1 * e, "train_total": 2.0 - e} for e in range(3)]
    figure = training_curves(rows, title="fold 0")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert lines["$w_f$"].get_ydata() == pytest.approx([0.5, 0.6, 0.7])
    assert lines["total"].get_ydata() == pytest.approx([2, 1, 0])
    assert {"segmentation", "WT", "mean", "$T_1$", r"$\beta$ (smooth max)", r"$\alpha$ (smooth min)"} <= set(lines)
    assert "fold 0" in texts(figure)


def test_losses_of_the_default_can_be_told_apart_also_below_zero():
    terms = ("segmentation", "auxiliary", "complete", "modality", "soft_label", "meta", "consistency")
    rows = [
        {"epoch": e, **{f"train_{t}": 1.0 - 0.9 * e for t in terms}, "train_fusion": 0.0, "val_loss": -0.5}
        for e in range(3)
    ]
    axes = training_curves(rows).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {*(t.replace("_", " ") for t in terms), "segmentation (validation)"}  # none that is always 0
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == len(lines)
    assert axes.get_yscale() == "symlog"
    at = axes.transData.transform([(0, y) for y in (-0.8, -0.7, 0.7, 0.8)])[:, 1]
    assert at[1] - at[0] == pytest.approx(at[3] - at[2])  # as far apart below 0 as above


@pytest.mark.parametrize(
    "rows",
    [
        [ROW],
        [{"epoch": "0", "train_total": "1.5"}],
        [{"epoch": 0}],
        [{}],
        [{"train_total": ""}, {"train_total": "nan", "extra": "text"}],
        [{"epoch": 0, "train_total": -1.0}],
        [{"epoch": 0, "w_f": 0.5}, {"epoch": 1, "w_f": 0.6, "beta": None, None: ["too", "many"]}],
    ],
)
def test_training_curves_survive_short_and_damaged_logs(rows):
    assert style.figure_bytes(training_curves(rows)).startswith(b"\x89PNG")


def test_training_curves_of_an_empty_log_are_refused():
    with pytest.raises(ValueError, match="no epoch yet"):
        training_curves([])


def test_training_figure_needs_neither_torch_nor_pyplot_nor_pandas():
    code = (
        "import sys; from nnunetv2_mgml.presentation.figures.training import training_curves; "
        "from nnunetv2_mgml.presentation.figures.style import figure_bytes; "
        "figure_bytes(training_curves([{'epoch': 0, 'train_total': 1.0}])); "
        "print([m for m in ('torch', 'matplotlib.pyplot', 'pandas', 'SimpleITK') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- files and side effects ---


def small_figure() -> Figure:
    return shapley_bars({"WT": {"DWI": ModalityWorth(0.3, 0.4, 0.1)}}, ["DWI"])


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.jpg", b"\xff\xd8")]
)
def test_save_writes_the_format_of_the_ending(tmp_path: Path, name: str, magic: bytes):
    path = style.save(small_figure(), tmp_path / "new" / name, dpi=50)
    assert path.read_bytes().startswith(magic)
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_save_refuses_other_endings_and_leaves_nothing_when_it_fails(tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in \.png"):
        style.save(small_figure(), tmp_path / "a.bmp")
    old = style.save(small_figure(), tmp_path / "a.png", dpi=50).read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        style.save(small_figure(), tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == old


def test_files_hold_no_time_stamp():
    assert b"<dc:date>" not in style.figure_bytes(small_figure(), "svg")
    assert b"CreationDate" not in style.figure_bytes(small_figure(), "pdf")


def test_settings_of_the_caller_neither_matter_nor_change():
    """nnU-Net's own progress plot sets a global font scale of 2.5."""
    plain = style.figure_bytes(small_figure(), dpi=50)
    with matplotlib.rc_context({"font.size": 25, "axes.grid": True, "lines.linewidth": 9, "savefig.dpi": 10}):
        before = {key: matplotlib.rcParams[key] for key in ("font.size", "axes.grid", "lines.linewidth", "savefig.dpi")}
        assert style.figure_bytes(small_figure(), dpi=50) == plain
        assert {key: matplotlib.rcParams[key] for key in before} == before
