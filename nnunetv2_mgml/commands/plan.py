"""``mgml plan``: plans of our own beside nnU-Net's, with the plugin's options; the preprocessed data is shared."""

from __future__ import annotations

import argparse
import json
import math
import textwrap

from nnunetv2_mgml.commands.info import options_text
from nnunetv2_mgml.plans.options import EXACT_REPETITION, parse_assignments
from nnunetv2_mgml.plans.presets import PAPER, PRESETS
from nnunetv2_mgml.workflows.plan import (
    GPU_SHARE,
    MGML_PLANS,
    NNUNET_KEYS,
    STOCK_PLANS,
    PlanRequest,
    WrittenPlans,
    trains_compiled,
    write_plans,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``mgml plan``."""
    parser.add_argument("-d", metavar="DATASET", help="dataset id or name")
    parser.add_argument("-p", metavar="PLANS", default=STOCK_PLANS, help="plans to start from")
    parser.add_argument(
        "-c",
        metavar="CONFIGURATION",
        nargs="+",
        help=f"configurations in which {', '.join(NNUNET_KEYS)} are set (default: 3d_fullres, or the "
        f"first where there is none)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="options to change; --list shows them. Values are JSON or plain text",
    )
    parser.add_argument("--plans_name", default=MGML_PLANS, help="name of the plans to write")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        nargs="+",
        default=[],
        help="one or several. nnunet: back to nnU-Net's own training settings, and what else paper set, where the "
        "plans have those of paper; paper: those of the MGML paper ("
        + ", ".join(f"{key}={value}" for key, value in PAPER.items())
        + "); its augmentation is rotation up to 10 degrees, intensity scale and shift 0.1, flips"
        ". paper-losses: the total of the paper's text, reference-losses: that of its published code; both for "
        "reproduction. early-fusion: one U-Net for all modalities together instead of encoding each alone, without our "
        "loss terms. Default: what the plans have",
    )
    parser.add_argument(
        "--gpu_memory",
        metavar="GB",
        nargs="?",
        type=float,
        const=math.inf,
        help="predict the memory of a training step, from shapes alone. With a number, the GB of your GPU: also make "
        "batch_size, patch_size or width_factor smaller where the step does not fit; what --set names stays",
    )
    parser.add_argument("--list", action="store_true", help="list all options with their defaults and stop")


def run(args: argparse.Namespace) -> int:
    """Write the plans, then say what was written and how to train with it."""
    if args.list:
        print(options_text())
        print("\nper configuration (-c), default: what the plans have")
        print("\n".join(f"{key}\n{textwrap.indent(text, '    ')}" for key, text in NNUNET_KEYS.items()))
        return 0
    request = request_from(args)
    print("\n".join(describe(write_plans(request), request)))
    return 0


def request_from(args: argparse.Namespace) -> PlanRequest:
    """Return what the arguments ask for.

    Raises:
        ValueError: no data set, or a ``--set`` that is no assignment.
    """
    if args.d is None:
        raise ValueError("-d is missing: name the dataset by its id (137) or its name (Dataset137_BraTS2021).")
    return PlanRequest(
        dataset=args.d,
        changes=parse_assignments(args.set),
        plans=args.p,
        configurations=tuple(args.c or ()),
        presets=tuple(args.preset),
        plans_name=args.plans_name,
        gpu_memory=args.gpu_memory,
    )


def describe(written: WrittenPlans, request: PlanRequest) -> list[str]:
    """Return what there is to say about the plans, one string a line."""
    lines = [f"{'Wrote' if written.replaced is None else 'Replaced'} {written.path}"]
    keep = f"start from the old plans with -p {request.plans_name} to keep it"
    if written.replaced_stock is not None:
        lines.append(f"  made from {written.stock}, were made from {written.replaced_stock}: give -p to choose")
    for key, (before, now) in written.lost.items():
        lines.append(f"  {key} = {json.dumps(now)}, was {json.dumps(before)}; {keep}")
    for name, sizes in written.lost_sizes.items():
        for key, (before, now) in sizes.items():
            lines.append(f"  {key} = {json.dumps(now)} ({name}), was {json.dumps(before)}; {keep}")
    for key, value in written.changes.items():
        where = f" ({', '.join(written.configurations)})" if key in NNUNET_KEYS else ""
        lines.append(f"  {key} = {json.dumps(value)}{where}")
    for name, keys in written.inherited.items():
        lines.append(f"  {', '.join(keys)} ({name}): inherited, as just set")
    for name, chosen in written.fitted.items():
        lines += [f"  {key} = {json.dumps(value)} ({name}), to fit the memory" for key, value in chosen.items()]
    for name, sizes in written.restored.items():
        lines += [f"  {key} = {json.dumps(value)} ({name}), nnU-Net's own again" for key, value in sizes.items()]
    for name, need in written.memory.items():
        lines.append(
            f"  {name}: a training step in 16 bit needs {need:.2f} GiB, predicted from shapes (weights, gradients and "
            f"optimizer included; a GPU's own context comes on top){_budget(request)}"
        )
    if written.memory and written.options.training.gradient_checkpointing and trains_compiled():
        lines.append(
            "  counted without gradient_checkpointing, which a compiled network ignores; nnUNet_compile=f, here and in "
            "the training, brings it back"
        )
    if written.options.training.seed is not None:
        lines.append(f"  note: {EXACT_REPETITION}")
    lines.append(
        f"Train with: nnUNetv2_train {request.dataset} {written.configurations[0]} 0 -tr nnUNetTrainerMGML "
        f"-p {request.plans_name}"
    )
    return lines


def _budget(request: PlanRequest) -> str:
    if request.gpu_memory is None or math.isinf(request.gpu_memory):
        return ""
    return f"; {GPU_SHARE:.0%} of {request.gpu_memory:g} GB are {GPU_SHARE * request.gpu_memory:.2f}"
