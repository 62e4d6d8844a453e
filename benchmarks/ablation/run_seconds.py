"""Times a training step of every variant whose group of settings.json has ``equal_time``: `run.py` goes by it.

    python benchmarks/ablation/run_seconds.py --work /tmp/ablation                     # all of them
    python benchmarks/ablation/run_seconds.py --work /tmp/ablation --groups brains     # those of one group

On an idle machine, once, by the very commands of a run: a short training each, whose epochs count but for the first.
Everything that a step of the real training waits for is in it, loading and augmentation too. Writes
``results/run_seconds.json``; times of another processor or of another precision are replaced, not kept beside these.
To add variants to a table of slower code, or of another processor, whose trainings are to stay comparable:

    python benchmarks/ablation/run_seconds.py --groups brains --variants mgml_half_teacher --beside mgml

times both, and writes the table's seconds of ``mgml`` times the ratio found here.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import torch
from data import prepare
from machine import code_changed, commit, processor
from precision import precision_on
from run import train
from settings import STEP_SECONDS, Run, all_runs, equal_time_groups, read_settings

from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.training.epoch_log import LOG_NAME, read_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("ablation_work"), help="folder for data and models")
    parser.add_argument("--groups", nargs="+", help="groups of settings.json (default: all with equal_time)")
    parser.add_argument("--variants", nargs="+", help="of these (default: all)")
    parser.add_argument("--epochs", type=int, default=5, help="the first does not count, the median of the others does")
    parser.add_argument("--steps", type=int, default=10, help="steps of an epoch")
    parser.add_argument("--beside", metavar="VARIANT", help="scale by what the table has for this one, timed here too")
    parser.add_argument("--output", type=Path, default=STEP_SECONDS)
    args = parser.parse_args()
    settings = read_settings()
    about = {"processor": processor(), "precision": precision_on(torch.device("cpu")), "threads": 1}
    before = read_json(args.output) if args.output.is_file() else {}
    same = bool(args.beside) or all(before.get(key) == value for key, value in about.items())
    seconds: dict[str, dict[str, Any]] = before["seconds"] if same else {}
    runs = to_time(settings, args.groups or equal_time_groups(settings))
    known = list(dict.fromkeys(run.variant for run in runs))
    if unknown := [name for name in args.variants or () if name not in known]:
        parser.error(f"No variant {', '.join(unknown)} in these groups. Allowed: {', '.join(known)}.")
    scales: dict[str, float] = {}
    if args.beside:
        if args.beside not in known or not any(args.beside in table for table in seconds.values()):
            parser.error(f"{args.output} has no step of {args.beside}.")
        for run in (run for run in runs if run.variant == args.beside):
            prepare(args.work.resolve(), settings["datasets"][run.dataset])
            scales[run.dataset] = seconds[run.dataset][run.variant]["median"] / timed(run, args)["median"]
    for run in (run for run in runs if run.variant in (args.variants or known) and run.variant != args.beside):
        prepare(args.work.resolve(), settings["datasets"][run.dataset])
        told = {**timed(run, args), "commit": commit(), "code_changed": code_changed()}
        if args.beside:
            scale = scales[run.dataset]
            told |= {"median": told["median"] * scale, "beside": args.beside, "scale": scale, "timed_on": about}
        seconds.setdefault(run.dataset, {})[run.variant] = told
        print(f"{run.dataset} {run.variant}: {1e3 * told['median']:.0f} ms", flush=True)
        stands_for = {key: before[key] for key in about} if args.beside else about
        write_json(args.output, {**stands_for, "seconds": seconds})


def to_time(settings: dict[str, Any], groups: list[str]) -> list[Run]:
    """Return one run per data set and variant of some groups, the variants whose time others get included."""
    references = {settings["groups"][name]["dataset"]: settings["groups"][name]["equal_time"] for name in groups}
    chosen = {(run.dataset, run.variant): run for run in reversed(all_runs(settings, groups, equal_steps=True))}
    for run in reversed(all_runs(settings, ["main"])):
        if references.get(run.dataset) == run.variant:
            chosen.setdefault((run.dataset, run.variant), run)
    return list(reversed(chosen.values()))


def timed(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train shortly; return seconds of a step: the median over epochs, and all of them."""
    work = args.work.resolve()
    short = {"num_epochs": args.epochs, "num_iterations_per_epoch": args.steps}
    run = replace(run, group=f"seconds_{run.group}", options={**run.options, **short})
    model = train(run, work, work / "logs" / f"{run.name}.txt")
    epochs = [row["seconds"] / args.steps for row in read_log(model / f"fold_{run.fold}" / LOG_NAME)][1:]
    shutil.rmtree(model)
    return {"median": statistics.median(epochs), "epochs": epochs}


if __name__ == "__main__":
    main()
