"""The training step and the prediction of every design on a GPU that is not there: fake tensors on a CUDA device.

Fake tensors have shapes and devices but no values. A tensor left on the CPU, a value read (which waits for the GPU), a
shape that depends on values, and a copy between CPU and GPU (which waits too) fail here as they would there, or would
slow it down.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nnunetv2_mgml.dataloading.masking import SubsetSampler
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.objective import random_subsets

FOLDER = Path(__file__).parents[2] / "benchmarks"
CUDA = torch.device("cuda", 0)
_COPYING = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")


@pytest.fixture(scope="module")
def step() -> Iterator[SimpleNamespace]:
    """`benchmarks/step.py` as a module."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("step")
    sys.path.remove(str(FOLDER))
    del sys.modules["step"]


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices, those of indices too; a CPU scalar as an operand is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _COPYING or "index" in func._schema.name:
            devices = {t.device.type for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)}
            assert len(devices) == 1, f"{func} between {' and '.join(sorted(devices))}"
        return result


def to_fake(module: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Replace parameters and buffers by fake ones on a device."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(fake(parameter)))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = fake(buffer)


def fake_step(step: SimpleNamespace, mode: FakeTensorMode, options: dict[str, Any], device: torch.device) -> Any:
    """Return a training step on a fake device, on the GPU in float16."""
    plan = step.make_plan((16, 16, 16), 3)
    if options == CONDITIONAL:
        learner = step.StockLearner(plan, width_factor=0.25, conditional=True)
    else:
        learner = step.Learner(plan, {**options, "width_factor": 0.25})
    for module in learner.modules():
        to_fake(module, mode, device)
    batch = step.random_batch(plan, 2)
    with mode:
        batch = tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), batch)
    training = step.TrainingStep(learner, batch, "float32")  # a gradient scaler waits by design, once a step
    training.precision = "float16" if device.type == "cuda" else "float32"
    return training


TERMS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0},
    "better": {"teaching": "better"},
    "mean": {"soft_label": "mean"},
    "fixed": {"soft_label": "fixed"},
    "uniform mask": {"mask_mode": "uniform"},
    "paper": {"reading": "paper"},
    "reference": {"reading": "reference"},
}
FORMS: dict[str, dict[str, Any]] = {
    "region_aware_full": {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": True}},
    "demoseg_early": {"fusion": "demoseg", "network_form": "early_fusion"},
}
DESIGNS = {**{name: {"fusion": name} for name in fusion_designs()}, **FORMS}
CONDITIONAL = {"conditional": True}
"""The stock network with conditional norms, which knows no options of ours."""
CASES = {**DESIGNS, **TERMS, "conditional": CONDITIONAL}
cases = pytest.mark.parametrize("name", list(CASES))


@pytest.fixture(autouse=True)
def autocast_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch switches autocast for CUDA off where there is none, and knows no autocast on the device "meta"."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    autocast = torch.autocast

    def or_none(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", or_none)


@cases
def test_forward_pass_and_losses_in_float16(step: SimpleNamespace, name: str) -> None:
    mode = FakeTensorMode()
    training = fake_step(step, mode, CASES[name], CUDA)
    with mode, NoCopies():
        loss = training.forward()
    assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())


@cases
def test_whole_step(step: SimpleNamespace, name: str) -> None:
    """With backward pass, clipping and optimizers; on a device without a queue, since autograd asks a GPU for its."""
    mode, device = FakeTensorMode(), torch.device("meta")
    training = fake_step(step, mode, CASES[name], device)
    with mode, NoCopies():
        loss = training()
    assert loss.device == device
    gradients = [p.grad for p in training.learner.network.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.device == device for gradient in gradients)


@pytest.mark.parametrize("name", list(DESIGNS))
def test_prediction(step: SimpleNamespace, name: str) -> None:
    mode = FakeTensorMode()
    training = fake_step(step, mode, DESIGNS[name], CUDA)
    network, x = training.learner.network.eval(), training.batch.x
    network.decoder.deep_supervision = False
    with mode, torch.inference_mode(), training.autocast():
        subsets = torch.empty(15, 4, dtype=torch.bool, device=CUDA)
        with NoCopies():
            together = training.learner.predict(x, subsets)
            one = network(x, modality_mask=training.batch.visible)
        assert (together.shape, one.shape) == ((2, 15, 3, 16, 16, 16), (2, 3, 16, 16, 16))
        assert (together.device, together.dtype) == (one.device, one.dtype) == (CUDA, torch.float16)


def test_patches_of_the_cubes(step: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step of `benchmarks/ablation/cubes.py` draws."""
    monkeypatch.syspath_prepend(str(FOLDER / "ablation"))
    data = importlib.import_module("cubes_data")
    drawn = data.draw([0, 1, 2], 5, 2, 16, 20, SubsetSampler("uniform_subset", (0.5,) * 4), 0)
    with FakeTensorMode():
        images, regions = (
            torch.empty(3, channels, 20, 20, 20, dtype=kind, device=CUDA)
            for channels, kind in ((4, torch.float32), (3, torch.bool))
        )
        draws = data.Draws(*(torch.empty(t.shape, dtype=t.dtype, device=CUDA) for t in drawn))
        number = torch.empty(1, dtype=torch.int64, device=CUDA)
        with NoCopies():
            patches, inside = data.cut(data.Cubes(images, regions, []), draws.at(number), 16)
            targets = step.at_scales(inside, step.make_plan((16, 16, 16), 3))
    assert (patches.shape, patches.device, patches.dtype) == ((2, 4, 16, 16, 16), CUDA, torch.float32)
    assert [t.shape[2:] for t in targets] == [(16, 16, 16), (8, 8, 8)]
    for name in ("cubes_data", "cubes_variants"):
        del sys.modules[name]


def test_further_subsets_are_drawn_there() -> None:
    with FakeTensorMode(), NoCopies():
        drawn = random_subsets(torch.empty(2, 4, dtype=torch.bool, device=CUDA), 3)
    assert (drawn.shape, drawn.device, drawn.dtype) == ((2, 3, 4), CUDA, torch.bool)


def test_what_is_visible_lies_where_the_network_is(step: SimpleNamespace) -> None:
    network = step.Learner(step.make_plan((16, 16, 16), 3), {"width_factor": 0.25}).network.to("meta")
    network.set_visible((True, False, True, False))
    assert network._visible.device.type == "meta"


def stray(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros(len(x))


WRONG: dict[str, tuple[type[Exception], Callable[[torch.Tensor], Any]]] = {
    "left on the CPU": (RuntimeError, stray),
    "reads a value": (DataDependentOutputException, lambda x: float(x.sum())),
    "branches on a value": (DataDependentOutputException, lambda x: x if x.any() else -x),
    "shape by value": (DynamicOutputShapeException, lambda x: x[x > 0].sum()),
    "copied there": (AssertionError, lambda x: x + torch.ones(len(x)).to(x.device)),
    "made from a list": (AssertionError, lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device)),
    "indexed by a list": (AssertionError, lambda x: x[[0, 2]]),
    "copied back": (AssertionError, lambda x: x.cpu()),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_what_would_wait_or_fail_there_fails_here(kind: str) -> None:
    error, function = WRONG[kind]
    with FakeTensorMode(), pytest.raises(error), NoCopies():
        function(torch.empty(3, device=CUDA))
