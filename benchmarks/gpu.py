"""Everything that needs a GPU, in one command of a few minutes. Writes benchmarks/results/gpu.json for docs/gpu.md.

    python benchmarks/gpu.py                                    # on a machine with CUDA
    python benchmarks/gpu.py --sections correctness precision   # some of it
    python benchmarks/gpu.py --device cpu --tiny                # everything at tiny sizes, to see that it works

Sections run one after the other in a process of their own and write as they go, so that what breaks, hangs or runs out
of time loses nothing else. ``compile`` and ``counter`` run beside the sections that time nothing. Ratios are of things
timed in turns in one process, on the paper's plan (80^3, batch 1) and nnU-Net's plan for BraTS (128^3, batch 2).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mgml.io.files import write_json


class Section(NamedTuple):
    """A section of the result; `gpu_sections` has its function."""

    limit: int
    """Seconds after which it is stopped."""
    timed: bool = True
    """Whether it times things, so that nothing may run beside it."""


SECTIONS = {
    "about": Section(30, timed=False),
    "no_wait": Section(60, timed=False),
    "correctness": Section(120, timed=False),
    "precision": Section(60, timed=False),
    "distributed": Section(100, timed=False),
    "mamba": Section(30, timed=False),
    "compile": Section(240, timed=False),
    "counter": Section(120, timed=False),
    "ceilings": Section(20),
    "training_step": Section(90),
    "prediction": Section(40),
    "graph": Section(60),
    "training": Section(180),
    "designs": Section(150),
    "profile": Section(60),
}
RESULTS = Path(__file__).parent / "results" / "gpu.json"
BESIDE = ("compile", "counter")
"""Sections that run beside the untimed ones, in processes of their own."""
IMPORT_SECONDS = 60
"""What a new process may take on a fresh machine before its first section begins."""
_UNTIMED_DONE = "untimed_done"
_STATE = ("commit", "device", "tiny", "device_name", "code_changed")
"""What results in one file have in common."""


def main() -> int:
    """Run the sections and return the exit code: 1 if one failed."""
    args = parser().parse_args()
    if args.worker is not None:
        work(args)
        return 0
    until = time.monotonic() + 60 * args.minutes
    files = [args.output.with_name(f"{args.output.stem}.{kind}.json") for kind in ("main", *BESIDE)]
    flag = args.output.with_name(f"{args.output.stem}.{_UNTIMED_DONE}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for file in (*files, flag):
        file.unlink(missing_ok=True)
    beside = [Worker([name], file, args) for name, file in zip(BESIDE, files[1:], strict=True) if name in args.sections]
    todo = [name for name in SECTIONS if name in args.sections and name not in BESIDE]
    main_worker = Worker([name for name in todo if not SECTIONS[name].timed], files[0], args)
    started = time.monotonic()
    partial = args.output.with_name(f"{args.output.stem}.partial.json")
    watch([main_worker, *beside], until, partial, flag)
    main_worker = Worker([name for name in todo if SECTIONS[name].timed], files[0], args, main_worker)
    watch([main_worker, *beside], until, partial, flag)
    result = gather([main_worker, *beside])
    result["about"] = {**result.get("about", {}), "took": round(time.monotonic() - started, 1)}
    write_json(partial, result)
    for file in (*files, flag):
        file.unlink(missing_ok=True)
    failed = [name for name, content in result.items() if "error" in content]
    before = json.loads(args.output.read_text()) if args.output.is_file() else {}
    lost = [name for name, content in before.items() if "error" not in content and name not in {*result} - {*failed}]
    if lost and not same_state(before, result):
        print(
            f"{args.output} has {', '.join(lost)} of other code or of another machine and is left as it is. The result "
            f"is {partial}; move it there to replace them.",
            flush=True,
        )
        return 1
    write_json(args.output, in_order({**result, **{name: before[name] for name in lost}}))
    partial.unlink()
    print(f"wrote {args.output} after {time.monotonic() - started:.0f} s", flush=True)
    for name in failed:
        print(f"{name}: {result[name]['error'].strip().splitlines()[-1]}", flush=True)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    result.add_argument("--skip", nargs="+", choices=SECTIONS, default=[], metavar="SECTION")
    result.add_argument("--device", default="cuda", help="torch device")
    result.add_argument("--tiny", action="store_true", help="tiny sizes")
    result.add_argument("--minutes", type=float, default=9, help="nothing runs longer than this")
    result.add_argument("--training_seconds", type=float, default=90, help="of the training on the cubes")
    result.add_argument("--output", type=Path, default=RESULTS)
    result.add_argument("--commit", help="of this checkout, where it is no git repository")
    result.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    result.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return result


class Worker:
    """A process that does sections; it is started anew for what is left when it dies or a section takes too long.

    Args:
        sections: in this order.
        part: the file it writes.
        args: the command line.
        before: the worker whose part is continued.
    """

    def __init__(
        self, sections: Sequence[str], part: Path, args: argparse.Namespace, before: Worker | None = None
    ) -> None:
        self.todo = [name for name in sections if name not in args.skip]
        self.part, self.args = part, args
        self.lost: dict[str, str] = dict(before.lost) if before else {}
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def content(self) -> dict[str, Any]:
        """Return what it wrote so far."""
        written: dict[str, Any] = json.loads(self.part.read_text()) if self.part.is_file() else {}
        for name, error in self.lost.items():
            written[name] = {**written.get(name, {}), "error": error}
        return written

    def over(self) -> bool:
        """Look after the process; return whether nothing is left to do."""
        if not self.todo:
            return True
        if self._process is None:
            self._start()
            return False
        written = self.content()
        ended = self._process.poll()
        while self.todo and written.get(self.todo[0], {}).get("finished"):
            self.todo.pop(0)
        if not self.todo:
            self._process.wait()
        elif ended is not None and self.todo[0] not in written:
            self.give_up(f"the process ended with exit code {ended} before it began")
        elif ended is not None:
            self._lose(f"the process ended with exit code {ended}")
        else:
            limit = SECTIONS[self.todo[0]].limit
            began = written.get(self.todo[0], {}).get("began", self._started + IMPORT_SECONDS)
            if time.time() - began > limit:
                self._stop()
                self._lose(f"stopped after {limit} s")
        return not self.todo

    def give_up(self, reason: str) -> None:
        """End the process; what is left is marked as not run."""
        self._stop()
        for name in self.todo:
            self.lost[name] = reason
        self.todo = []

    def _start(self) -> None:
        command = [sys.executable, *sys.argv, "--worker", *self.todo, "--part", str(self.part)]
        self._process = subprocess.Popen(command, start_new_session=True)
        self._started = time.time()

    def _lose(self, reason: str) -> None:
        print(f"{self.todo[0]}: {reason}", flush=True)
        self.lost[self.todo.pop(0)] = reason
        self._process = None

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def watch(workers: Sequence[Worker], until: float, output: Path, flag: Path) -> None:
    """Wait for workers; once the first is through, the others are told by a file; the result is written as it grows.

    The others may then time things, so this returns only when all are done.
    """
    written = 0.0
    while True:
        over = [worker.over() for worker in workers]
        if over[0]:
            flag.touch()
        if time.monotonic() > until:
            for worker in workers:
                worker.give_up("out of time (--minutes)")
        if all(over) or time.monotonic() > until:
            break
        if time.monotonic() - written > 2:
            write_json(output, gather(workers))
            written = time.monotonic()
        time.sleep(0.1)
    write_json(output, gather(workers))


def same_state(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two results are of the same code, sizes and machine, so that sections of both can stand in one file."""
    known = [tuple(each.get("about", {}).get(key) for key in _STATE) for each in (before, now)]
    return known[0] == known[1] and None not in known[0][:2]


