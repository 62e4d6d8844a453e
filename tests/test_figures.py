"""Figures: what is drawn (artists and texts, not pixels), slices and orientation, files and side effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nnunetv2_mgml.evaluation.figures import internals, qualitative, slices, style
from nnunetv2_mgml.evaluation.figures.differences import difference_intervals
from nnunetv2_mgml.evaluation.figures.shapley import shapley_bars
from nnunetv2_mgml.evaluation.figures.subsets import score_by_count, subset_heatmap
from nnunetv2_mgml.evaluation.figures.training import training_curves
from nnunetv2_mgml.evaluation.shapley import ModalityWorth, modality_worth
from nnunetv2_mgml.modalities import all_subsets

LABELS = {1: "edema", 2: "necrosis"}


def texts(figure: Figure) -> list[str]:
    """All texts a reader sees."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]


def head(size: int = 24) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A round head with a lesion, and its ground truth."""
    y, x = np.indices((size, size)) - size / 2
    inside = (y**2 + x**2) < (size / 2 - 2) ** 2
    truth = np.zeros((size, size), int)
    truth[6:14, 6:14] = 1
    truth[8:11, 8:11] = 2
    return {name: np.where(inside, 100.0 + k * truth, 0) for name, k in (("dwi", 10), ("adc", -20))}, truth


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
    good, bad = (subset_heatmap(np.array([[1.0], [2.0], [3.0]]), all_subsets(2), ["a", "b"], ["x"], reverse=reverse)
                 .axes[1].images[0] for reverse in (True, False))
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
    assert len(set(style.LABEL_CYCLE)) == len(style.LABEL_CYCLE)
    assert style.label_colours([0, 4, 1, 2]) == dict(zip((1, 2, 4), style.LABEL_CYCLE, strict=False))


# --- training ---

ROW = {"epoch": 0, "lr": 0.01, "train_segmentation": 1.0, "train_total": 2.0, "t1": 0.75, "t2": 0.85, "w_f": 0.5,
       "beta": 3.0, "alpha": 4.0, "pseudo_dice_WT": 0.2, "pseudo_dice_mean": 0.2, "seconds": 3}


def test_training_curves_hold_the_log():
    rows = [{**ROW, "epoch": e, "w_f": 0.5 + 0.1 * e, "train_total": 2.0 - e} for e in range(3)]
    figure = training_curves(rows, title="fold 0")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert lines["$w_f$"].get_ydata() == pytest.approx([0.5, 0.6, 0.7])
    assert lines["total"].get_ydata() == pytest.approx([2, 1, 0])
    assert {"segmentation", "WT", "mean", "$T_1$", r"$\beta$ (smooth max)", r"$\alpha$ (smooth min)"} <= set(lines)
    assert "fold 0" in texts(figure)


@pytest.mark.parametrize("rows", [
    [ROW], [{"epoch": "0", "train_total": "1.5"}], [{"epoch": 0}], [{}],
    [{"train_total": ""}, {"train_total": "nan", "extra": "text"}], [{"epoch": 0, "train_total": -1.0}],
    [{"epoch": 0, "w_f": 0.5}, {"epoch": 1, "w_f": 0.6, "beta": None, None: ["too", "many"]}]])
def test_training_curves_survive_short_and_damaged_logs(rows):
    assert style.figure_bytes(training_curves(rows)).startswith(b"\x89PNG")


def test_training_curves_of_an_empty_log_are_refused():
    with pytest.raises(ValueError, match="no epoch yet"):
        training_curves([])


def test_training_figure_needs_neither_torch_nor_pyplot_nor_pandas():
    code = ("import sys; from nnunetv2_mgml.evaluation.figures.training import training_curves; "
            "from nnunetv2_mgml.evaluation.figures.style import figure_bytes; "
            "figure_bytes(training_curves([{'epoch': 0, 'train_total': 1.0}])); "
            "print([m for m in ('torch', 'matplotlib.pyplot', 'pandas', 'SimpleITK') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- slices ---


def test_axial_images_are_shown_in_radiological_convention(tmp_path: Path):
    """A volume stored in RAS: its first voxel is the patient's left in x, the back in y, low in z."""
    volume = np.zeros((3, 4, 5), np.int16)
    volume[0, 0, 0] = 7
    image = sitk.GetImageFromArray(volume)
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
    image.SetSpacing([1.0, 2.0, 3.0])
    sitk.WriteImage(image, str(tmp_path / "ras.nii.gz"))
    shown, spacing = slices.read_axial(tmp_path / "ras.nii.gz")
    assert spacing == pytest.approx((3.0, 2.0, 1.0))
    # in ITK's LPS space -x points to the right: the voxel lies left and at the back, so right and down on the screen
    assert shown.shape == volume.shape
    assert np.argwhere(shown == 7).tolist() == [[0, 3, 4]]


