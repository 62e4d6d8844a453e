"""What a training step needs in memory, from shapes alone: before anything is trained, without a GPU.

One step runs on tensors without data: the network with all that the loss terms need of it, the losses, the backward
pass. Every storage counts from its making to its release, so the peak is what PyTorch's allocator would hold. Not in
it: workspaces of the kernels, the allocator's gaps, a GPU's context, and of label maps with an ignore label the mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.shared_encoder import SharedEncoderUNet, voxels_at_once
from nnunetv2_mgml.objective import Objective, Options, TermSpec, needs_of
from nnunetv2_mgml.upstream.live_bytes import on_shapes, take_shapes
from nnunetv2_mgml.upstream.loss import training_loss

GIB = 2**30
_STATES = {"sgd": 1, "adam": 3}
"""Numbers an optimizer keeps per weight; the paper's Adam is the one with a maximum (amsgrad)."""


class StepMemory(NamedTuple):
    """Bytes of one training step."""

    weights: int
    """Parameters and what the optimizer keeps of them, in 32 bit; they live all the time."""
    peak: int
    """The most that lives at once: weights, batch, what the backward pass needs, gradients, temporary tensors."""


def step_memory(
    plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], mixed_precision: bool = True
) -> StepMemory:
    """Return what a training step of ``nnUNetTrainerMGML`` needs on one device.

    Args:
        plans: of ``mgml plan``.
        configuration: name of one of its configurations.
        dataset_json: of the dataset.
        mixed_precision: 16-bit autocast, as nnU-Net trains on a GPU; False: 32 bit, as on a CPU.

    Raises:
        ValueError: plans the network cannot be built of.
    """
    manager = PlansManager(dict(plans))
    plan, labels = manager.get_configuration(configuration), manager.get_label_manager(dataset_json)
    options, channels = Options.from_plans(dict(plans)), channel_names(dict(dataset_json))
    heads = labels.num_segmentation_heads
    classes = heads + 1 if labels.has_regions else heads
    inputs = determine_num_input_channels(manager, plan, dataset_json)
    needs = needs_of(options)
    counted = labels
    if labels.has_ignore_label and not labels.has_regions:  # that loss reads a number of voxels, and shapes have none
        known = {name: value for name, value in dataset_json["labels"].items() if name != "ignore"}
        counted = manager.get_label_manager({**dataset_json, "labels": known})
    loss = training_loss(plan, counted)
    with torch.device("meta"):
        network = build_network(plan, options.network, inputs, heads, classes, True, needs)
        network.gradient_checkpointing = options.training.gradient_checkpointing
        if isinstance(network, SharedEncoderUNet):  # as where it will run; here all is counted on a CPU
            network.voxels_at_once = voxels_at_once("cuda" if mixed_precision else "cpu")
        spec = TermSpec(options, channels, classes, labels.has_regions, loss, labels.ignore_label, plan.batch_dice)
        objective = Objective(spec)
    with on_shapes() as live:
        for module in (network, objective):
            take_shapes(module)
        kind, count = (torch.bool, heads + labels.has_ignore_label) if labels.has_regions else (torch.float32, 1)
        x = torch.empty(plan.batch_size, inputs, *plan.patch_size)
        sizes = _output_sizes(plan.patch_size, plan.network_arch_init_kwargs["strides"])
        targets = [torch.empty(plan.batch_size, count, *size, dtype=kind) for size in sizes]
        visible = torch.empty(plan.batch_size, len(channels), dtype=torch.bool)
        parameters = sum(p.numel() for p in network.parameters())
        momentum = torch.empty(parameters * _STATES[options.training.optimizer])  # lives through the step
        live.peak = live.now
        view = objective.draw_view(visible, visible, torch.empty_like(x) if needs.own_view else None)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
            total = objective(network(x, view, needs), targets, view, 1.0).total
        total.backward()
        weights = 4 * (parameters + momentum.numel())
    return StepMemory(weights, live.peak)


def _output_sizes(patch_size: Sequence[int], strides: Sequence[Any]) -> list[list[int]]:
    """Return the size of every output of deep supervision, full resolution first."""
    size, sizes = list(patch_size), []
    for stride in list(strides)[:-1]:
        per_axis = [stride] * len(size) if isinstance(stride, int) else stride
        size = [math.ceil(n / step) for n, step in zip(size, per_axis, strict=True)]
        sizes.append(size)
    return sizes
