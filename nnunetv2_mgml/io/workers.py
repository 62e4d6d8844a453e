"""A small pool of processes that end with their parent, in which a job that kills its worker takes no other with it.

They are spawned: forking a process in which ITK or PyTorch has started threads can hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerDiedError(ChildProcessError):
    """A job ended its worker process twice, the second time alone in a process of its own."""


def default_processes() -> int:
    """Return ``min(4, cpus)``: reading and compressing saturates most disks beyond that."""
    return min(4, os.cpu_count() or 1)


@dataclass
class Task:
    """A submitted job; hand it to `WorkerPool.result`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: Future[Any]

    def succeeded(self) -> bool:
        """Whether it is over and raised nothing."""
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None


class WorkerPool:
    """Run picklable functions in spawned processes, or in this one when ``num_workers`` is 0.

    When a worker dies (usually killed by the system for its memory), Python gives up the whole pool. Here each job
    that was under way is then repeated alone, so that only the job at fault fails. Use it as a context manager; leaving
    it drops the jobs not yet started and waits for the others.

    Args:
        num_workers: number of processes.
        options: command line options that set it, named when a worker dies.
    """

    def __init__(self, num_workers: int, options: str = "-npp, -nps") -> None:
        if num_workers < 0:
            raise ValueError(
                f"The number of worker processes ({options}) must be 0 (this process) or more, got {num_workers}."
            )
        self.num_workers = num_workers
        self.options = options
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Start a job. Without workers it runs here and now; its exception is kept for `result` all the same."""
        if self.num_workers == 0:
            return Task(function, arguments, _run_here(function, arguments))
        if self._executor is None:
            self._executor = _executor(self.num_workers)
        try:
            future = self._executor.submit(function, *arguments)
        except (BrokenProcessPool, OSError):
            if not _is_broken(self._executor):  # then the system refused a process
                raise
            self._executor = _executor(self.num_workers)
            future = self._executor.submit(function, *arguments)
        return Task(function, arguments, future)

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield the results of a function over many jobs, in their order; raises as `result` does.

        Only a few jobs wait at a time, so that little is repeated when a worker dies.
        """
        waiting: deque[Task] = deque()
        for job in jobs:
            waiting.append(self.submit(function, job))
            if len(waiting) > 2 * self.num_workers:
                yield self.result(waiting.popleft())
        while waiting:
            yield self.result(waiting.popleft())

    def result(self, task: Task) -> Any:
        """Wait for a job and return its value.

        Raises:
            WorkerDiedError: the job ends its process.
            Exception: what the job raised.
        """
        try:
            return task.future.result()
        except BrokenProcessPool:
            pass
        with _executor(1) as alone:
            try:
                return alone.submit(task.function, *task.arguments).result()
            except BrokenProcessPool as error:
                raise WorkerDiedError(
                    f"a worker process died, most likely killed for using too much memory: use fewer processes "
                    f"({self.options}; 0 works without any). In a script of your own the call must stand under "
                    f'`if __name__ == "__main__":`'
                ) from error


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int | None, title: str, progress: bool
) -> list[Result]:
    """Apply a function to every job, with a bar on stderr.

    Args:
        function: picklable; an exception in it ends the run and is raised here.
        jobs: picklable arguments.
        num_processes: worker processes, None for `default_processes`; 0 and 1 work in this process.
        title: text before the progress bar.
        progress: whether to show the bar.

    Returns:
        Results in the order of ``jobs``.

    Raises:
        ValueError: ``num_processes`` below 0.
        WorkerDiedError: a job ends its process.
    """
    processes = min(default_processes() if num_processes is None else num_processes, len(jobs))
    with WorkerPool(processes if processes != 1 else 0, "-np") as pool:
        return list(tqdm(pool.map(function, jobs), desc=title, total=len(jobs), disable=not progress))


def _run_here(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # handed on by `WorkerPool.result`, as a worker's would be
        future.set_exception(error)
    return future


def _executor(num_workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _is_broken(executor: ProcessPoolExecutor) -> bool:
    """Return whether it takes no more jobs; one that breaks while it starts a process reports its closed pipes only."""
    try:
        executor.submit(int)
    except BrokenProcessPool:
        return True
    return False


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the main process alone decides what stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the main process is gone, however it ended
        os._exit(1)
