"""What each fusion design costs, and what MGML adds: parameters, FLOPs, time, peak memory. Writes docs/costs.md.

    python benchmarks/cost.py                      # every design, the paper's plan (80^3 patches, batch 1), on the CPU
    python benchmarks/cost.py --designs concat region_aware --patch 128 --stages 6 --batch 2 --device cuda
    python benchmarks/cost.py --plan nnUNet_preprocessed/Dataset137_BraTS2021/nnUNetPlans.json --device cuda

Every measurement runs in a process of its own, so that peak memory is that of one setting. Within a process the things
compared are timed in turns, and a ratio is the median of the turns' ratios; absolute times are the machine's. What is
measured is kept in ``benchmarks/results/cost.json``, design by design, with the commit; ``--again`` measures it anew.
Run it on an idle machine: another job beside it makes rows incomparable. On CUDA everything runs under autocast, as
nnU-Net trains and predicts; on a CPU in float32.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cost_page import page
from machine import short_commit
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from step import DESIGNS, MODALITIES, TERMS, Learner, TrainingStep, make_plan, predictions, random_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_mgml.io.files import write_json, write_text
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.plans.options import FUSION_REVISION

RESULTS = Path(__file__).parent / "results" / "cost.json"
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Tells glibc to give tensors back as soon as they are freed: the resident set then follows what is alive."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--designs",
        nargs="+",
        default=list(DESIGNS),
        choices=DESIGNS,
        metavar="DESIGN",
        help=f"rows of the table: {', '.join(DESIGNS)}",
    )
    parser.add_argument("--patch", type=int, default=80, help="edge of the cubic patch, voxels")
    parser.add_argument("--batch", type=int, default=1, choices=(1, 2), help="samples of a training step")
    parser.add_argument("--stages", type=int, default=5, help="resolution stages of the U-Net")
    parser.add_argument("--width_factor", type=float, default=0.5, help="of nnU-Net's widths 32, 64, 128, ...")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns; the median counts")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--plan", type=Path, help="plans file to take patch, stages and widths of 3d_fullres from")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "costs.md")
    parser.add_argument(
        "--again",
        nargs="*",
        choices=WORKERS,
        metavar="WHAT",
        help=f"measure anew what earlier runs measured: everything, or {', '.join(WORKERS)}",
    )
    parser.add_argument("--worker", nargs=2, metavar=("DESIGN", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[1]](args.worker[0], args)))
        return
    measured = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    rows = {}
    setting = " ".join(
        str(value)
        for value in (
            args.plan or f"patch {args.patch} stages {args.stages}",
            "batch",
            args.batch,
            "width",
            args.width_factor,
            args.device,
            "repeats",
            args.repeats,
            "threads",
            torch.get_num_threads(),
            "torch",
            torch.__version__,
        )
    )
    for design in args.designs:
        key = f"{design} {setting}"
        todo = WORKERS if key not in measured or args.again == [] else args.again or ()
        if todo:
            measured[key] = {**measured.get(key, {}), **{what: run_worker(design, what) for what in todo}}
            write_json(RESULTS, measured)
        rows[design] = measured[key]
        print(design, json.dumps(rows[design]), flush=True)
    write_text(args.output, page(rows, plan_of(args), args))
    print(f"wrote {args.output}")


def run_worker(design: str, what: str) -> dict[str, Any]:
    """Measure in a new process; the result says on which commit."""
    commit = short_commit()
    done = subprocess.run(
        [sys.executable, *sys.argv, "--worker", design, what],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(_RETURN_MEMORY if what.startswith("memory") else {})},
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "commit": commit}


def plan_of(args: argparse.Namespace) -> ConfigurationManager:
    """Return the plan of ``--plan``, or nnU-Net's PlainConvUNet of the size asked for."""
    if args.plan:
        return PlansManager(str(args.plan)).get_configuration("3d_fullres")
    return make_plan((args.patch,) * 3, args.stages)


def training_step(design: str, terms: str, args: argparse.Namespace) -> TrainingStep:
    """Return the training step of a design on a random batch; a seed makes it the same every time."""
    torch.manual_seed(0)
    plan = plan_of(args)
    options = {**DESIGNS[design], **TERMS[terms], "width_factor": args.width_factor}
    return TrainingStep(Learner(plan, options, args.device), random_batch(plan, args.batch, args.device))


def in_turns(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each function in every turn, after one untimed turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_mebibytes(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(design: str, args: argparse.Namespace, terms: str) -> dict[str, float]:
    """Peak memory of training, above what the process holds before its first step."""
    step = training_step(design, terms, args)
    before = peak_mebibytes(args.device)
    for _ in range(2):
        step()
    return {"modality_scale": modality_scale(step), "mebibytes": peak_mebibytes(args.device) - before}


def modality_scale(step: TrainingStep) -> int:
    """Return where the decoder shared by all modalities ends; early fusion has none."""
    return getattr(step.learner.network, "modality_scale", 0)


def measure_training(design: str, args: argparse.Namespace) -> dict[str, Any]:
    steps = {terms: training_step(design, terms, args) for terms in TERMS}
    return {"modality_scale": modality_scale(steps["shipped"]), "seconds": in_turns(steps, args.repeats, args.device)}


def flops(function: Callable[[], Any]) -> int:
    """Count additions and multiplications of convolutions, matrix products (attention included) and Mamba scans."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.nnunetv2_mgml.selective_scan: scan_flops})
    with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():  # fused attention kernels are not counted
        function()
    return counter.get_total_flops()


def scan_flops(u: Sequence[int], delta: Sequence[int], a: Sequence[int], *_: Any, **__: Any) -> int:
    """Count a scan of ``u (B, L, E)`` with ``a (E, N)``: decay, input, recurrence and read-out of every state."""
    return 7 * math.prod(u) * a[1]


def in_bfloat16(function: Callable[[], Any]) -> None:
    """Call a function under autocast to bfloat16 on the CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        function()


def measure_prediction(design: str, args: argparse.Namespace) -> dict[str, Any]:
    step = training_step(design, "shipped", args)
    network, x = step.learner.network, step.batch.x[:1]
    functions = predictions(step.learner, x, all_subsets(MODALITIES))
    with torch.inference_mode(), step.autocast():
        four = functions["four"]
        if args.device == "cpu":
            functions["bfloat16"] = lambda: in_bfloat16(four)
        seconds = in_turns(functions, args.repeats, args.device)
    return {
        "fusion_revision": FUSION_REVISION,
        "seconds": seconds,
        "gflop": flops(four) / 1e9,
        "million": sum(p.numel() for n, p in network.named_parameters() if "modality_decoder" not in n) / 1e6,
        "fusion_million": sum(p.numel() for p in network.fusion.parameters()) / 1e6,
    }


WORKERS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "prediction": measure_prediction,
    "training": measure_training,
    **{f"memory_{terms}": functools.partial(measure_memory, terms=terms) for terms in TERMS},
}


if __name__ == "__main__":
    main()