def in_order(found: dict[str, Any]) -> dict[str, Any]:
    """Return a result with its sections in their order."""
    return {name: found[name] for name in dict.fromkeys(("about", *SECTIONS)) if name in found}


def gather(workers: Iterable[Worker]) -> dict[str, Any]:
    """Return what workers wrote, section by section in their order."""
    found: dict[str, Any] = {}
    for worker in workers:
        found.update(worker.content())
    return in_order(found)


def work(args: argparse.Namespace) -> None:
    """Do sections in this process, writing after every entry."""
    sys.path.insert(0, str(Path(__file__).parent))
    from gpu_sections import FUNCTIONS, Settings  # here, because the other process needs no torch

    settings = Settings(
        device=args.device,
        tiny=args.tiny,
        training_seconds=args.training_seconds,
        folder=args.output.parent,
        commit=args.commit,
        untimed_done=args.output.with_name(f"{args.output.stem}.{_UNTIMED_DONE}"),
    )
    content: dict[str, Any] = json.loads(args.part.read_text()) if args.part.is_file() else {}
    for name in args.worker:
        start = time.monotonic()
        section = content[name] = {"began": time.time()}
        write_json(args.part, content)
        try:
            for key, value in FUNCTIONS[name](settings):
                section[key] = value
                write_json(args.part, content)
        except Exception:  # the other sections go on
            section["error"] = traceback.format_exc()
            print(f"{name} FAILED\n{section['error']}", flush=True)
        del section["began"]
        section["took"] = round(time.monotonic() - start, 2)
        section["finished"] = True
        write_json(args.part, content)
        print(f"{name}: {section['took']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