def test_permuted_axes_become_axial_slices(tmp_path: Path):
    """A sagittally stored volume (fastest axis front to back, slowest right to left) is turned."""
    image = sitk.GetImageFromArray(np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4))
    image.SetDirection([0, 0, 1, 1, 0, 0, 0, 1, 0])
    sitk.WriteImage(image, str(tmp_path / "sag.nii.gz"))
    shown, _ = slices.read_axial(tmp_path / "sag.nii.gz")
    assert shown.shape == (3, 4, 2)


def test_files_that_cannot_be_shown_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.nii\.gz"):
        slices.read_axial(tmp_path / "absent.nii.gz")
    (tmp_path / "bad.nii.gz").write_text("no image")
    with pytest.raises(ValueError, match=r"bad\.nii\.gz"):
        slices.read_axial(tmp_path / "bad.nii.gz")


def test_a_flat_image_is_one_slice(tmp_path: Path):
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5), np.uint8)), str(tmp_path / "flat.png"))
    assert slices.read_axial(tmp_path / "flat.png")[0].shape == (1, 4, 5)


def test_telling_slice_prefers_one_that_shows_every_label():
    labels = np.zeros((4, 10, 10), int)
    labels[1, :8, :8] = 1
    labels[2, :8, :7] = 1
    labels[2, 8, :4] = 3
    assert slices.telling_slice(labels) == 2
    labels[3, :, :] = 1
    labels[3, :4, :4] = 3
    assert slices.telling_slice(labels) == 3
    assert slices.telling_slice(np.zeros((7, 3, 3), int)) == 3


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_content_box_is_the_bounding_box_of_all_arrays(data: st.DataObject):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    arrays = [np.zeros(shape, int) for _ in range(2)]
    points = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in shape)), max_size=3))
    for number, point in enumerate(points):
        arrays[number % 2][point] = 1
    box = slices.content_box(*arrays, margin=0)
    if not points:
        assert box == tuple(slice(0, n) for n in shape)
        return
    low, high = np.min(points, axis=0), np.max(points, axis=0) + 1
    assert box == tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def test_grey_values_use_the_tissue_and_keep_the_background_black():
    image = np.zeros((40, 40))
    image[10:30, 10:30] = np.linspace(-3, 5, 400).reshape(20, 20)
    grey = slices.to_grey(image)
    assert grey.dtype == np.uint8
    assert grey[0, 0] == 0
    assert grey.max() == 255
    assert 90 < grey[20, 20] < 165  # 1.0, the middle of the tissue's range
    full = slices.to_grey(np.linspace(-100, 100, 400).reshape(20, 20))  # no background: zero is in between
    assert 100 < full[10, 0] < 155
    assert not slices.to_grey(np.zeros((4, 4))).any()
    assert slices.to_grey(np.array([[np.nan, 1.0], [0.0, np.inf]])).shape == (2, 2)


# --- qualitative ---


def test_overlay_colours_labels_and_leaves_the_rest():
    grey = np.full((9, 9), 100, np.uint8)
    labels = np.zeros((9, 9), int)
    labels[2:7, 2:7] = 1
    labels[8, 8] = 9  # no colour: not drawn
    drawn = qualitative.overlay(grey, labels, {1: "#ff0000"}, fill=0.5)
    grey_rgb = np.array([100 / 255] * 3)
    assert drawn[0, 0] == pytest.approx(grey_rgb)
    assert drawn[8, 8] == pytest.approx(grey_rgb)
    assert drawn[2, 2] == pytest.approx(to_rgb("#ff0000"))  # edge
    assert drawn[4, 4] == pytest.approx(0.5 * grey_rgb + 0.5 * np.array(to_rgb("#ff0000")))


def test_edges_are_where_labels_meet():
    labels = np.zeros((5, 6), int)
    labels[:, 1:3] = 1
    labels[:, 3:5] = 2
    assert qualitative.label_edges(labels).tolist() == [[False, True, True, True, True, False]] * 5
    labels[:, :] = 1
    assert not qualitative.label_edges(labels).any()


def test_sheet_shows_modalities_ground_truth_and_predictions():
    images, truth = head()
    predictions = {"DWI\nDice 0.8": np.roll(truth, 1, 0), "both": truth, "empty": np.zeros_like(truth)}
    figure = qualitative.qualitative_sheet(images, truth, predictions, LABELS, title="case 7, slice 3",
                                           present={"both": ["dwi", "adc"]}, sides=("R", "L"))
    seen = texts(figure)
    assert {"dwi", "adc", "Ground truth", *predictions, "case 7, slice 3", "edema", "necrosis", "R", "L",
            "outline of the ground truth"} <= set(seen)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 6
    both = next(axes for axes in drawn if axes.get_title() == "both")
    assert len(both.collections) == 1  # the outline of the ground truth
    assert len(both.lines) == 2  # one dot per modality
    assert not next(axes for axes in drawn if axes.get_title() == "Ground truth").collections


def test_sheet_crops_to_the_content_and_keeps_the_aspect():
    images, truth = head()
    images = {name: np.pad(image, 10) for name, image in images.items()}
    figure = qualitative.qualitative_sheet(images, np.pad(truth, 10), {"p": np.pad(truth, 10)}, LABELS,
                                           pixel_aspect=2.0)
    shown = figure.axes[0].images[0].get_array()
    assert max(shown.shape) <= 24
    assert figure.axes[0].get_aspect() == 2.0


