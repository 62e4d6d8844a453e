"""Memory a full-size training step needs, counted without a GPU. Writes docs/memory.md.

    python benchmarks/memory.py

By the counter of ``mgml plan --gpu_memory`` (`nnunetv2_mgml.objective.memory.step_memory`): a whole step runs on shapes
without data, under 16-bit autocast, and every storage counts from its making to its release.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from speed_case import DATASET, write_plans
from step import DESIGNS, TERMS, Learner, TrainingStep, make_plan, random_batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from nnunetv2_mgml.io.files import write_text
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.memory import GIB, StepMemory, step_memory
from nnunetv2_mgml.plans.options import PLANS_KEY

SIZES = {
    "80^3, batch 1": {"patch": 80, "batch": 1, "stages": 5},
    "128^3, batch 2": {"patch": 128, "batch": 2, "stages": 6},
}
"""The paper's training, and nnU-Net's own plan for BraTS."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS), help="fusion designs")
    parser.add_argument("--width_factor", type=float, default=1.0, help="of nnU-Net's widths 32, 64, 128, ...")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "memory.md")
    args = parser.parse_args()
    rows = {}
    for design in tqdm(args.designs):
        rows[design] = [
            [counted(design, terms, size, args.width_factor).peak / GIB for terms in TERMS] for size in SIZES.values()
        ]
    write_text(args.output, page(rows, args))
    print(f"wrote {args.output}")


def counted(design: str, terms: str, size: dict[str, int], width_factor: float) -> StepMemory:
    """Return what a training step needs, as ``mgml plan`` says it."""
    plans = write_plans(make_plan((size["patch"],) * 3, size["stages"]))
    plans["configurations"]["3d_fullres"]["batch_size"] = size["batch"]
    options = Options().updated({**DESIGNS[design], **TERMS[terms], "width_factor": width_factor})
    plans[PLANS_KEY] = {"config": options.as_dict()}
    return step_memory(plans, "3d_fullres", DATASET)


def training_step(design: str, terms: str, size: dict[str, int], width_factor: float) -> TrainingStep:
    """Return a training step in 16 bit, built on the CPU."""
    plan = make_plan((size["patch"],) * 3, size["stages"])
    learner = Learner(plan, {**DESIGNS[design], **TERMS[terms], "width_factor": width_factor})
    return TrainingStep(learner, random_batch(plan, size["batch"]), "bfloat16")


def gibibytes(step: TrainingStep) -> float:
    """Return what a training step keeps, a lower bound: tensors saved for backward, parameters, gradients, momentum."""
    parameters = sum(p.numel() for p in step.learner.network.parameters())
    return (saved_bytes(step) + 3 * 4 * parameters) / 2**30


def saved_bytes(step: TrainingStep, fake: bool = True) -> int:
    """Return the bytes of all tensors kept for the backward pass; parameters are not counted.

    Args:
        step: network, losses and a batch.
        fake: whether to run on shapes only, which needs neither the memory nor the time of the real thing.
    """
    owned = {p.untyped_storage()._cdata for p in step.learner.network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if fake:
        step.batch = tree_map(mode.from_tensor, step.batch)
    with (
        mode if fake else torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = step.forward()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def peak_of_step(step: TrainingStep) -> int:
    """Return the bytes PyTorch's CPU allocator holds at the peak of a training step, all that lives before it included.

    The step is done twice: after the first one the optimizers have their state.
    """
    step()
    for optimizer in step.optimizers:
        optimizer.zero_grad(set_to_none=True)
    before = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in tree_leaves(
            [step.batch, *(_tensors(part) for part in (*step.learner.modules(), *step.optimizers))]
        )
        if isinstance(tensor, torch.Tensor)
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return sum(before.values()) + peak


def _tensors(part: torch.nn.Module | torch.optim.Optimizer) -> list[Any]:
    return [part.state_dict()] if isinstance(part, torch.optim.Optimizer) else [*part.parameters(), *part.buffers()]


def page(rows: dict[str, list[list[float]]], args: argparse.Namespace) -> str:
    head = [f"{size}: {terms}" for size in SIZES for terms in ("without MGML", "MGML", "default")]
    lines = [
        "# Memory of full-size training",
        "",
        f"Made by `python {' '.join(sys.argv)}`, torch {torch.__version__}: 4 modalities, 3 regions, width factor "
        f"{args.width_factor:g}, deep supervision, SGD, 16-bit autocast; one encoder for all modalities "
        "(`demoseg_early`: early fusion). GiB at the peak of one full training step, counted on shapes without data as "
        "`mgml plan -d DATASET --gpu_memory` does it for plans of yours with "
        "`nnUNet_compile=f` (a compiled network ignores `gradient_checkpointing`): weights in 32 bit, their "
        "gradients and momentum, the batch, what the backward pass needs and every temporary tensor. Workspaces "
        "of the kernels, the allocator's gaps and the context of a GPU come on top. Our default is `width_factor` 0.5, "
        "which takes 0.4 to 0.6 of it (`--width_factor 0.5`); what [On a GPU](gpu.md) measured is older than "
        "`gradient_checkpointing`.",
        "",
        "80^3 with batch 1 is the paper's training, 128^3 with batch 2 nnU-Net's plan for BraTS. *MGML*: Meta-AMF and "
        "L_CR; *default*: also the loss on the complete view.",
        "",
        f"| design | {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    lines += [
        f"| `{name}` | {' | '.join(f'{value:.1f}' for row in values for value in row)} |"
        for name, values in rows.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
