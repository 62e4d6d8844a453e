"""A trained network as ONNX and OpenVINO files, with what is visible as an input, checked against PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from numpy.typing import NDArray
from torch import nn

from nnunetv2_mgml import __version__
from nnunetv2_mgml.inference.compiled import EXTRA, compiled, converted
from nnunetv2_mgml.inference.predictor import MGMLPredictor
from nnunetv2_mgml.io.files import replacing_folder, write_json
from nnunetv2_mgml.modalities import Subset, all_subsets, subset_name
from nnunetv2_mgml.network.interface import bare, subset_network

ABOUT = "export.json"
LIBRARIES = ("openvino", "onnx", "onnxscript")
_IMAGE, _VISIBLE, _LOGITS = "image", "visible", "logits"
_TOLERANCE = 1e-2
"""Of the largest logit: far above the rounding of 32 bits, far below what a wrong layer does."""


@dataclass(frozen=True)
class NetworkExportRequest:
    """What to export."""

    model_folder: Path
    """``.../TRAINER__PLANS__CONFIGURATION``."""
    output: Path
    """A folder that does not exist."""
    folds: tuple[int | str, ...] | None = None
    """None: every numbered fold that has the checkpoint."""
    checkpoint: str = "checkpoint_final.pth"
    trust_checkpoint: bool = False


@dataclass(frozen=True)
class ExportedNetwork:
    """What was written."""

    files: tuple[Path, ...]
    difference: float
    """The largest of any logit from PyTorch's, over all folds and subsets."""


def export_network(request: NetworkExportRequest) -> ExportedNetwork:
    """Write ``fold_X.onnx``, ``fold_X.xml`` with ``fold_X.bin``, and ``export.json`` that says how they are used.

    A network maps ``image (1, M + P, *patch)`` float32, preprocessed as nnU-Net does it, and ``visible (1, M)`` bool to
    ``logits (1, heads, *patch)`` float32. It is run on noise for every subset, by OpenVINO from the ONNX file and from
    its own, and compared with PyTorch; and once more with NaN in the absent channels, which may change nothing.

    Raises:
        FileNotFoundError: no model there.
        FileExistsError: the output is there already.
        ValueError: a library is missing, a model that does not know subsets, a fusion design that cannot be exported,
            or an exported network that is not exact.
    """
    lacking = [name for name in LIBRARIES if find_spec(name) is None]
    if lacking:
        raise ValueError(
            f"mgml export-network needs {', '.join(lacking)}. Fix: pip install {' '.join(lacking)} (or the package "
            f"with its extra '{EXTRA}')."
        )
    if request.output.exists():
        raise FileExistsError(f"{request.output} exists. Choose another folder (-o), or remove it.")
    predictor = MGMLPredictor(
        missing_modalities=["auto"], device=torch.device("cpu"), trust_checkpoint=request.trust_checkpoint
    )
    predictor.initialize_from_trained_model_folder(str(request.model_folder), request.folds, request.checkpoint)
    network = bare(predictor.network).eval()
    if subset_network(network) is None:
        raise ValueError(
            f"The network of {predictor.trainer_name} does not know subsets, so it has no input for what is visible. "
            f"Export a model of nnUNetTrainerMGML or one of its variants."
        )
    differences = {}
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(request.output) as folder:
        for fold, weights in zip(predictor._origin["folds"], predictor.list_of_parameters, strict=True):
            network.load_state_dict(weights)
            differences[f"fold_{fold}"] = _export(network, folder / f"fold_{fold}", predictor)
        worst = max(max(per_subset.values()) for per_subset in differences.values())
        write_json(folder / ABOUT, _about(predictor, request, differences, worst))
    return ExportedNetwork(tuple(sorted(request.output.iterdir())), worst)


