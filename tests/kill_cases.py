"""Runs that are killed: one process imports everything once, and each run is a fork of it that takes no time to start.

As a script this file is that process: it reads a JSON list of runs a line, and answers with how they ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a run ended."""

    code: int
    """Exit code; minus the signal where one ended it."""
    seconds: float
    said: str


class Forks:
    """Runs ``mgml`` commands, and functions of this file, in forks of one process; use it as a context manager."""

    def __init__(self, log: Path) -> None:
        self._log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0", "MPLBACKEND": "agg"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, *words: Any, kill_after: float | None = None, kill_workers: int = 0) -> Ended:
        """Run one command and wait for it.

        Args:
            words: the command without ``mgml``; or ``train`` and the arguments of `train`.
            kill_after: seconds after which it is killed, if it still runs then.
            kill_workers: how many of its worker processes are killed, as soon as each is seen.
        """
        return self.together([words], kill_after, kill_workers)[0]

    def together(
        self, runs: Sequence[Sequence[Any]], kill_after: float | None = None, kill_workers: int = 0
    ) -> list[Ended]:
        """Start several commands at once and wait for all."""
        logs = [f"{self._log}_{number}" for number in range(len(runs))]
        calls = [[str(word) for word in words] for words in runs]
        wish = {"calls": calls, "logs": logs, "kill_after": kill_after, "kill_workers": kill_workers}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        answers = json.loads(self._process.stdout.readline() or "null")
        assert answers is not None, "the process that forks has ended; pytest -s shows why"
        return [Ended(*answer, Path(log).read_text()) for answer, log in zip(answers, logs, strict=True)]


# --- the process that forks -------------------------------------------------------------------------------------------
def serve() -> None:
    """Answer wishes until there are no more."""
    import builders  # noqa: F401  # all of these are imported for the forks
    import torch

    import nnunetv2_mgml.commands.convert
    import nnunetv2_mgml.commands.evaluate
    import nnunetv2_mgml.commands.predict
    import nnunetv2_mgml.inference.subsets.predictor
    import nnunetv2_mgml.training
    import nnunetv2_mgml.workflows.labelled_cases  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        wish = json.loads(line)
        began = time.monotonic()
        children = [_fork(call, log) for call, log in zip(wish["calls"], wish["logs"], strict=True)]
        ended = _wait(children, began, wish["kill_after"], wish["kill_workers"])
        sys.stdout.write(json.dumps([ended[child] for child in children]) + "\n")
        sys.stdout.flush()


def _wait(children: list[int], began: float, kill_after: float | None, kill_workers: int) -> dict[int, list[float]]:
    ended: dict[int, list[float]] = {}
    killed: set[int] = set()
    while len(ended) < len(children):
        for child in set(children) - set(ended):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = [os.waitstatus_to_exitcode(status), time.monotonic() - began]
            elif kill_after is not None and time.monotonic() - began > kill_after:
                os.kill(child, signal.SIGKILL)
            for worker in _workers(child) if len(killed) < kill_workers else ():
                if worker not in killed:
                    killed.add(worker)
                    os.kill(worker, signal.SIGKILL)
        time.sleep(0.002)
    return ended


def _workers(parent: int) -> Iterator[int]:
    """Yield the worker processes of a process, by their command lines."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield int(child)


def _fork(call: list[str], log: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        code = _run(call)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(call: list[str]) -> int:
    from nnunetv2_mgml.commands.main import main

    functions: dict[str, Callable[..., int]] = {"train": train}
    if call[0] in functions:
        return functions[call[0]](*call[1:])
    return main(call)


def train(trainer_name: str, plans_file: str, results: str) -> int:
    """Train the tiny data set of the plans on the CPU, or go on from the newest checkpoint, as ``--c`` does."""
    from builders import make_trainer

    from nnunetv2_mgml.training import TRAINERS

    os.environ["nnUNet_results"], os.environ["nnUNet_preprocessed"] = results, str(Path(plans_file).parents[1])
    plans = json.loads(Path(plans_file).read_text())
    resume = bool(list(Path(results).rglob("checkpoint_latest.pth")))
    trainer = make_trainer(TRAINERS[trainer_name], plans, {"save_every": 1, "num_epochs": 4}, resume=resume)
    if resume:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    trainer.run_training()
    return 0


if __name__ == "__main__":
    serve()
