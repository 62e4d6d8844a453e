"""Trains on the cubes of 288 real patients and scores all subsets; one result file per run.

    python benchmarks/ablation/cubes.py --variants baseline mgml --seeds 0 1 2 --steps 6000
    python benchmarks/ablation/cubes.py --variants baseline baseline:learning_rate=0.005 --seeds 0 --steps 1500
    python benchmarks/ablation/cubes.py --variants baseline:only=t1+t2,patients=30 --steps 3000
    python benchmarks/ablation/cubes.py --collect part_0.json --label h100          # results made on another machine

Needs ``MGML_REAL_DATA``. A variant is a name of `cubes.json`, with changes after a colon: its settings of a training
(learning_rate, batch, patch, width_factor, patients, only, ...) or options of the plugin. Choices rest on validation
patients; ``--test`` scores the test patients as well, once, at the end.

On a CPU ``--parallel`` runs go side by side, one process and thread each. On a GPU all runs share one process, each
a CUDA graph on a stream of its own; where that fails they are done again without graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cubes_data import SPLIT_SEED, Cubes, cubes_file, read_cubes, split
from cubes_run import Run, Training
from cubes_scores import cases_of, dice, summary

from nnunetv2_mgml import __version__
from nnunetv2_mgml.io.files import write_json

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "cubes"
_CHUNK = 25
"""Steps that are put into a GPU's queue at once."""
_TIMED = 40
"""Steps that are timed."""
_EQUAL_TIME_CAPACITY = 3
"""A variant may do up to this many times the steps of the reference in the same time."""


def main() -> int:
    """Train, and return the exit code."""
    args = parser().parse_args()
    if args.worker:
        return work(args, [Run(*entry) for entry in json.loads(args.worker)])
    label = args.label or args.device.partition(":")[0]
    if args.collect:
        for part in args.collect:
            keep(part, label)
        return 0
    deadline = time.time() + args.seconds if args.seconds else None
    runs = [Run(name, seed, args.steps) for seed in args.seeds for name in args.variants]
    runs = [run for run in runs if args.again or not finished(run, label)]
    for run in runs:
        run.training  # noqa: B018  refuses unknown variants before anything starts
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        jobs = [("eager", [run]) for run in runs]
    else:
        jobs = [("graph" if args.how == "auto" else args.how, runs[k :: args.processes]) for k in range(args.processes)]
    parts = launch(args, jobs, deadline)
    missing = [run for run in runs if run not in done(parts)]
    if missing and args.device != "cpu" and args.how == "auto":
        print(f"{len(missing)} of {len(runs)} runs did not finish as graphs; once more without", flush=True)
        parts += launch(args, [("eager", [run]) for run in missing], deadline, len(parts))
    for part in () if args.parts_only else parts:
        keep(part, label)
    missing = [run for run in runs if run not in done(parts)]
    for run in missing:
        print(f"not finished: {run.name} seed {run.seed}", flush=True)
    return 1 if missing else 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--variants", nargs="+", default=["baseline", "mgml"], help="see cubes.json")
    result.add_argument("--seeds", nargs="+", type=int, default=[0])
    result.add_argument("--steps", type=int, default=1500, help="training steps (of the reference, with --equal_time)")
    result.add_argument(
        "--equal_time",
        metavar="VARIANT",
        help="every variant gets as many steps as it can do in the time of this one, timed alone before it starts",
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
    args: argparse.Namespace, jobs: Sequence[tuple[str, list[Run]]], deadline: float | None, first: int = 0
) -> list[Path]:
    """Run jobs, each a process with its runs; return the files they write."""
    parts = [args.output / f"part_{number}.json" for number in range(first, first + len(jobs))]

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

    with ThreadPoolExecutor(min(args.parallel, 6) if args.device != "cpu" else args.parallel) as pool:
        list(pool.map(lambda job: one(*job[0], job[1]), zip(jobs, parts, strict=True)))
    return parts


def finished(run: Run, label: str) -> bool:
    """Whether a result of these very settings is there."""
    file = RESULTS / label / run.file_name
    if not file.is_file():
        return False
    content = json.loads(file.read_text())
    return content["finished"] and (content["training"], content["options"]) == (run.training, run.options)


def done(parts: Sequence[Path]) -> list[Run]:
    """Return the finished runs of some files."""
    contents = [content for part in parts if part.is_file() for content in json.loads(part.read_text())]
    return [Run(c["variant"], c["seed"], c["nominal_steps"]) for c in contents if c["finished"]]