def test_zoom_shows_a_square_around_the_labels():
    images, truth = head(48)
    figure = qualitative.qualitative_sheet(images, truth, {"p": truth}, LABELS, zoom=True)
    height, width = figure.axes[0].images[0].get_array().shape
    assert height == width < 24


def test_case_rows_need_equal_columns():
    images, truth = head()
    first = qualitative.Case(images, truth, {"a": truth}, "one")
    figure = qualitative.case_rows([first, qualitative.Case(images, truth, {"a": truth}, "two")], LABELS)
    assert {"one", "two", "dwi", "Ground truth", "a"} <= set(texts(figure))
    with pytest.raises(ValueError, match="same columns"):
        qualitative.case_rows([first, qualitative.Case(images, truth, {"b": truth})], LABELS)
    with pytest.raises(ValueError, match="at least one case"):
        qualitative.case_rows([], LABELS)


def test_unknown_background_is_refused():
    images, truth = head()
    with pytest.raises(ValueError, match="No modality 'pet' to draw over; there are dwi, adc"):
        qualitative.qualitative_sheet(images, truth, {}, LABELS, background="pet")


def test_comparison_grid_has_a_row_per_subset_and_a_column_per_model():
    images, truth = head()
    rows = {"dwi": {"ours": truth, "other": truth}, "adc": {"ours": truth}}
    figure = qualitative.comparison_grid(images["dwi"], truth, rows, LABELS)
    assert {"ours", "other", "dwi", "adc", "Ground truth"} <= set(texts(figure))
    assert len([axes for axes in figure.axes if axes.images]) == 6


# --- internals ---


def test_single_modalities_soft_label_and_fused_prediction():
    images, truth = head()
    figure = internals.modality_predictions(images, dict.fromkeys(images, truth), truth, truth, truth, LABELS)
    assert {"dwi", "adc", "dwi alone", "adc alone", "Soft label", "Fused", "Ground truth"} <= set(texts(figure))
    without = internals.modality_predictions(images, {}, None, truth, None, LABELS)
    assert not {"Soft label", "Ground truth", "dwi alone"} & set(texts(without))


def test_confidence_maps_share_one_scale():
    images, truth = head()
    maps = {"dwi": {"WT": truth / 2, "confidence": np.ones_like(truth) * 0.9}, "all": {"WT": truth / 4}}
    figure = internals.confidence_maps(images["dwi"], maps, {"WT": truth > 0})
    assert {"dwi", "all", "WT", "confidence", "Probability"} <= set(texts(figure))
    heat = [image for axes in figure.axes for image in axes.images if image.cmap.name == style.HEAT]
    assert len(heat) == 3
    assert all((image.norm.vmin, image.norm.vmax) == (0, 1) for image in heat)


def test_telling_channels_are_those_that_see_the_lesion():
    rng = np.random.default_rng(0)
    mask = np.zeros((12, 12), bool)
    mask[3:7, 3:7] = True
    features = rng.normal(size=(6, 12, 12))
    features[4] += 5 * mask
    features[1] -= 2 * mask
    assert internals.telling_channels(features, mask, 2) == [4, 1]
    spread = features[:3] * np.array([1, 9, 3])[:, None, None]
    assert internals.telling_channels(spread, np.zeros_like(mask), 5) == [1, 2, 0]  # no lesion: the most varied


def test_feature_channels_are_drawn_per_source():
    images, truth = head()
    features = {"dwi": np.random.default_rng(0).normal(size=(5, 12, 12)), "adc": np.zeros((5, 12, 12))}
    figure = internals.feature_channels(features, [3, 0], images, truth)
    assert {"channel 3", "channel 0", "dwi", "adc", "Image"} <= set(texts(figure))
    assert len([axes for axes in figure.axes if axes.images]) == 6


# --- files and side effects ---


def small_figure() -> Figure:
    return shapley_bars({"WT": {"DWI": ModalityWorth(0.3, 0.4, 0.1)}}, ["DWI"])


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"),
                                             ("a.jpg", b"\xff\xd8")])
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


def test_figure_from_a_real_case(real_data: Path):
    folder = real_data / "brats2021" / "BraTS2021_00006"
    truth, spacing = slices.read_axial(folder / "BraTS2021_00006_seg.nii.gz")
    z = slices.telling_slice(truth)
    images = {name: slices.read_axial(folder / f"BraTS2021_00006_{name}.nii.gz")[0][z] for name in ("t1ce", "flair")}
    assert spacing == pytest.approx((1.0, 1.0, 1.0))
    assert set(np.unique(truth[z])) == {0, 1, 2, 4}
    # BraTS is stored in LPS: nothing may be turned
    raw = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "BraTS2021_00006_seg.nii.gz")))
    np.testing.assert_array_equal(truth, raw)
    figure = qualitative.qualitative_sheet(images, truth[z], {"truth": truth[z]}, {1: "core", 2: "edema", 4: "ET"})
    assert len(style.figure_bytes(figure, dpi=60)) > 10_000
