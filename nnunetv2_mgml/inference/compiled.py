"""A network compiled by OpenVINO for one subset of its modalities: ``--backend openvino``.

The graph is traced while the network sees that subset, so absent modalities are not encoded in it, and nothing that
an absent channel holds can reach the output: *missing is exact* here too.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.interface import bare, seeing

BACKENDS = ("pytorch", "openvino")
EXTRA = "export"
"""Of the package: what else has to be installed."""


def require_openvino() -> None:
    """Raise a ValueError with the install line when OpenVINO is not there."""
    if find_spec("openvino") is None:
        raise ValueError(
            f"The backend openvino needs the library of this name, which is not installed. Fix: pip install openvino "
            f"(or the package with its extra '{EXTRA}')."
        )


class CompiledNetwork(nn.Module):
    """Stands for a network where nnU-Net calls ``network(x)``, on a CPU, for one patch at a time.

    Args:
        network: in evaluation mode, without deep supervision; its weights are copied.
        example: a patch ``(1, M + P, *spatial)`` float32.
        bfloat16: compute in bfloat16; else in float32, whatever OpenVINO would choose.
    """

    def __init__(self, network: nn.Module, example: torch.Tensor, bfloat16: bool = False) -> None:
        super().__init__()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: shapes and the subset are constants, as they are meant to be
            try:
                traced = torch.jit.trace(bare(network), example, check_trace=False)
                model = converted(traced, example_input=example)
            except Exception as error:  # both libraries have their own
                said = str(error).strip().splitlines()[:1]
                raise ValueError(
                    f"OpenVINO cannot take this network ({type(error).__name__}: {' '.join(said)}). Predict with "
                    f"--backend pytorch."
                ) from error
        self._compiled = compiled(model, bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, M + P, *spatial)`` float32 to logits ``(B, heads, *spatial)`` float32."""
        patches = np.ascontiguousarray(x.numpy())
        rows = [torch.from_numpy(self._compiled([patch[None]])[0].copy()) for patch in patches]
        return torch.cat(rows)


def converted(source: Any, **options: Any) -> Any:
    """Return what ``openvino.convert_model`` makes of a source; the root logger stays as it was.

    OpenVINO sets its level to ERROR and leaves a filter and a handler there; without this, all later warnings of the
    process would be lost.
    """
    import openvino

    root = logging.getLogger()
    level, filters, handlers = root.level, list(root.filters), list(root.handlers)
    try:
        return openvino.convert_model(source, **options)
    finally:
        root.setLevel(level)
        root.filters[:], root.handlers[:] = filters, handlers


def compiled(model: Any, bfloat16: bool = False) -> Any:
    """Return an OpenVINO model ready to run with as many threads as PyTorch uses.

    Args:
        model: an ``openvino.Model``, or the path of a file with one.
        bfloat16: compute in bfloat16; else in float32.
    """
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(model, "CPU", settings)


class CompiledNetworks:
    """The compiled networks of a predictor: one for each subset and each fold's weights, made when first needed.

    Args:
        bfloat16: see `CompiledNetwork`.
    """

    def __init__(self, bfloat16: bool = False) -> None:
        self.bfloat16 = bfloat16
        self._made: dict[tuple[bytes, Subset, torch.Size], CompiledNetwork] = {}

    def of(self, network: nn.Module, subset: Subset, example: torch.Tensor) -> CompiledNetwork:
        """Return the compiled network for a subset, with the weights the network has now."""
        key = (_digest(network), subset, example.shape)
        if key not in self._made:
            was_training = network.training
            with seeing(network, subset):
                self._made[key] = CompiledNetwork(network.eval(), example, self.bfloat16)
            network.train(was_training)
        return self._made[key]


def _digest(network: nn.Module) -> bytes:
    """Return what tells weights apart: nnU-Net loads those of every fold into one network."""
    hashed = hashlib.blake2b()
    for tensor in network.state_dict().values():
        hashed.update(tensor.detach().cpu().numpy().tobytes())
    return hashed.digest()
