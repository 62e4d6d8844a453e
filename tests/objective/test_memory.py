"""Memory of a training step, predicted from shapes: against what PyTorch's allocator holds, and what it chooses."""

from __future__ import annotations

import copy
import math
from typing import Any

import builders
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.objective import memory
from nnunetv2_mgml.objective.memory import GIB, StepMemory, step_memory
from nnunetv2_mgml.plans.topology import replan, smaller_patches
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML
from nnunetv2_mgml.upstream import cpu_layers
from nnunetv2_mgml.workflows import memory_budget

TOLERANCE = 0.02
"""Of the prediction against the allocator's peak, in 32 bit on a CPU; region_aware was within 0.02 %."""
LABELS = {**builders.BRATS_JSON, "labels": {"background": 0, "a": 1, "b": 2}, "regions_class_order": None}


def planned(**options: Any) -> dict[str, Any]:
    plans = builders.plans()
    plans["mgml"] = {"config": {**builders.TINY, **options}}
    return plans


def measured_peak(trainer: nnUNetTrainerMGML) -> int:
    """Return the allocator's peak over the second training step, all that lived before it included."""
    plan = trainer.configuration_manager
    batch_size, patch = plan.batch_size, plan.patch_size
    regions = trainer.label_manager.has_regions
    heads = trainer.label_manager.num_segmentation_heads if regions else 1
    strides = np.cumprod(plan.pool_op_kernel_sizes, 0)[:-1]
    visible = torch.tensor([[True, False, True, True]] * batch_size)
    batch = {
        "data": torch.randn(batch_size, 4, *patch),
        "target": [
            torch.ones(batch_size, heads, *(n // int(s) for n, s in zip(patch, stride, strict=True))).to(
                torch.bool if regions else torch.float32
            )
            for stride in strides
        ],
        "visible": visible,
        "available": torch.ones_like(visible),
    }
    trainer.train_step(batch)
    trainer.steps_in_epoch = 0  # a full step, as the one that is predicted
    for optimizer in (trainer.optimizer, *trainer.learner.optimizers):
        optimizer.zero_grad(set_to_none=True)
    tensors = [*batch["target"], batch["data"], *trainer.network.parameters()]
    tensors += [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.train_step(batch)
    held = peak = 0
    for event in without_workspaces(recorded.profiler.kineto_results.events()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + sum(t.numel() * t.element_size() for t in tensors)


def without_workspaces(events: list[Any]) -> list[Any]:
    """Return the allocations and releases in order, without what a convolution takes and gives back inside.

    oneDNN's workspaces depend on the processor; the prediction is without them.
    """
    memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    convolutions = [e for e in events if e.name() in ("aten::mkldnn_convolution", "aten::convolution_backward")]
    inside: set[int] = set()
    for convolution in convolutions:
        taken: dict[int, list[int]] = {}
        for place, event in enumerate(memory):
            if not convolution.start_ns() <= event.start_ns() <= convolution.end_ns():
                continue
            if event.nbytes() > 0:
                taken.setdefault(event.nbytes(), []).append(place)
            elif taken.get(-event.nbytes()):
                inside |= {place, taken[-event.nbytes()].pop()}
    return [event for place, event in enumerate(memory) if place not in inside]


@pytest.mark.parametrize(
    ("options", "dataset_json"),
    [
        ({"fusion": "concat"}, builders.BRATS_JSON),
        ({"fusion": "mean", "optimizer": "adam"}, LABELS),
        ({"fusion": "uhved", "soft_label": "none", "consistency_weight": 0.0}, builders.BRATS_JSON),
    ],
)
def test_prediction_is_what_the_allocator_holds(
    options: dict[str, Any], dataset_json: dict[str, Any], nnunet_folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_layers, "suits", lambda *_: False)  # a CPU's copies for speed are not counted
    written = builders.write_dataset(nnunet_folders, dataset_json)
    trainer = builders.make_trainer(nnUNetTrainerMGML, written, options, dataset_json)
    trainer.initialize()
    predicted = step_memory(planned(**options), "3d_fullres", dataset_json, mixed_precision=False)
    parameters = sum(p.numel() for p in trainer.network.parameters())
    assert predicted.weights == 4 * parameters * (4 if options.get("optimizer") == "adam" else 2)
    assert predicted.peak == pytest.approx(measured_peak(trainer), rel=TOLERANCE)


@pytest.mark.parametrize(("dataset_json", "value"), [(builders.BRATS_JSON, 4), (LABELS, 3)])
def test_an_ignore_label_is_counted(dataset_json: dict[str, Any], value: int) -> None:
    """Of regions its own channel of the target; the heads stay what they are."""
    ignoring = {**dataset_json, "labels": {**dataset_json["labels"], "ignore": value}}
    plans = planned(fusion="mean")
    without, told = (step_memory(plans, "3d_fullres", each) for each in (dataset_json, ignoring))
    assert told.weights == without.weights
    assert without.peak <= told.peak < 1.05 * without.peak
    if dataset_json is builders.BRATS_JSON:
        assert told.peak > without.peak


@pytest.mark.parametrize("form", ["multi_encoder", "shared_encoder", "early_fusion"])
@pytest.mark.parametrize("design", fusion_designs())
def test_every_design_is_counted(design: str, form: str) -> None:
    """No design may read what the mask says, which has no data here."""
    plans = planned(fusion=design, network_form=form, fusion_options={}, width_factor=0.25)
    told = step_memory(plans, "3d_fullres", builders.BRATS_JSON)
    assert told.peak > told.weights > 0


def test_shapes_alone_need_no_memory() -> None:
    """A step that no machine here could do is counted."""
    plans = planned(fusion="mean", soft_label="none", consistency_weight=0.0, complete_view_weight=0.0)
    configuration = plans["configurations"]["3d_fullres"]
    configuration.update(replan(configuration, [256] * 3), batch_size=64)
    assert step_memory(plans, "3d_fullres", builders.BRATS_JSON).peak > 200 * GIB


def test_loss_without_a_trainer_is_the_trainers(nnunet_folders: Any) -> None:
    trainer = builders.make_trainer(nnUNetTrainerMGML, builders.write_dataset(nnunet_folders))
    trainer.initialize()
    plan = PlansManager(planned()).get_configuration("3d_fullres")
    loss = memory.training_loss(plan, trainer.label_manager)
    wanted = nnUNetTrainer._build_loss(trainer)
    outputs = [torch.randn(2, 3, n, n, n) for n in (16, 8)]
    targets = [(torch.rand(2, 3, n, n, n) > 0.5).float() for n in (16, 8)]
    assert torch.equal(loss(outputs, targets), wanted(outputs, targets))


@pytest.fixture
def by_voxels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int], float]]:
    """Memory proportional to voxels and width, and the sizes that were counted."""
    counted: list[tuple[int, list[int], float]] = []

    def count(plans: dict[str, Any], configuration: str, dataset_json: Any) -> StepMemory:
        plan = plans["configurations"][configuration]
        width = plans["mgml"]["config"]["width_factor"]
        counted.append((plan["batch_size"], plan["patch_size"], width))
        return StepMemory(0, int(plan["batch_size"] * math.prod(plan["patch_size"]) * width * 1024))

    monkeypatch.setattr(memory_budget, "step_memory", count)
    return counted