def keep(part: Path, label: str) -> None:
    """Write a result file for every finished run of a part."""
    for content in json.loads(part.read_text()) if part.is_file() else ():
        if content["finished"]:
            run = Run(content["variant"], content["seed"], content["nominal_steps"])
            (RESULTS / label).mkdir(parents=True, exist_ok=True)
            write_json(RESULTS / label / run.file_name, content, indent=None)


def work(args: argparse.Namespace, runs: Sequence[Run]) -> int:
    """Do runs side by side in this process and write a part; the exit code is 1 if one failed."""
    started = time.time()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.backends.cudnn.benchmark = True
    cubes = read_cubes(cubes_file()).to(device)
    parts = split(cubes.patients)
    trainings, failed = [], 0
    capacity = args.steps * _EQUAL_TIME_CAPACITY if args.equal_time else None
    for run in runs:
        try:
            training = Training(run, cubes, parts["train"], args.how == "graph", capacity)
            trainings.append(Progress(training, args, seconds_per_step(training)))
            print(f"{run.name} seed {run.seed}: {trainings[-1].alone * 1e3:.1f} ms a step alone", flush=True)
        except Exception:  # the others go on
            failed += 1
            print(f"{run.name} seed {run.seed} FAILED\n{traceback.format_exc()}", flush=True)
    if not trainings:
        return 1
    equalise(trainings, args)
    together(trainings, cubes, parts, args, started)
    return 1 if failed else 0


