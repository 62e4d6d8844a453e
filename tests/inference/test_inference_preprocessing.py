"""Preprocessing with absent channels against nnU-Net's own, and the iterator that survives bad cases."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_cases import CHANNELS, SHAPE, image, write_case, write_image, write_model
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.inference.inputs import Case, CaseError, EmptyCaseError
from nnunetv2_mgml.inference.preprocessing import FailedItem, Job, Model, iterate_items, prepare_case, prepare_job
from nnunetv2_mgml.modalities import all_subsets


def load_model(folder: Path) -> Model:
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    return Model(plans, plans.get_configuration("3d_fullres"), json.loads((folder / "dataset.json").read_text()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(write_model(tmp_path_factory.mktemp("model") / "m", folds=()))


def case_of(files: dict[int, Path]) -> Case:
    return Case("p", {c: str(path) for c, path in files.items()})


def prepare(
    model: Model, files: dict[int, Path], subset: Any = (True,) * 4, previous: Path | None = None
) -> dict[str, Any]:
    return prepare_case(
        case_of(files),
        subset,
        model.plans_manager,
        model.configuration_manager,
        model.dataset_json,
        None if previous is None else str(previous),
        "out/p",
    )


def stock(model: Model, files: dict[int, Path], previous: Path | None = None) -> tuple[np.ndarray, Any, dict]:
    return model.configuration_manager.preprocessor_class(verbose=False).run_case(
        [str(files[c]) for c in range(4)],
        None if previous is None else str(previous),
        model.plans_manager,
        model.configuration_manager,
        model.dataset_json,
    )


def test_a_complete_case_is_preprocessed_as_by_nnunet(tmp_path: Path, model: Model) -> None:
    files = write_case(tmp_path, "p")
    item = prepare(model, files)
    data, _, properties = stock(model, files)
    np.testing.assert_array_equal(item.data, data)
    assert item.data.dtype == np.float32
    assert str(item.properties) == str(properties)
    assert item.available == (True,) * 4
    assert item.files == {name: str(files[c]) for c, name in enumerate(CHANNELS)}
    assert (item.case, item.ofile) == ("p", "out/p")


@pytest.mark.parametrize("subset", all_subsets(4))
def test_masked_full_data_equals_absent_files_where_the_brain_mask_is_shared(
    tmp_path: Path, model: Model, subset: tuple[bool, ...]
) -> None:
    """Preprocess all four and drop channels (what an evaluation of all subsets does) = the files are not there."""
    files = write_case(tmp_path, "p")
    absent_files = prepare(model, {c: path for c, path in files.items() if subset[c]}, subset)
    masked = stock(model, files)[0] * np.array(subset, dtype=np.float32)[:, None, None, None]
    np.testing.assert_array_equal(absent_files.data, masked)
    assert absent_files.available == subset


def test_crop_and_statistics_come_from_present_modalities_only(tmp_path: Path, model: Model) -> None:
    files = write_case(tmp_path, "p")
    write_image(files[1], image(1, margin=0))  # t1ce has signal in every voxel, the others in a box two voxels inside
    full, without = prepare(model, files), prepare(model, files, (True, False, True, True))
    assert full.data.shape[1:] == SHAPE
    assert without.data.shape[1:] == tuple(n - 4 for n in SHAPE)
    for c in (0, 2, 3):
        np.testing.assert_allclose(without.data[c].mean(), 0, atol=1e-5)
        np.testing.assert_allclose(without.data[c].std(), 1, atol=1e-4)
        assert abs(full.data[c][2:-2, 2:-2, 2:-2].mean()) > 0.1
    assert not without.data[1].any()


def test_an_absent_channel_is_zero_whatever_the_normalisation(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "m", folds=(), normalization="CTNormalization"))
    files = write_case(tmp_path / "in", "p")
    placeholder = dict(files)
    placeholder[2] = write_image(tmp_path / "zero_0002.nii.gz", np.zeros(SHAPE, np.int16))
    assert stock(model, placeholder)[0][2].any()  # the trap
    assert not prepare(model, files, (True, True, False, True)).data[2].any()


@pytest.mark.parametrize("value", [0, 7])
def test_a_volume_without_contrast_counts_as_missing_as_it_does_in_training(
    tmp_path: Path, model: Model, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_case(tmp_path, "p")
    write_image(files[1], np.where(image(0) > 0, value, 0).astype(np.int16))
    item = prepare(model, files)
    assert item.available == (True, False, True, True)
    assert not item.data[1].any()
    assert "Case p: t1ce has the same value everywhere and counts as missing" in caplog.text
    with pytest.raises(CaseError, match="no modality is left, t1ce has the same value everywhere"):
        prepare(model, files, (False, True, False, False))


@pytest.mark.parametrize("value", [-1, 1])
def test_a_placeholder_of_any_value_is_as_good_as_no_file(
    tmp_path: Path, model: Model, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_case(tmp_path, "p")
    absent = prepare(model, files, (True, False, True, True))
    write_image(files[1], np.full(SHAPE, value, dtype=np.int16))
    item = prepare(model, files)
    np.testing.assert_array_equal(item.data, absent.data)
    assert str(item.properties) == str(absent.properties)
    assert item.available == (True, False, True, True)
    assert "Case p: t1ce has the same value everywhere and counts as missing (left: t1+t2+flair)." in caplog.text
    with pytest.raises(EmptyCaseError, match="no modality is left, t1ce has the same value everywhere"):
        prepare(model, files, (False, True, False, False))


def test_cascade_input_is_stacked_as_by_nnunet(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path / "m", folds=(), cascade=True))
    files = write_case(tmp_path / "in", "p")
    labels = np.random.default_rng(0).integers(0, 3, size=SHAPE).astype(np.uint8)
    previous = write_image(tmp_path / "p.nii.gz", labels)
    data, seg, _ = stock(model, files, previous)
    one_hot = convert_labelmap_to_one_hot(seg[0], [1, 2], data.dtype)
    np.testing.assert_array_equal(prepare(model, files, previous=previous).data, np.vstack((data, one_hot)))
    without = prepare(model, files, (False, True, True, True), previous).data
    assert not without[0].any()
    np.testing.assert_array_equal(without[4:], one_hot)
    with pytest.raises(CaseError, match=r"Case p: the previous stage's segmentation .*none.nii.gz does not exist"):
        prepare(model, files, previous=tmp_path / "none.nii.gz")
    with pytest.raises(CaseError, match="previous stage's segmentation has shape"):
        prepare(model, files, previous=write_image(tmp_path / "small.nii.gz", labels[1:]))
    with pytest.raises(CaseError, match=r"second stage of a cascade and needs the labels 3d_lowres predicted for the"):
        prepare(model, files)


def test_a_bad_case_yields_an_error_item_and_the_others_go_on(tmp_path: Path, model: Model) -> None:
    good, bad = write_case(tmp_path, "a"), write_case(tmp_path, "b", [0, 1])
    bad[1].write_bytes(b"")

    def job(name: str, files: dict[int, Path]) -> Job:
        case = Case(name, {c: str(path) for c, path in files.items()})
        return Job(name, name, functools.partial(prepare_job, case, ["auto"], model, None, name))

    def broken() -> dict[str, Any]:
        raise ZeroDivisionError("boom")

    items = list(iterate_items([job("a", good), job("b", bad), Job("c", None, broken), job("d", {0: good[0]})], 0))
    assert [item.case for item in items] == ["a", "b", "c", "d"]
    assert "cannot be read" in items[1].error
    assert "ZeroDivisionError: boom" in items[2].error
    assert items[3].available == (True, False, False, False)
    assert [isinstance(item, FailedItem) for item in items] == [False, True, True, False]


def test_items_are_read_as_the_dicts_they_were_with_a_warning(tmp_path: Path, model: Model) -> None:
    item = prepare(model, write_case(tmp_path, "p"))
    for key, value in (("data", item.data), ("data_properties", item.properties), ("availability", item.available)):
        with pytest.warns(DeprecationWarning, match="until 0.3"):
            assert item[key] is value
    with pytest.warns(DeprecationWarning, match="no dicts"), pytest.raises(KeyError, match="nothing"):
        item["nothing"]


def test_without_workers_only_one_case_is_prepared_at_a_time() -> None:
    prepared: list[int] = []

    def prepare_number(number: int) -> dict[str, Any]:
        prepared.append(number)
        return {"case": str(number)}

    items = iterate_items([Job(str(i), None, functools.partial(prepare_number, i)) for i in range(4)], 0)
    for count in range(1, 5):
        next(items)
        assert len(prepared) == count
