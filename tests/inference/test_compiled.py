"""Prediction by OpenVINO: equal up to rounding, exact where modalities are missing."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import image, load, predictor, report, run, segmentations, write_case, write_model

from nnunetv2_mgml.inference import compiled
from nnunetv2_mgml.inference.arrays import prepare_named
from nnunetv2_mgml.inference.predictor import MGMLPredictor

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
ROUNDING = 2e-3
"""Of logits, which nnU-Net's sliding window keeps in 16 bit."""


@pytest.fixture(scope="module", params=["nnUNetTrainerMGML", "nnUNetTrainerModalityDropout_conditional"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model", request.param, folds=(0, 1))


@pytest.fixture(scope="module")
def by_openvino(model: Path) -> MGMLPredictor:
    return predictor(model, backend="openvino")


def logits(the_predictor: MGMLPredictor, images: dict[str, Any]) -> np.ndarray:
    item = prepare_named("p", images, {"spacing": [1.0] * 3}, None, ["auto"], the_predictor.model)
    return the_predictor._logits(item).astype(np.float32)


@needs_openvino
@pytest.mark.parametrize("names", [("t1", "t1ce", "t2", "flair"), ("t1", "t2")])
def test_logits_are_pytorchs_up_to_rounding(model: Path, by_openvino: MGMLPredictor, names: tuple[str, ...]) -> None:
    images = {name: image(channel) for channel, name in enumerate(("t1", "t1ce", "t2", "flair")) if name in names}
    wanted, got = logits(predictor(model), images), logits(by_openvino, images)
    assert np.abs(wanted).max() > 0
    assert np.abs(wanted - got).max() < ROUNDING * np.abs(wanted).max()
    assert by_openvino.network is not None
    assert by_openvino.label_manager.num_segmentation_heads == 3


@needs_openvino
def test_missing_is_exact(tmp_path: Path, by_openvino: MGMLPredictor) -> None:
    """A file of a modality that is missing by name changes no bit, whatever it holds."""
    write_case(tmp_path / "with", "p")
    write_case(tmp_path / "without", "p", [0, 2])
    by_openvino.missing_modalities = ["t1ce", "flair"]
    written = [run(by_openvino, str(tmp_path / name), tmp_path / f"{name}_out") for name in ("with", "without")]
    by_openvino.missing_modalities = ["auto"]
    assert written[0] == written[1] == segmentations(tmp_path / "with_out")
    assert load(tmp_path / "with_out" / "p.nii.gz").any()
    assert report(tmp_path / "with_out")["model"]["backend"] == "openvino"


@needs_openvino
def test_one_compiled_network_for_each_subset_and_fold(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = compiled.CompiledNetwork

    def counted(*args: Any) -> Any:
        made.append(args)
        return real(*args)

    monkeypatch.setattr(compiled, "CompiledNetwork", counted)
    both = predictor(model, folds=(0, 1), backend="openvino")
    images = {"t1": image(0), "t2": image(2)}
    first, second = logits(both, images), logits(both, images)
    assert np.array_equal(first, second)
    assert len(made) == 2
    assert np.abs(first - logits(predictor(model, folds=(0, 1)), images)).max() < ROUNDING * np.abs(first).max()


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"Unknown backend 'onnx'\. Allowed: pytorch, openvino"):
        MGMLPredictor(device=cpu, missing_modalities=["auto"], backend="onnx")
    with pytest.raises(ValueError, match="needs missing_modalities"):
        MGMLPredictor(device=cpu, backend="openvino")
    monkeypatch.setattr(compiled, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install openvino"):
        MGMLPredictor(device=cpu, missing_modalities=["auto"], backend="openvino")


@needs_openvino
def test_the_root_logger_stays_as_it_was() -> None:
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    assert before[0] < logging.ERROR
    network = compiled.CompiledNetwork(torch.nn.Conv3d(1, 1, 1), torch.ones(1, 1, 2, 2, 2))
    assert network(torch.ones(1, 1, 2, 2, 2)).shape == (1, 1, 2, 2, 2)
    assert (root.level, root.filters, root.handlers) == before


@needs_openvino
def test_an_operation_openvino_does_not_know() -> None:
    class Strange(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.airy_ai(x)

    with pytest.raises(ValueError, match=r"OpenVINO cannot take this network .*--backend pytorch"):
        compiled.CompiledNetwork(Strange(), torch.ones(1, 1, 2, 2, 2))
