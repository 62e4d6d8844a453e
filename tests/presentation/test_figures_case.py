"""Figures of a case: slices and orientation, grey values, overlays, sheets of predictions and internals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from figure_cases import LABELS, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from nnunetv2_mgml.presentation.figures import internals, qualitative, slices, style


def head(size: int = 24) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A round head with a lesion, and its ground truth."""
    y, x = np.indices((size, size)) - size / 2
    inside = (y**2 + x**2) < (size / 2 - 2) ** 2
    truth = np.zeros((size, size), int)
    truth[6:14, 6:14] = 1
    truth[8:11, 8:11] = 2
    return {name: np.where(inside, 100.0 + k * truth, 0) for name, k in (("dwi", 10), ("adc", -20))}, truth


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
    figure = qualitative.qualitative_sheet(
        images, truth, predictions, LABELS, title="case 7, slice 3", present={"both": ["dwi", "adc"]}, sides=("R", "L")
    )
    seen = texts(figure)
    assert {
        "dwi",
        "adc",
        "Ground truth",
        *predictions,
        "case 7, slice 3",
        "edema",
        "necrosis",
        "R",
        "L",
        "outline of the ground truth",
    } <= set(seen)
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 6
    both = next(axes for axes in drawn if axes.get_title() == "both")
    assert len(both.collections) == 1  # the outline of the ground truth
    assert len(both.lines) == 2  # one dot per modality
    assert not next(axes for axes in drawn if axes.get_title() == "Ground truth").collections


def test_sheet_crops_to_the_content_and_keeps_the_aspect():
    images, truth = head()
    images = {name: np.pad(image, 10) for name, image in images.items()}
    figure = qualitative.qualitative_sheet(
        images, np.pad(truth, 10), {"p": np.pad(truth, 10)}, LABELS, pixel_aspect=2.0
    )
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


def test_feature_maps_have_the_shape_of_the_image_they_stand_beside():
    """Strides may differ between the two axes that are drawn."""
    images, truth = head()
    height, width = truth.shape
    maps = {"dwi": np.random.default_rng(0).normal(size=(2, height // 4, width // 2))}
    figure = internals.feature_channels(maps, [0], {"dwi": images["dwi"]}, truth, pixel_aspect=2.0)
    image, drawn = (axes.images[-1] for axes in figure.axes[:2])
    assert [a.get_array().shape[:2] for a in (image, drawn)] == [(height, width), (height // 4, width // 2)]
    shown = [
        axes.get_aspect() * a.get_array().shape[0] / a.get_array().shape[1]
        for axes, a in zip(figure.axes, (image, drawn), strict=False)
    ]
    assert shown == pytest.approx([2.0 * height / width] * 2)


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
