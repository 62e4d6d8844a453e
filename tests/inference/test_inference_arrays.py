"""The Python API with arrays and modality names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import (
    SHAPE,
    image,
    load,
    predictor,
    write_case,
    write_model,
)
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnunetv2_mgml.inference.arrays import as_array
from nnunetv2_mgml.inference.geometry import NEEDED, check_writable
from nnunetv2_mgml.inference.inputs import CaseError
from nnunetv2_mgml.inference.predictor import MGMLPredictor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mgml", folds=(0, 1))


@pytest.fixture(scope="module")
def auto(model: Path) -> MGMLPredictor:
    return predictor(model)


def test_every_array_call_gives_the_same_segmentation(tmp_path: Path, model: Path, auto: MGMLPredictor) -> None:
    volumes = [image(c).astype(np.float32) for c in range(4)]
    properties = {"spacing": [1.0, 1.0, 1.0]}
    files = write_case(tmp_path, "p")
    expected = auto.predict_case({"T1Gd": files[1], "FLAIR": str(files[3])})
    full = np.stack(volumes)
    calls: dict[str, Callable[[], Any]] = {
        "by name": lambda: auto.predict_case({"t1c": volumes[1], "flair": volumes[3], "t1": None}, spacing=(1, 1, 1)),
        "tuple": lambda: auto.predict_single_npy_array((None, volumes[1], None, volumes[3]), properties),
        "zeros": lambda: auto.predict_single_npy_array(full * np.array([0, 1, 0, 1])[:, None, None, None], properties),
        "named": lambda: predictor(model, ["t1", "t2"]).predict_single_npy_array(full, properties),
        "list": lambda: auto.predict_from_list_of_npy_arrays(
            [(None, volumes[1], None, volumes[3])], None, [properties], None, 0, False, 0
        )[0],
    }
    for name, call in calls.items():
        np.testing.assert_array_equal(call(), expected, err_msg=name)
    assert properties == {"spacing": [1.0, 1.0, 1.0]}
    labels, probabilities = auto.predict_case(
        {"t1ce": volumes[1], "flair": volumes[3]}, spacing=(1, 1, 1), return_probabilities=True
    )
    np.testing.assert_array_equal(labels, expected)
    assert probabilities.shape == (3, *SHAPE)


def test_a_bad_image_in_a_list_does_not_lose_the_others(auto: MGMLPredictor) -> None:
    volume = image(0).astype(np.float32)
    images = [(volume, None, None, None), (None,) * 4, (volume, None)]
    returned = auto.predict_from_list_of_npy_arrays(images, None, [{"spacing": [1.0] * 3}] * 3, None, 0, False, 0)
    assert [result is None for result in returned] == [False, True, True]
    assert "no modality is left" in auto.failures["image 1"]
    assert "2 channels given, the model has 4" in auto.failures["image 2"]


@pytest.mark.parametrize(
    ("images", "kwargs", "words"),
    [
        ({"dwi": image(0)}, {"spacing": (1, 1, 1)}, "Unknown modality 'dwi'"),
        ({}, {"spacing": (1, 1, 1)}, "no modality is left"),
        ({"t1": image(0)}, {}, "spacing.* in mm"),
        ({"t1": image(0), "t1n": image(1)}, {"spacing": (1, 1, 1)}, "t1 is given twice"),
        ({"t1": image(0), "t2": "t2.nii.gz"}, {"spacing": (1, 1, 1)}, "not both"),
        ({"t1": image(0), "t2": image(2)[1:]}, {"spacing": (1, 1, 1)}, "one shape"),
        ({"t1": np.full(SHAPE, np.nan)}, {"spacing": (1, 1, 1)}, "NaN"),
        ({"t1": image(0)}, {"spacing": 1.0}, "spacing.* in mm"),
        ({"t1": [[[1, 2], [3]]]}, {"spacing": (1, 1, 1)}, "Case given: t1 cannot be made an array"),
        ({"t1": image(0).astype(str)}, {"spacing": (1, 1, 1)}, "t1 must be an array of real numbers, got ndarray"),
        ({"t1": object()}, {"spacing": (1, 1, 1)}, "t1 must be an array of real numbers, got object"),
        ({"t1": "gone.nii.gz"}, {}, "does not exist"),
    ],
)
def test_wrong_arguments_of_predict_case(auto: MGMLPredictor, images: dict, kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        auto.predict_case(images, **kwargs)


def test_a_single_image_raises_what_is_wrong_with_it(auto: MGMLPredictor) -> None:
    with pytest.raises(CaseError, match="no modality is left"):
        auto.predict_single_npy_array((None,) * 4, {"spacing": [1.0] * 3})


def test_whatever_can_be_an_array_is_taken_for_one(auto: MGMLPredictor) -> None:
    volume = image(0)
    expected = auto.predict_case({"t1": volume}, spacing=(1, 1, 1))
    tensor = torch.from_numpy(volume.astype(np.float32))
    for given in (tensor, tensor.clone().requires_grad_(), volume.tolist()):
        np.testing.assert_array_equal(auto.predict_case({"t1": given}, spacing=torch.ones(3)), expected)
    for several in (torch.stack([tensor, *[torch.zeros(SHAPE)] * 3]), (tensor, None, None, None)):
        found = auto.predict_from_list_of_npy_arrays([several], None, [{"spacing": [1] * 3}], None, 0, False, 0)
        np.testing.assert_array_equal(found[0], expected)


def test_a_tensor_of_any_device_and_precision_becomes_an_array() -> None:
    assert as_array("x", torch.ones(2, dtype=torch.bfloat16)).dtype == np.float32

    class OnGpu:
        """What NumPy cannot take as it is, as a tensor on a GPU."""

        def detach(self) -> OnGpu:
            return self

        def cpu(self) -> torch.Tensor:
            return torch.arange(3)

        def __array__(self, *arguments: Any, **options: Any) -> np.ndarray:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    assert as_array("x", OnGpu()).tolist() == [0, 1, 2]


def test_properties_from_which_no_file_can_be_written_are_refused_before_the_prediction(
    auto: MGMLPredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volumes = (image(0), None, None, None)
    target = str(tmp_path / "p")
    with monkeypatch.context() as patched:
        patched.setattr(auto, "_logits", None)  # nothing is predicted
        with pytest.raises(
            ValueError, match=r"sitk_stuff with spacing, origin, direction\. .*SimpleITKIO\(\)\.read_images"
        ):
            auto.predict_single_npy_array(volumes, {"spacing": [1.0] * 3}, output_file_truncated=target)
        assert auto.predict_from_list_of_npy_arrays([volumes], None, [{"spacing": [1] * 3}], [target], 0, False, 0) == [
            None
        ]
        assert "sitk_stuff" in auto.failures["p"]
    assert not (tmp_path / "p.nii.gz").exists()
    file = write_case(tmp_path / "in", "p", [0])[0]
    read, properties = SimpleITKIO().read_images([str(file)])
    auto.predict_single_npy_array((read[0], None, None, None), properties, output_file_truncated=target)
    np.testing.assert_array_equal(load(tmp_path / "p.nii.gz"), auto.predict_case({"t1": file}))


@pytest.mark.parametrize("writer", [*LIST_OF_IO_CLASSES, SimpleITKIOWithReorient])
def test_what_writers_need_is_what_is_asked_for(writer: type[BaseReaderWriter], tmp_path: Path) -> None:
    ending = writer.supported_file_endings[0]
    everything = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": np.eye(3).ravel().tolist()}
    everything |= {"original_orientation": "LPS", "original_affine": np.eye(4), "reoriented_affine": np.eye(4)}
    properties: dict[str, Any] = {"spacing": [1.0] * 3}
    entry, keys = NEEDED.get(writer.__name__, ("", ()))
    if entry:
        for left_out in keys:
            fewer = {**properties, entry: {key: everything[key] for key in keys if key != left_out}}
            with pytest.raises(CaseError, match=f"Case p.*{entry} with {left_out}"):
                check_writable("p", fewer, writer)
            with pytest.raises(KeyError, match=left_out):
                writer().write_seg(np.zeros((1, 4, 5), np.uint8), str(tmp_path / f"a{ending}"), fewer)
        properties[entry] = {key: everything[key] for key in keys}
    check_writable("p", properties, writer)
    writer().write_seg(np.zeros((1, 4, 5), np.uint8), str(tmp_path / f"a{ending}"), properties)
    assert (tmp_path / f"a{ending}").is_file()
