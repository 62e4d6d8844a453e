"""Warm start on cubes of real patients: is a model that starts from a stock nnU-Net ahead early in the training?

A stock network is trained on one half of the training patients, with all modalities, once. Our model is then trained on
some patients of the other half, with every seed once from scratch and once from the stock weights
(`nnunetv2_mgml.network.transfer`), with the same draws, and scored on validation patients, all 15 subsets, after a
quarter, a half and all of the steps.

    MGML_REAL_DATA=... python benchmarks/ablation/cubes_warm_start.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cubes_data import cubes_file, read_cubes, split
from cubes_scores import dice
from cubes_training import Training
from cubes_variants import CHANNELS, Run
from cubes_work import code
from machine import processor
from precision import precision_on

from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.network.transfer import Donor, transfer

RESULT = Path(__file__).parent / "results" / "warm_start.json"
FORMS = {
    "multi_encoder": "width_factor=0.5",
    "multi_encoder_whole": "fusion=mean,width_factor=0.5,decoder_width_ratio=1,decoder_convs=2",
    "early_fusion": "network_form=early_fusion,fusion=mean,width_factor=0.5,decoder_width_ratio=1",
}
"""Our networks, in the stock network's width (`stock_width_factor` of cubes.json); ``whole`` has its decoder too."""
STARTS = ("scratch", "stock weights")
_LABELS = (("whole_tumor", (1,)), ("tumor_core", (2,)), ("enhancing_tumor", (3,)))


def main() -> None:
    """Train, score, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=["early_fusion", "multi_encoder_whole"])
    parser.add_argument("--stock_steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--patch", type=int, default=24, help="edge of the training patches, voxels")
    parser.add_argument("--scored", type=int, default=18, help="validation patients that are scored")
    parser.add_argument("--patients", type=int, default=40, help="patients our model is trained on")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    cubes = read_cubes(cubes_file())
    parts = split(cubes.patients)
    half = len(parts["train"]) // 2
    theirs, ours = parts["train"][:half], parts["train"][half : half + args.patients]
    scored = parts["validation"][: args.scored]
    checkpoints = [args.steps // 4, args.steps // 2, args.steps]
    about: dict[str, Any] = {
        "patients": {"stock": len(theirs), "ours": len(ours), "validation": len(scored)},
        "patch": args.patch,
        "stock_steps": args.stock_steps,
        "processor": processor(),
        "precision": precision_on(torch.device("cpu")),
        **code(None),
    }
    rows: list[dict[str, Any]] = []
    stock = Training(
        Run(f"modality_dropout:only=t1+t1ce+t2+flair,patch={args.patch}", args.seeds[0], args.stock_steps),
        cubes,
        theirs,
    )
    stock.advance(args.stock_steps)
    donor = Donor(stock.learner.network.state_dict(), CHANNELS, _LABELS)
    values = dice(stock.learner, cubes, scored, [(True,) * len(CHANNELS)], stock.precision, batch=4)
    about["stock_dice_all_modalities"] = round(100 * float(values.mean()), 2)
    print(f"stock network, all modalities: {about['stock_dice_all_modalities']:.2f}", flush=True)
    for seed in args.seeds:
        for form, start in itertools.product(args.forms, STARTS):
            training = Training(Run(f"mgml:{FORMS[form]},patch={args.patch}", seed, args.steps), cubes, ours)
            if start != "scratch":
                taken = transfer(training.learner.network, CHANNELS, _LABELS, donor)
                taken.apply(training.learner.network)
                print("\n".join(taken.lines()), flush=True)
            for steps in checkpoints:
                training.advance(steps - training.done)
                values = dice(training.learner, cubes, scored, training.run.subsets, training.precision, batch=4)
                mean = round(100 * float(values.mean()), 2)
                rows.append({"form": form, "seed": seed, "start": start, "steps": steps, "dice": mean})
                print(f"seed {seed}, {form}, {start}, {steps} steps: {mean:.2f}", flush=True)
                write_json(args.output, {**about, "rows": rows})
    for form, steps, start in itertools.product(args.forms, checkpoints, STARTS):
        found = [r["dice"] for r in rows if (r["form"], r["steps"], r["start"]) == (form, steps, start)]
        print(f"{form}, {steps:>4} steps, {start:<13}: {np.mean(found):.2f} ({', '.join(map(str, found))})")


if __name__ == "__main__":
    main()
