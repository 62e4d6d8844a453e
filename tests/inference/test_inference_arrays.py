"""The Python API with arrays and modality names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_cases import (
    SHAPE,
    image,
    predictor,
    write_case,
    write_model,
)

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
        ({"t1": "gone.nii.gz"}, {}, "does not exist"),
    ],
)
def test_wrong_arguments_of_predict_case(auto: MGMLPredictor, images: dict, kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        auto.predict_case(images, **kwargs)


def test_a_single_image_raises_what_is_wrong_with_it(auto: MGMLPredictor) -> None:
    with pytest.raises(CaseError, match="no modality is left"):
        auto.predict_single_npy_array((None,) * 4, {"spacing": [1.0] * 3})