def _about(
    predictor: MGMLPredictor, request: NetworkExportRequest, differences: dict[str, Any], worst: float
) -> dict[str, Any]:
    configuration = predictor.configuration_manager
    return {
        "model_folder": request.model_folder.name,
        "checkpoint": request.checkpoint,
        "trainer": predictor.trainer_name,
        "channels": list(predictor.channels),
        "patch_size": list(configuration.patch_size),
        "spacing": list(configuration.spacing),
        "inputs": {
            _IMAGE: "(1, channels, *patch_size) float32, preprocessed as nnU-Net does it; what an absent channel holds "
            "does not matter",
            _VISIBLE: "(1, modalities) bool, true: the network may see it",
        },
        "output": {_LOGITS: "(1, heads, *patch_size) float32; regions: sigmoid, labels: softmax"},
        "largest_difference_from_pytorch": worst,
        "difference_by_fold_and_subset": differences,
        "missing_is_exact": True,
        "versions": {"nnunetv2_mgml": __version__, "torch": torch.__version__, **{n: version(n) for n in LIBRARIES}},
    }


class _WithMask(nn.Module):
    """Gives the two inputs the names they have in the file."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(image, visible)
        return logits


def _export(network: nn.Module, stem: Path, predictor: MGMLPredictor) -> dict[str, float]:
    """Write the files of one fold; returns the largest difference from PyTorch by subset."""
    import openvino

    modalities = len(predictor.channels)
    plan = predictor.configuration_manager
    channels = determine_num_input_channels(predictor.plans_manager, plan, predictor.dataset_json)
    image = torch.randn(1, channels, *plan.patch_size, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(1, modalities, dtype=torch.bool)
    onnx_file, own_file = stem.with_suffix(".onnx"), stem.with_suffix(".xml")
    with _quietly():
        try:
            torch.onnx.export(
                _WithMask(network),
                (image, visible),
                str(onnx_file),
                dynamo=True,
                external_data=False,
                input_names=[_IMAGE, _VISIBLE],
                output_names=[_LOGITS],
                verbose=False,
            )
            openvino.save_model(converted(str(onnx_file)), str(own_file), compress_to_fp16=False)
        except Exception as error:  # each of the three libraries has its own
            said = " ".join(str(error).strip().splitlines()[:1])
            raise ValueError(
                f"The network of this model cannot be exported ({type(error).__name__}: {said}). Predict with PyTorch, "
                f"or train with another fusion design."
            ) from error
    runs = [_runner(str(file)) for file in (onnx_file, own_file)]
    return {
        subset_name(subset, predictor.channels): max(_difference(network, run, image, subset) for run in runs)
        for subset in all_subsets(modalities)
    }


def _runner(file: str) -> Callable[[torch.Tensor, torch.Tensor], NDArray[np.float32]]:
    request = compiled(file)

    def run(image: torch.Tensor, visible: torch.Tensor) -> NDArray[np.float32]:
        answer: NDArray[np.float32] = request({_IMAGE: image.numpy(), _VISIBLE: visible.numpy()})[0].copy()
        return answer

    return run


def _difference(
    network: nn.Module,
    run: Callable[[torch.Tensor, torch.Tensor], NDArray[np.float32]],
    image: torch.Tensor,
    subset: Subset,
) -> float:
    """Return the largest difference from PyTorch.

    Raises:
        ValueError: the exported network is another one: it gives no numbers, an absent channel changes its answer, or
            it differs by more than rounding explains.
    """
    visible = torch.tensor([subset])
    with torch.inference_mode():
        wanted = network(image, visible).numpy()
    answer = run(image, visible)
    if not (np.isfinite(wanted).all() and np.isfinite(answer).all()):
        whose = "This model" if not np.isfinite(wanted).all() else "The exported network"
        raise ValueError(f"{whose} answers with values that are not finite. Is it trained?")
    spoiled = image.clone()
    spoiled[0, [channel for channel, seen in enumerate(subset) if not seen]] = torch.nan
    if not np.array_equal(run(spoiled, visible), answer):
        raise ValueError("The exported network is not exact: what an absent channel holds changes its answer.")
    difference = float(np.abs(answer - wanted).max())
    if difference > _TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise ValueError(
            f"The exported network is not exact: its logits differ from PyTorch's by up to {difference:.3g}. Predict "
            f"with PyTorch, and please report it."
        )
    return difference


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the exporter prints and warns to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
