"""`mgml export-network`: files that other programs run, and what is said of them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inference_cases import predictor, write_model

from nnunetv2_mgml.commands.main import main
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.workflows import export_network as workflow

needs_export = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in workflow.LIBRARIES),
    reason="needs openvino, onnx, onnxscript",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def exported(model: Path) -> Path:
    folder = model.parent / "network"
    assert main(["export-network", "-m", str(model), "-o", str(folder)]) == 0
    return folder


@needs_export
def test_files_and_what_is_said_of_them(exported: Path) -> None:
    assert sorted(file.name for file in exported.iterdir()) == [
        "export.json",
        "fold_0.bin",
        "fold_0.onnx",
        "fold_0.xml",
    ]
    about = json.loads((exported / "export.json").read_text())
    assert about["channels"] == ["t1", "t1ce", "t2", "flair"]
    differences = about["difference_by_fold_and_subset"]["fold_0"]
    assert len(differences) == len(all_subsets(4))
    assert max(differences.values()) == about["largest_difference_from_pytorch"] < 1e-3


@needs_export
def test_norms_that_know_what_is_visible(tmp_path: Path) -> None:
    """The mask is an input of the exported network, for them as well."""
    model = write_model(tmp_path / "model", options={"conditional_norms": True})
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    parts = [name for name in checkpoint["network_weights"] if name.endswith("of_modalities")]
    assert parts
    for name in parts:
        checkpoint["network_weights"][name] += 0.5 * torch.randn_like(checkpoint["network_weights"][name])
    torch.save(checkpoint, file)
    assert main(["export-network", "-m", str(model), "-o", str(tmp_path / "network")]) == 0
    about = json.loads((tmp_path / "network" / "export.json").read_text())
    assert about["largest_difference_from_pytorch"] < 1e-3


@needs_export
@pytest.mark.parametrize("file", ["fold_0.onnx", "fold_0.xml"])
def test_another_program_gets_pytorchs_logits(exported: Path, model: Path, file: str) -> None:
    """By OpenVINO alone, with float32 weights, whatever the absent channels hold."""
    import openvino

    request = openvino.Core().compile_model(str(exported / file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = torch.randn(1, 4, 16, 16, 16)
    visible = torch.tensor([[False, True, False, True]])
    network = predictor(model).network.eval()
    with torch.inference_mode():
        wanted = network(image, visible).numpy()
    image[:, ~visible[0]] = torch.inf
    got = request({"image": image.numpy(), "visible": visible.numpy()})[0]
    assert np.abs(got - wanted).max() < 1e-3


@needs_export
@pytest.mark.parametrize(
    "options",
    [{"fusion": "demoseg"}, {"fusion": "mean", "network_form": "early_fusion"}, {"network_form": "shared_encoder"}],
)
def test_every_form_is_exported(options: dict[str, Any], tmp_path: Path) -> None:
    """Channel shuffles, too, are made by operations that ONNX has."""
    model = write_model(tmp_path / "model", options=options)
    assert main(["export-network", "-m", str(model), "-o", str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["largest_difference_from_pytorch"] < 1e-3


@needs_export
def test_conditional_norms_are_exported(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "nnUNetTrainerModalityDropout_conditional")
    assert main(["export-network", "-m", str(model), "-o", str(tmp_path / "out")]) == 0
    about = json.loads((tmp_path / "out" / "export.json").read_text())
    assert about["largest_difference_from_pytorch"] < 1e-3


@needs_export
def test_an_export_that_is_not_exact_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "_runner", lambda file: lambda image, visible: image.numpy()[:, :3].copy())
    monkeypatch.setattr(workflow.torch.onnx, "export", lambda *_, **__: None)
    monkeypatch.setattr("openvino.convert_model", lambda *_: None)
    monkeypatch.setattr("openvino.save_model", lambda *_, **__: None)
    assert main(["export-network", "-m", str(model), "-o", str(tmp_path / "out")]) == 2
    assert "what an absent channel holds" in capsys.readouterr().err
    for answer, message in (
        (torch.zeros, "not exact: its logits differ"),
        (lambda s: torch.full(s, torch.nan), "finite"),
    ):
        monkeypatch.setattr(
            workflow, "_runner", lambda file, a=answer: lambda image, visible: a((1, 3, *image.shape[2:])).numpy()
        )
        assert main(["export-network", "-m", str(model), "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_is_named_once(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["export-network", "-o", str(tmp_path / "out")], ["evaluate", "-d", "137", "-f", "0"]):
        assert main([*command, "-m", str(model), "-c" if command[0] == "evaluate" else "-tr", "2d"]) == 2
        assert "-m names a model already, and -" in capsys.readouterr().err


def test_what_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workflow, "find_spec", lambda name: name == "onnx" or None)
    assert main(["export-network", "-m", str(model), "-o", str(tmp_path / "out")]) == 2
    assert "needs openvino, onnxscript. Fix: pip install openvino onnxscript" in capsys.readouterr().err
    monkeypatch.setattr(workflow, "find_spec", lambda name: name)
    assert main(["export-network", "-m", str(model), "-o", str(tmp_path)]) == 2
    assert "exists. Choose another folder" in capsys.readouterr().err
    dropout = write_model(tmp_path / "dropout", "nnUNetTrainerModalityDropout")
    assert main(["export-network", "-m", str(dropout), "-o", str(tmp_path / "out")]) == 2
    assert "does not know subsets" in capsys.readouterr().err
