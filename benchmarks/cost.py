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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost_page import page
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_mgml.inference.subsets.predictor import ManySubsets
from nnunetv2_mgml.io.files import write_json, write_text
from nnunetv2_mgml.modalities import BRATS_CHANNELS, all_subsets
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.objective import Objective, Options, TermSpec, needs_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from builders import configuration

MODALITIES, CLASSES, REGIONS = 4, 4, 3
TERMS: dict[str, dict[str, Any]] = {
    "plain": {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0},
    "mgml": {"complete_view_weight": 0.0},
    "shipped": {},
}
"""Without our terms; with Meta-AMF and L_CR; with the loss on the complete view as well (the default)."""
RESULTS = Path(__file__).parent / "results" / "cost.json"
DESIGNS: dict[str, dict[str, Any]] = {
    **{name: {"fusion": name} for name in fusion_designs()},
    "region_aware_full": {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": True}},
}
"""Rows: every design with its default options, and the design of `nnUNetTrainerRFNet`."""
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
    changed = git("status", "--porcelain", "--", "../nnunetv2_mgml")
    commit = git("rev-parse", "--short", "HEAD") + ("*" if changed else "")
    done = subprocess.run(
        [sys.executable, *sys.argv, "--worker", design, what],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(_RETURN_MEMORY if what.startswith("memory") else {})},
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "commit": commit}


def git(*arguments: str) -> str:
    """Return what git says in this folder; empty where there is no repository."""
    return subprocess.run(
        ["git", "-C", Path(__file__).parent, *arguments], stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()


def plan_of(args: argparse.Namespace) -> ConfigurationManager:
    """Return the plan of ``--plan``, or nnU-Net's PlainConvUNet of the size asked for."""
    if args.plan:
        return PlansManager(str(args.plan)).get_configuration("3d_fullres")
    plan = configuration(
        (args.patch,) * 3, MODALITIES, args.stages, widths=[min(320, 32 * 2**s) for s in range(args.stages)]
    )
    kwargs = plan["architecture"]["arch_kwargs"]
    kwargs["n_conv_per_stage"] = [2] * args.stages
    kwargs["n_conv_per_stage_decoder"] = [2] * (args.stages - 1)
    return ConfigurationManager(plan)


class Bench:
    """A network, its losses and one random batch."""

    def __init__(self, design: str, terms: str, args: argparse.Namespace) -> None:
        from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
        from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        torch.manual_seed(0)
        self.device = torch.device(args.device)
        plan = plan_of(args)
        options = Options().updated({**DESIGNS[design], "width_factor": args.width_factor, **TERMS[terms]})
        self.network = build_network(plan, options.network, MODALITIES, REGIONS, CLASSES, True, needs_of(options))
        self.network.to(self.device)
        stock = DC_and_BCE_loss(
            {},
            {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False},
            dice_class=MemoryEfficientSoftDiceLoss,
        )
        strides = np.cumprod([np.ravel(s) for s in plan.network_arch_init_kwargs["strides"]], 0)[:-1]
        weights = [0.5**s for s in range(len(strides))]
        spec = TermSpec(options, BRATS_CHANNELS, CLASSES, True, DeepSupervisionWrapper(stock, weights))
        self.objective = Objective(spec).to(self.device)
        self.x = torch.randn(args.batch, MODALITIES, *plan.patch_size, device=self.device)
        labels = torch.randint(0, CLASSES, (args.batch, 1, *plan.patch_size), device=self.device)
        target = torch.cat([labels >= region for region in (1, 2, 3)], 1)
        self.targets = [target[(..., *(slice(None, None, int(s)) for s in stride))] for stride in strides]
        self.mask = torch.tensor(
            [[True, False, True, True], [False, True, False, False]][: args.batch], device=self.device
        )
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.01, momentum=0.99, nesterov=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """As nnU-Net: on CUDA only."""
        return torch.autocast(self.device.type, enabled=self.device.type == "cuda")

    def forward(self) -> torch.Tensor:
        """Forward pass and loss of a training step."""
        view = self.objective.draw_view(self.mask, torch.ones_like(self.mask))
        with self.autocast():
            output = self.network(self.x, view, self.objective.needs)
            return self.objective(output, self.targets, view).total

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()


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
    bench = Bench(design, terms, args)
    before = peak_mebibytes(args.device)
    for _ in range(2):
        bench.step()
    return {"mebibytes": peak_mebibytes(args.device) - before}


def measure_training(design: str, args: argparse.Namespace) -> dict[str, Any]:
    return {"seconds": in_turns({terms: Bench(design, terms, args).step for terms in TERMS}, args.repeats, args.device)}


def flops(function: Callable[[], Any]) -> int:
    """Count additions and multiplications of convolutions, matrix products (attention included) and Mamba scans."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.nnunetv2_mgml.selective_scan: scan_flops})
    with counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():  # fused attention kernels are not counted
        function()
    return counter.get_total_flops()


def scan_flops(u: Sequence[int], delta: Sequence[int], a: Sequence[int], *_: Any, **__: Any) -> int:
    """Count a scan of ``u (B, L, E)`` with ``a (E, N)``: decay, input, recurrence and read-out of every state."""
    return 7 * math.prod(u) * a[1]


def measure_prediction(design: str, args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(design, "shipped", args)
    network, x = bench.network.eval(), bench.x[:1]
    network.decoder.deep_supervision = False
    subsets = all_subsets(MODALITIES)
    many = ManySubsets(network, subsets)

    @torch.inference_mode()
    def predict(subset: tuple[bool, ...], cpu_bfloat16: bool = False) -> None:
        network.set_visible(subset)
        with torch.autocast("cpu", torch.bfloat16) if cpu_bfloat16 else bench.autocast():
            network(x)

    @torch.inference_mode()
    def together() -> None:
        with bench.autocast():
            many(x)

    def separately() -> None:
        for subset in subsets:
            predict(subset)

    full, one = (True,) * MODALITIES, (True, *(False,) * (MODALITIES - 1))
    functions = {
        "four": lambda: predict(full),
        "one": lambda: predict(one),
        "fifteen": together,
        "separately": separately,
    }
    if args.device == "cpu":
        functions["bfloat16"] = lambda: predict(full, True)
    seconds = in_turns(functions, args.repeats, args.device)
    network.set_visible(full)
    return {
        "seconds": seconds,
        "gflop": flops(lambda: network(x)) / 1e9,
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
