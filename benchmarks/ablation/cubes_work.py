"""What a process of `cubes.py` does: trains its runs side by side, scores them, writes what came out."""

from __future__ import annotations

import argparse
import functools
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from cubes_data import SPLIT_SEED, Cubes, cubes_file, read_cubes, split
from cubes_scores import cases_of, dice, summary
from cubes_training import Training
from cubes_variants import STEP_SECONDS, Run
from machine import code_changed, commit, processor

from nnunetv2_mgml import __version__
from nnunetv2_mgml.io.files import read_json, write_json

_CHUNK = 25
"""Steps that are put into a GPU's queue at once."""
_TIMED = 40
"""Steps that are timed."""
_SHARE_OF_POINTS = 0.2
"""Of the time there is, the curve's points take no more than this; there are fewer of them otherwise."""
_EQUAL_TIME_CAPACITY = {"cpu": 3, "cuda": 12}
"""A variant may do up to this many times the steps of the reference in the same time."""


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
    capacity = args.steps * _EQUAL_TIME_CAPACITY[device.type] if args.equal_time else None
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
    equalise(trainings, args, cubes, parts["train"])
    together(trainings, cubes, parts, args, started)
    return 1 if failed else 0


def seconds_per_step(training: Training) -> float:
    """Return seconds of a step while nothing else runs in this process; the steps timed count."""
    count = max(1, min(_TIMED if training.device.type == "cuda" else 4, (training.steps - training.done) // 4))
    training.advance(1)
    return training.timed(count) / count


class Progress:
    """A training under way and what is known of it."""

    def __init__(self, training: Training, args: argparse.Namespace, alone: float) -> None:
        self.training, self.alone = training, alone
        self.points = args.points
        self.given: float | None = None
        """Seconds of a step by which it got its steps (``--equal_time``)."""
        self.cut = False
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


def equalise(trainings: Sequence[Progress], args: argparse.Namespace, cubes: Cubes, cases: Sequence[int]) -> None:
    """Give every training the steps it can do in the time of the reference (``--equal_time``).

    On a CPU, whose runs have a process each, by the table of `cubes_seconds.py`; on a GPU by what was timed just now,
    where the reference is timed too if none of the runs trains it.

    Raises:
        ValueError: the table lacks one of them.
    """
    if not args.equal_time:
        return
    timed: dict[str, list[float]] = {}
    if trainings[0].training.device.type == "cpu":
        names = [args.equal_time, *(progress.training.run.timed_as for progress in trainings)]
        timed = {name: [seconds] for name, seconds in seconds_in_table(names).items()}
    else:
        for progress in trainings:
            timed.setdefault(progress.training.run.timed_as, []).append(progress.alone)
        if args.equal_time not in timed:
            reference = Training(Run(args.equal_time, 0, args.steps), cubes, cases, args.how == "graph")
            timed[args.equal_time] = [seconds_per_step(reference)]
    middle = {name: sorted(values)[len(values) // 2] for name, values in timed.items()}
    for progress in trainings:
        progress.given = middle[progress.training.run.timed_as]
        progress.training.set_steps(round(args.steps * middle[args.equal_time] / progress.given))


def seconds_in_table(names: Sequence[str]) -> dict[str, float]:
    """Return the seconds of a step that `cubes_seconds.py` measured.

    Raises:
        ValueError: it did not measure one of them.
    """
    table = read_json(STEP_SECONDS)["seconds"] if STEP_SECONDS.is_file() else {}
    missing = [name for name in dict.fromkeys(names) if name not in table]
    if missing:
        raise ValueError(
            f"{STEP_SECONDS} has no step of {', '.join(missing)}. Measure it on the idle machine: "
            f"python benchmarks/ablation/cubes_seconds.py --variants {' '.join(missing)}."
        )
    return {name: table[name]["median"] for name in names}


def together(
    trainings: Sequence[Progress], cubes: Cubes, parts: dict[str, list[int]], args: argparse.Namespace, started: float
) -> None:
    """Do all steps of all trainings in turns; write the part at every point of a curve."""
    begun = time.time()
    fit(trainings, cubes, parts, args)
    left = list(trainings)
    while left:
        waiting = True
        for progress in left:
            training = progress.training
            if not training.ready():
                continue
            waiting = False
            training.advance(max(0, min(_CHUNK, progress.next_point - training.done)))
            if training.done >= progress.next_point:
                score(progress, cubes, parts, args, begun)
                progress.content = describe(progress, parts, args, cubes, time.time() - started)
                write_json(args.part, [p.content for p in trainings if p.content], indent=None)
        left = [progress for progress in left if not progress.over]
        if waiting:
            time.sleep(0.001)


def fit(trainings: Sequence[Progress], cubes: Cubes, parts: dict[str, list[int]], args: argparse.Namespace) -> None:
    """Cut points and steps of all trainings alike where they would take longer than ``--seconds`` allow."""
    if args.deadline is None:
        return
    seconds = []
    for _ in range(3):  # the first is slower
        start = time.time()
        evaluate(trainings[0], cubes, parts["validation"])
        seconds.append(time.time() - start)
    once = min(seconds) * len(trainings)
    at_the_end = 1 + (len(parts["test"]) / len(parts["validation"]) if args.test else 0)
    for_points = _SHARE_OF_POINTS * (args.deadline - time.time()) / max(once, 1e-6)
    for progress in trainings:
        progress.points = max(1, min(args.points, int(for_points)))
    reserve = 5 + (trainings[0].points + at_the_end) * once
    rounds = min(_TIMED, min(p.training.steps - p.training.done for p in trainings) // 4)
    if rounds < 1:
        return
    trainings[0].training.wait()
    start = time.time()
    for progress in trainings:
        progress.training.advance(rounds)
    trainings[0].training.wait()
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
            progress.cut = True


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
        "design": training.learner.options.network.fusion if not run.training["stock"] else "none",
        "variant": run.name,
        "seed": run.seed,
        "finished": progress.over,
        "nominal_steps": run.steps,
        "steps": training.steps,
        "equal_time": args.equal_time,
        "training": run.training,
        "options": run.options,
        "resolved": None if run.training["stock"] else training.learner.options.as_dict(),
        "million": sum(p.numel() for p in training.learner.network.parameters()) / 1e6,
        "split": {"seed": SPLIT_SEED, **{part: len(cases) for part, cases in parts.items()}},
        "patients": {part: [cubes.patients[case] for case in parts[part]] for part in ("validation", "test")},
        **{key: value for key, value in progress.content.items() if key in _SCORES},
        "curve": progress.curve,
        "seconds": round(seconds, 1),
        "seconds_per_step_alone": progress.alone,
        "seconds_per_step": progress.given,
        "cut": progress.cut,
        "device": device_name(training.device),
        "processor": processor(),
        "how": "graph" if training.graph is not None else "eager",
        "precision": training.precision,
        **code(args.commit),
    }


_SCORES = ("validation", "validation_dice", "test", "dice")


def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread"


@functools.cache
def code(given: str | None) -> dict[str, Any]:
    """Return commit, whether package or benchmarks were changed after it, and versions."""
    versions = {"torch": torch.__version__, "nnunetv2_mgml": __version__, "python": sys.version.split()[0]}
    versions["nnunetv2"] = metadata.version("nnunetv2")
    return {"commit": given or commit(), "code_changed": code_changed(), "versions": versions}