def fitted(gigabytes: float, fixed: tuple[str, ...] = ()) -> memory_budget.Fit:
    source = planned(width_factor=0.5)
    configuration = source["configurations"]["3d_fullres"]
    configuration.update(replan(configuration, [128, 128, 96]), batch_size=4)

    def changed(changes: dict[str, Any]) -> dict[str, Any]:
        plans = copy.deepcopy(source)
        plans["configurations"]["3d_fullres"].update({k: v for k, v in changes.items() if k != "width_factor"})
        plans["mgml"]["config"].update({k: v for k, v in changes.items() if k == "width_factor"})
        return plans

    return memory_budget.fit(changed, "3d_fullres", builders.BRATS_JSON, gigabytes * GIB, fixed)


def need(batch: int, patch: list[int], width: float) -> float:
    """Return the gigabytes that are just enough by `by_voxels`."""
    return batch * math.prod(patch) * width * 1024 / GIB + 1e-6


def test_what_fits_stays_as_it_is(by_voxels: list[Any]) -> None:
    assert fitted(need(4, [128, 128, 96], 0.5)).changes == {}
    assert len(by_voxels) == 1


def test_batch_then_patch_then_width_then_batch(by_voxels: list[Any]) -> None:
    assert fitted(need(3, [128, 128, 96], 0.5)).changes == {"batch_size": 3}
    patch = fitted(need(2, [96, 96, 96], 0.5)).changes
    assert patch == {"batch_size": 2, "patch_size": [96, 96, 96]}
    narrow = fitted(need(2, [64, 64, 64], 0.25)).changes
    assert (narrow["batch_size"], math.prod(narrow["patch_size"]), narrow["width_factor"]) == (2, 2**18, 0.25)
    assert fitted(need(1, [64, 64, 64], 0.25)).changes == {**narrow, "batch_size": 1}
    least = fitted(need(1, [32, 32, 32], 0.25))
    assert math.prod(least.changes["patch_size"]) <= 32**3
    assert len(by_voxels) <= 2 * 5, "sizes far from the budget are not counted"


def test_what_the_user_has_set_stays(by_voxels: list[Any]) -> None:
    chosen = fitted(need(4, [96, 96, 96], 0.5), fixed=("batch_size", "width_factor"))
    assert chosen.changes == {"patch_size": [96, 96, 96]}
    with pytest.raises(ValueError, match=r"does not fit into 0\.10 GiB") as raised:
        fitted(0.1, fixed=("batch_size", "patch_size", "width_factor"))
    assert "batch_size, patch_size, width_factor" in str(raised.value)


def test_smaller_patches_are_allowed_ones() -> None:
    configuration = builders.configuration((128, 128, 96), stages=6)
    patches = list(smaller_patches(configuration))
    sizes = [math.prod(patch) for patch in patches]
    assert sizes == sorted(sizes, reverse=True)
    assert len(patches) > 5
    for patch in patches:
        assert replan(configuration, patch)["patch_size"] == patch
