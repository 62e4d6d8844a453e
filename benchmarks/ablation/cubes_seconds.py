"""Times a training step of every variant of the cubes on one core, in turns: `cubes.py --equal_time` goes by it there.

    python benchmarks/ablation/cubes_seconds.py                            # every variant of cubes.json
    python benchmarks/ablation/cubes_seconds.py --variants baseline baseline:width_factor=0.5   # these as well

On an idle machine, once, before the trainings that are to have equal time: theirs run side by side, and one timed
while others begin or end would get other steps than the next. Writes ``results/cubes_seconds.json``; times of another
processor or of another precision are replaced, not kept beside the new ones. To add variants to a table of another
processor, whose trainings are to stay comparable:

    python benchmarks/ablation/cubes_seconds.py --variants meta_amf consistency --beside paper_terms

times them and ``paper_terms`` here, and writes the table's seconds of ``paper_terms`` times the ratio found here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import torch
from cubes_data import cubes_file, read_cubes, split
from cubes_training import Training
from cubes_variants import SETTINGS, STEP_SECONDS, Run
from cubes_work import code
from machine import processor
from precision import precision_on
from tqdm import trange

from nnunetv2_mgml.io.files import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(SETTINGS["variants"]), help="see cubes.json and cubes.py")
    parser.add_argument("--turns", type=int, default=15, help="the median counts")
    parser.add_argument("--steps", type=int, default=4, help="of each variant in a turn")
    parser.add_argument("--beside", metavar="VARIANT", help="add to a table of another processor, by the ratio to this")
    parser.add_argument("--output", type=Path, default=STEP_SECONDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {"processor": processor(), "precision": precision_on(torch.device("cpu")), "threads": 1}
    before = read_json(args.output) if args.output.is_file() else {}
    if args.beside:
        if args.beside not in before.get("seconds", {}):
            parser.error(f"{args.output} has no step of {args.beside}.")
        args.variants = [args.beside, *(name for name in args.variants if name != args.beside)]
    measured = {name: {**told, **code(None)} for name, told in measure(args).items()}
    if args.beside:
        given = before["seconds"][args.beside]["median"]
        here = measured.pop(args.beside)["median"]
        for told in measured.values():
            told |= {"median": told["median"] / here * given, "beside": args.beside, "timed_on": about}
            told["quartiles"] = [value / here * given for value in told["quartiles"]]
        about = {key: before[key] for key in about}
    seconds = before["seconds"] if all(before.get(key) == about[key] for key in ("processor", "precision")) else {}
    write_json(args.output, {**about, "seconds": {**seconds, **measured}})


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return seconds of a step per variant: the median of the turns, and the quarter of them on either side."""
    cubes = read_cubes(cubes_file())
    cases = split(cubes.patients)["train"]
    steps = args.steps * (args.turns + 1)
    trainings = {name: Training(Run(name, 0, steps), cubes, cases) for name in args.variants}
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in trange(args.turns + 1):
        for name, training in trainings.items():
            taken = training.timed(args.steps) / args.steps
            if turn:
                times[name].append(taken)
    told = {}
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        told[name] = {"median": middle, "quartiles": [low, high], "turns": len(values)}
        print(f"{name}: {1e3 * middle:.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f})", flush=True)
    return told


if __name__ == "__main__":
    main()
