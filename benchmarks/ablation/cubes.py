"""Trains on the cubes of 288 real patients and scores all subsets; one result file per run.

    python benchmarks/ablation/cubes.py --variants baseline mgml --seeds 0 1 2 --steps 6000
    python benchmarks/ablation/cubes.py --variants baseline baseline:learning_rate=0.005 --seeds 0 --steps 1500
    python benchmarks/ablation/cubes.py --variants baseline:only=t1+t2,patients=30 --steps 3000
    python benchmarks/ablation/cubes.py --table --seeds 0 1 2 --steps 6000 --list      # the whole table, numbered
    python benchmarks/ablation/cubes.py --collect part_*.json --label h100          # results made on another machine

`cubes.sbatch` runs the whole table as an array of jobs.

Needs ``MGML_REAL_DATA``. A variant is a name of `cubes.json`, with changes after a colon: its settings of a training
(learning_rate, batch, patch, width_factor, patients, only, ...) or options of the plugin. Choices rest on validation
patients; ``--test`` scores the test patients as well, once, at the end.

On a CPU ``--parallel`` runs go side by side, one process and thread each. On a GPU all runs share one process, each
a CUDA graph on a stream of its own; where that fails they are done again without graphs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from cubes_variants import SETTINGS, Run, whole_table

from nnunetv2_mgml.io.files import write_json

RESULTS = Path(__file__).parent / "results" / "cubes"


def main() -> int:
    """Train, and return the exit code."""
    commands = parser()
    args = commands.parse_args()
    if args.worker:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from cubes_work import work  # here, because the other process needs no torch

        return work(args, [Run(*entry) for entry in json.loads(args.worker)])
    label = args.label or args.device.partition(":")[0]
    if args.collect:
        for part in args.collect:
            keep(part, label)
        return 0
    deadline = time.time() + args.seconds if args.seconds else None
    runs = [Run(name, seed, args.steps) for seed in args.seeds for name in args.variants]
    if args.table:
        runs = whole_table(args.seeds, args.steps)
    if args.list:
        print("\n".join(f"{number} {run.name} seed {run.seed}" for number, run in enumerate(runs)))
        return 0
    if args.job is not None:
        if not 0 <= args.job < len(runs):
            commands.error(f"There is no run {args.job}. Allowed: 0 to {len(runs) - 1}; --list says which is which.")
        runs = runs[args.job : args.job + 1]
    for run in runs:
        run.training  # noqa: B018  refuses unknown variants before anything starts
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.again:
        parts = sorted(args.output.glob("part_*.json"))  # also of a call that was stopped
        for part in () if args.parts_only else parts:
            keep(part, label, left_by=args.device)
        here = [content for part in parts for content in contents(part)] if args.parts_only else []
        runs = [run for run in runs if not finished(run, label, args, here)]
    if args.device == "cpu":
        jobs = [("eager", [run]) for run in runs]
    else:
        jobs = [("graph" if args.how == "auto" else args.how, runs[k :: args.processes]) for k in range(args.processes)]
    parts = launch(args, jobs, deadline, label)
    missing = [run for run in runs if run not in done(parts)]
    if missing and args.device != "cpu" and args.how == "auto":
        print(f"{len(missing)} of {len(runs)} runs did not finish as graphs; once more without", flush=True)
        parts += launch(args, [("eager", [run]) for run in missing], deadline, label)
    missing = [run for run in runs if run not in done(parts)]
    for run in missing:
        print(f"not finished: {run.name} seed {run.seed}", flush=True)
    return 1 if missing else 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--variants", nargs="+", default=["baseline", "mgml"], help="see cubes.json")
    result.add_argument("--table", action="store_true", help="every variant, and a specialist for each subset")
    result.add_argument("--list", action="store_true", help="only print the runs with their numbers")
    result.add_argument("--job", type=int, metavar="NUMBER", help="only this run of the list, for arrays of jobs")
    result.add_argument("--seeds", nargs="+", type=int, default=[0])
    result.add_argument("--steps", type=int, default=1500, help="training steps (of the reference, with --equal_time)")
    result.add_argument(
        "--equal_time",
        metavar="VARIANT",
        help="every variant gets as many steps as it can do in the time of this one: on a CPU by what cubes_seconds.py "
        "measured, on a GPU timed before they start",
    )
    result.add_argument("--seconds", type=float, help="all runs together take this long at most: steps become fewer")
    result.add_argument("--points", type=int, default=10, help="points of the validation curve")
    result.add_argument("--test", action="store_true", help="score the test patients at the end")
    result.add_argument("--device", default="cpu", help="torch device")
    result.add_argument(
        "--parallel", type=int, default=max(1, os.cpu_count() or 1), help="processes side by side on a CPU"
    )
    result.add_argument("--processes", type=int, default=1, help="processes that share a GPU's runs")
    result.add_argument("--how", choices=("auto", "graph", "eager"), default="auto", help="steps on a GPU")
    result.add_argument("--label", help="folder below results/cubes (default: the kind of device)")
    result.add_argument("--output", type=Path, default=Path("cubes_work"), help="folder for what runs write meanwhile")
    result.add_argument("--parts_only", action="store_true", help="leave the results in --output")
    result.add_argument("--again", action="store_true", help="do again what is finished")
    result.add_argument("--collect", nargs="+", type=Path, metavar="PART", help="keep results of another machine")
    result.add_argument("--commit", help="of this checkout, where it is no git repository")
    result.add_argument("--worker", help=argparse.SUPPRESS)
    result.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    result.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return result


def launch(
    args: argparse.Namespace, jobs: Sequence[tuple[str, list[Run]]], deadline: float | None, label: str
) -> list[Path]:
    """Run jobs, each a process with its runs; return the files they write, whose results are kept as each ends."""
    parts = [args.output / part_name(how, runs, bool(args.equal_time)) for how, runs in jobs]

    def one(how: str, runs: list[Run], part: Path) -> None:
        part.unlink(missing_ok=True)
        left = None if deadline is None else deadline - time.time()
        if not runs or (left is not None and left < 10):
            return
        entries = json.dumps([(run.name, run.seed, run.steps) for run in runs])
        command = [sys.executable, *sys.argv, "--how", how, "--worker", entries, "--part", str(part)]
        command += ["--deadline", str(deadline)] if deadline else []
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if args.device == "cpu" else {}
        process = subprocess.Popen(command, env={**os.environ, **threads, **tunables})
        try:
            process.wait(None if left is None else left + 15)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"stopped {', '.join(run.name for run in runs)}: out of time", flush=True)
        if not args.parts_only:
            keep(part, label)

    with ThreadPoolExecutor(min(args.parallel, 6) if args.device != "cpu" else args.parallel) as pool:
        list(pool.map(lambda job: one(*job[0], job[1]), zip(jobs, parts, strict=True)))
    return parts


def part_name(how: str, runs: Sequence[Run], equal_time: bool) -> str:
    """Return the name of the file of a job: of its own runs, so that no other job writes over it."""
    names = [run.file_name(equal_time) for run in runs]
    digest = hashlib.sha256("\n".join([how, *names]).encode()).hexdigest()[:8]
    return f"part_{Path(names[0]).stem}_{digest}.json" if names else f"part_{digest}.json"


def finished(run: Run, label: str, args: argparse.Namespace, beside: Sequence[dict[str, Any]] = ()) -> bool:
    """Whether a result of these very settings is there, with all that is asked for.

    Args:
        run: the training.
        label: below results/cubes.
        args: a result without scores of test patients is none with ``--test``, nor one cut short without ``--seconds``.
        beside: results that are not kept yet.
    """
    file = RESULTS / label / run.file_name(bool(args.equal_time))
    known = [json.loads(file.read_text())] if file.is_file() else []
    return any(_is_result_of(run, args, content) for content in [*known, *beside])


def _is_result_of(run: Run, args: argparse.Namespace, content: dict[str, Any]) -> bool:
    training = {**SETTINGS["training"], **content["training"]}  # a setting newer than the result is as it was
    same = (content["variant"], content["seed"], content["nominal_steps"], content["equal_time"])
    # the first results of GPUs do not say whether they were cut; all were
    cut = content.get("cut", not content["device"].startswith("CPU"))
    return (
        content["finished"]
        and same == (run.name, run.seed, run.steps, args.equal_time)
        and (training, content["options"]) == (run.training, run.options)
        and ("test" in content or not args.test)
        and (not cut or args.seconds is not None)
    )


def contents(part: Path) -> list[dict[str, Any]]:
    """Return what a part holds; nothing of one that is not there."""
    found: list[dict[str, Any]] = json.loads(part.read_text()) if part.is_file() else []
    return found


def done(parts: Sequence[Path]) -> list[Run]:
    """Return the finished runs of some files."""
    found = [content for part in parts for content in contents(part) if content["finished"]]
    return [Run(c["variant"], c["seed"], c["nominal_steps"]) for c in found]


def keep(part: Path, label: str, left_by: str | None = None) -> None:
    """Write a result file for every finished run of a part.

    Args:
        part: what a process has written.
        label: below results/cubes.
        left_by: the torch device of a call that was stopped; results of another kind of device, or older than what is
            kept already, are left out.
    """
    for content in contents(part):
        run = Run(content["variant"], content["seed"], content["nominal_steps"])
        file = RESULTS / label / run.file_name(bool(content["equal_time"]))
        kept = file.is_file() and file.stat().st_mtime >= part.stat().st_mtime
        other = (left_by == "cpu") != content["device"].startswith("CPU")
        if content["finished"] and not (left_by and (kept or other)):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, content, indent=None)


if __name__ == "__main__":
    sys.exit(main())
