"""Writes what `cost.py` measured as docs/costs.md."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from step import DESIGNS

from nnunetv2_mgml.plans.options import FUSION_REVISION

PAPER = {
    "region_aware_full": "RFNet: 35 M, 65.96 -> 77.33 s",
    "mmformer": "mmFormer: 145 M, 41.35 -> 44.54 s",
    "imfuse": "IM-Fuse: 254 M, 70.81 -> 76.59 s",
}
"""Parameters, and seconds per epoch without and with MGML: the paper's Table 7 (RTX 3090, the authors' networks)."""
CHANGED = {"sfusion": "with interpolated scores and up to 8 heads"}
"""Designs that cost something else since the last revision of the designs, and what they were before."""
_HEAD = """# What the fusion designs cost

Made by `python {command}` on {machine}, {cores} cores, {threads} thread(s), device {device}, torch {torch}, commit
{commits}: 4 modalities, {patch} patch, {stages} stages, width factor {width:g}. Training steps have batch {batch}.
Times in seconds, medians of {repeats} turns; a ratio is the median of the turns' ratios, and is what carries over to
other machines. In half of the turns a ratio is within {middle:.0%} of its median, in nine of ten within {most:.0%}.
*Paper* is Table 7 of Zou et al.: parameters, and seconds per epoch without and with MGML (+0.001 M parameters), of the
authors' networks on an RTX 3090.

*MGML*: Meta-AMF and L_CR; *default*: also the loss on the complete view. Inference is the same for all. Parameters are
those of inference, the fusion's among them in brackets; training adds the shared modality decoder. GFLOP: all
modalities, attention and scans included. Peak memory: what two training steps add to the process, {memory}.
`region_aware_full` is `region_aware` with `full_resolution_regions`, the design of `nnUNetTrainerRFNet`. Memory at full
size: [memory.md](memory.md); the same on a GPU: [gpu.md](gpu.md).
"""


def page(rows: dict[str, dict[str, Any]], plan: ConfigurationManager, args: argparse.Namespace) -> str:
    """Return the page for ``rows``: per design what each of ``cost.WORKERS`` returned."""
    scatter = sorted(value for row in rows.values() for value in _scatter(row))
    head = _HEAD.format(
        command=" ".join(sys.argv),
        machine=platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=args.device,
        torch=torch.__version__,
        patch="x".join(map(str, plan.patch_size)),
        width=args.width_factor,
        stages=len(plan.network_arch_init_kwargs["strides"]),
        batch=args.batch,
        repeats=args.repeats,
        commits=", ".join(dict.fromkeys(part["commit"] for row in rows.values() for part in row.values())),
        middle=scatter[len(scatter) // 2],
        most=scatter[len(scatter) * 9 // 10],
        memory="counted by PyTorch's allocator" if args.device.startswith("cuda") else "resident set",
    )
    return "\n".join([head + _gaps(rows), *_training(rows), "", *_prediction(rows)]) + "\n"


def is_old(name: str, row: dict[str, Any]) -> bool:
    """Return whether a design was measured before it changed."""
    return name in CHANGED and row["prediction"].get("fusion_revision", 1) < FUSION_REVISION


def _gaps(rows: dict[str, dict[str, Any]]) -> str:
    """Return what the tables do not show: designs that have changed since, and those that nobody measured."""
    old = [f"`{name}` {CHANGED[name]}" for name, row in rows.items() if is_old(name, row)]
    missing = [f"`{name}`" for name in DESIGNS if name not in rows]
    lines = [f"Rows marked † were measured before the design changed: {', '.join(old)}."] if old else []
    lines += [f"Not measured: {', '.join(missing)}."] if missing else []
    parts = (part for row in rows.values() for name, part in row.items() if name != "prediction")
    if any("modality_scale" not in part for part in parts):
        lines.append(
            "All rows but `demoseg_early` have an encoder per modality; steps and their memory are full ones, with "
            "plain norms and a modality decoder that ends at full resolution, as by default then. By today's default "
            "one encoder serves all modalities, and three of four steps leave out what is hidden: [speed.md](speed.md) "
            "has its step."
        )
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _mark(name: str, row: dict[str, Any]) -> str:
    return " †" if is_old(name, row) else ""


def _training(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| design | parameters (fusion), M | GFLOP a patch | step | MGML | default | peak memory, MiB | MGML | "
        "default | paper |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        size, seconds = row["prediction"], row["training"]["seconds"]
        memory = {terms: row[f"memory_{terms}"]["mebibytes"] for terms in seconds}
        peaks = [f"{memory[terms]:.0f} (x {memory[terms] / memory['plain']:.2f})" for terms in ("mgml", "shipped")]
        lines.append(
            f"| `{name}`{_mark(name, row)} | {size['million']:.2f} ({size['fusion_million']:.2f}) | "
            f"{size['gflop']:.1f} | "
            f"{statistics.median(seconds['plain']):.2f} | {_beside(seconds, 'mgml', 'plain')} | "
            f"{_beside(seconds, 'shipped', 'plain')} | {memory['plain']:.0f} | {' | '.join(peaks)} | "
            f"{PAPER.get(name, '-')} |"
        )
    return lines


def _prediction(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "Prediction of one patch. *15 subsets*: as `mgml evaluate` computes them, encoders once, then every "
        "subset's fusion and decoding.",
        "",
        "| design | four modalities | one | 15 subsets | 15 one by one | four, bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        seconds = row["prediction"]["seconds"]
        cells = [
            _beside(seconds, key, "four") if key in seconds else "-"
            for key in ("one", "fifteen", "separately", "bfloat16")
        ]
        lines.append(f"| `{name}`{_mark(name, row)} | {statistics.median(seconds['four']):.2f} | {' | '.join(cells)} |")
    return lines


def ratios(seconds: dict[str, list[float]], what: str, to: str) -> list[float]:
    """Return one ratio per turn."""
    return [a / b for a, b in zip(seconds[what], seconds[to], strict=True)]


def scatter(values: Sequence[float]) -> float:
    """Return how far nine of ten values lie from their median at most, as a share of it."""
    middle = statistics.median(values)
    return sorted(abs(value / middle - 1) for value in values)[int(0.9 * (len(values) - 1))]


def _beside(seconds: dict[str, list[float]], what: str, to: str) -> str:
    return f"{statistics.median(seconds[what]):.2f} (x {statistics.median(ratios(seconds, what, to)):.2f})"


def _scatter(row: dict[str, Any]) -> list[float]:
    """Return how far every turn's ratio lies from the median of its ratios, as a share of it."""
    values = []
    for part, base in (("training", "plain"), ("prediction", "four")):
        seconds = row[part]["seconds"]
        for what in seconds:
            if what != base:
                found = ratios(seconds, what, base)
                middle = statistics.median(found)
                values += [abs(ratio / middle - 1) for ratio in found]
    return values