def seconds_per_step(training: Training) -> float:
    """Return seconds of a step while nothing else runs in this process; the steps timed count."""
    count = max(1, min(_TIMED if training.device.type == "cuda" else 4, (training.steps - training.done) // 4))
    training.advance(1)
    synchronise(training.device)
    start = time.perf_counter()
    training.advance(count)
    synchronise(training.device)
    return (time.perf_counter() - start) / count


def synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Progress:
    """A training under way and what is known of it."""

    def __init__(self, training: Training, args: argparse.Namespace, alone: float) -> None:
        self.training, self.alone = training, alone
        self.points = args.points
        self.curve: list[dict[str, Any]] = []
        self.content: dict[str, Any] = {}

    @property
    def next_point(self) -> int:
        """The step of the next evaluation: the first point of the curve that was not there at the last one."""
        steps, last = self.training.steps, self.curve[-1]["step"] if self.curve else 0
        return next((point for k in range(1, self.points) if (point := round(steps * k / self.points)) > last), steps)

    @property
    def over(self) -> bool:
        """Whether all steps are done and scored."""
        return bool(self.curve) and self.curve[-1]["step"] >= self.training.steps


def equalise(trainings: Sequence[Progress], args: argparse.Namespace) -> None:
    """Give every training the steps it can do in the time of the reference (``--equal_time``).

    Raises:
        ValueError: the reference is not among the trainings of this process.
    """
    if not args.equal_time:
        return
    reference = [p.alone for p in trainings if p.training.run.name == args.equal_time]
    if not reference:
        raise ValueError(
            f"--equal_time {args.equal_time} is none of {', '.join({p.training.run.name for p in trainings})}; on a "
            f"CPU, where every run has a process of its own, set --steps per variant instead."
        )
    by_name: dict[str, list[float]] = {}
    for progress in trainings:
        by_name.setdefault(progress.training.run.name, []).append(progress.alone)
    for progress in trainings:
        times = sorted(by_name[progress.training.run.name])
        progress.training.set_steps(round(args.steps * sorted(reference)[len(reference) // 2] / times[len(times) // 2]))


def together(
    trainings: Sequence[Progress], cubes: Cubes, parts: dict[str, list[int]], args: argparse.Namespace, started: float
) -> None:
    """Do all steps of all trainings in turns; write the part at every point of a curve."""
    begun = time.time()
    fit(trainings, cubes, parts, args)
    while any(not progress.over for progress in trainings):
        for progress in trainings:
            training = progress.training
            if progress.over:
                continue
            chunk = _CHUNK if args.how == "graph" else 1 if training.device.type == "cuda" else _CHUNK
            training.advance(max(0, min(chunk, progress.next_point - training.done)))
            if training.done >= progress.next_point:
                score(progress, cubes, parts, args, begun)
                progress.content = describe(progress, parts, args, cubes, time.time() - started)
                write_json(args.part, [p.content for p in trainings if p.content], indent=None)


def fit(trainings: Sequence[Progress], cubes: Cubes, parts: dict[str, list[int]], args: argparse.Namespace) -> None:
    """Cut the steps of all trainings alike where they would take longer than ``--seconds`` allow."""
    if args.deadline is None:
        return
    seconds = []
    for _ in range(2):  # the first is slower
        start = time.time()
        evaluate(trainings[0], cubes, parts["validation"])
        seconds.append(time.time() - start)
    scored = args.points + 1 + (len(parts["test"]) / len(parts["validation"]) if args.test else 0)
    reserve = 5 + scored * seconds[-1] * len(trainings)
    rounds = min(_TIMED, min(p.training.steps - p.training.done for p in trainings) // 4)
    if rounds < 1:
        return
    synchronise(trainings[0].training.device)
    start = time.time()
    for progress in trainings:
        progress.training.advance(rounds)
    synchronise(trainings[0].training.device)
    per_round = (time.time() - start) / rounds
    left = max(1, *(p.training.steps - p.training.done for p in trainings))
    possible = max(1.0, (args.deadline - time.time() - reserve) / per_round)
    print(
        f"{len(trainings)} runs: {per_round * 1e3:.1f} ms for a step of each; {left} steps left, time for "
        f"{possible:.0f} (evaluations: {reserve:.0f} s)",
        flush=True,
    )
    if possible < left:
        for progress in trainings:
            training = progress.training
            training.set_steps(training.done + int((training.steps - training.done) * possible / left))


def evaluate(progress: Progress, cubes: Cubes, cases: Sequence[int]) -> Any:
    """Return Dice ``(R, S, N)`` as an array."""
    training = progress.training
    batch = 36 if training.device.type == "cuda" else 6
    with training.evaluating():
        return dice(training.learner, cubes, cases, training.run.subsets, training.precision, batch).cpu().numpy()


def score(
    progress: Progress, cubes: Cubes, parts: dict[str, list[int]], args: argparse.Namespace, begun: float
) -> None:
    """Add a point to the curve; at the end of the training, all scores."""
    training, subsets = progress.training, progress.training.run.subsets
    values = evaluate(progress, cubes, parts["validation"])
    told = summary(values, subsets)
    progress.curve.append(
        {
            "step": training.done,
            "seconds": round(time.time() - begun, 2),
            "loss": training.recent_loss(),
            **{key: told[key] for key in ("mean", "regions", "by_count", "inversions")},
        }
    )
    print(f"{training.run.name} seed {training.run.seed} step {training.done}: {told['mean']:.2f}", flush=True)
    if progress.over:
        progress.content = {"validation": told, "validation_dice": cases_of(values, subsets)}
        if args.test:
            values = evaluate(progress, cubes, parts["test"])
            progress.content.update(test=summary(values, subsets), dice=cases_of(values, subsets))
            print(
                f"{training.run.name} seed {training.run.seed} test: {progress.content['test']['mean']:.2f}", flush=True
            )


def describe(
    progress: Progress, parts: dict[str, list[int]], args: argparse.Namespace, cubes: Cubes, seconds: float
) -> dict[str, Any]:
    """Return what is written of a run: scores as far as there are any, what it was, and on which code and machine."""
    training, run = progress.training, progress.training.run
    return {
        "group": "cubes",
        "dataset": "cubes",
        "design": training.learner.config.fusion if not run.training["stock"] else "none",
        "variant": run.name,
        "seed": run.seed,
        "finished": progress.over,
        "nominal_steps": run.steps,
        "steps": training.steps,
        "equal_time": args.equal_time,
        "training": run.training,
        "options": run.options,
        "resolved": None if run.training["stock"] else training.learner.config.as_dict(),
        "million": sum(p.numel() for p in training.learner.network.parameters()) / 1e6,
        "split": {"seed": SPLIT_SEED, **{part: len(cases) for part, cases in parts.items()}},
        "patients": {part: [cubes.patients[case] for case in parts[part]] for part in ("validation", "test")},
        **{key: value for key, value in progress.content.items() if key in _SCORES},
        "curve": progress.curve,
        "seconds": round(seconds, 1),
        "seconds_per_step_alone": progress.alone,
        "device": device_name(training.device),
        "how": "graph" if training.graph is not None else "eager",
        "precision": training.precision,
        **code(args.commit),
    }


_SCORES = ("validation", "validation_dice", "test", "dice")


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"


def code(commit: str | None) -> dict[str, Any]:
    """Return commit and versions."""
    changed = git("status", "--porcelain", "--", str(FOLDER.parents[1] / "nnunetv2_mgml"))
    versions = {"torch": torch.__version__, "nnunetv2_mgml": __version__, "python": sys.version.split()[0]}
    versions["nnunetv2"] = metadata.version("nnunetv2")
    return {"commit": commit or git("rev-parse", "HEAD"), "code_changed": bool(changed), "versions": versions}


def git(*arguments: str) -> str:
    """Return what git says in this repository; empty where there is none."""
    try:
        return subprocess.run(
            ["git", "-C", str(FOLDER), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
