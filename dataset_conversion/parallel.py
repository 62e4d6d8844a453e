"""Runs one function over many jobs in worker processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def default_processes() -> int:
    """Return ``min(4, cpus)``: reading and compressing saturates most disks beyond that."""
    return min(4, os.cpu_count() or 1)


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_processes: int | None, title: str, progress: bool
) -> list[Result]:
    """Apply a function to every job.

    Args:
        function: picklable; an exception in it ends the run and is raised here.
        jobs: picklable arguments.
        num_processes: worker processes, None for `default_processes`; 0 and 1 work in this process.
        title: text before the progress bar.
        progress: whether to show the bar (on stderr).

    Returns:
        Results in the order of ``jobs``.

    Raises:
        ValueError: ``num_processes`` below 0, or a worker process that died.
    """
    processes = default_processes() if num_processes is None else num_processes
    if processes < 0:
        raise ValueError(f"The number of worker processes (-np) must be 0 (this process) or more, got {processes}.")
    processes = min(processes, len(jobs))
    results: list[Result | None] = [None] * len(jobs)
    with tqdm(total=len(jobs), desc=title, disable=not progress) as bar:
        if processes <= 1:
            for i, job in enumerate(jobs):
                results[i] = function(job)
                bar.update()
        else:
            # spawn: forking a process in which ITK has started threads can hang.
            with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
                futures = {pool.submit(function, job): i for i, job in enumerate(jobs)}
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = future.result()
                        bar.update()
                except BrokenProcessPool as error:
                    raise ValueError(
                        "A worker process died. Too little memory? Fewer processes (-np 1) need less; in "
                        "a script of yours, is the call under 'if __name__ == \"__main__\":'?"
                    ) from error
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
    return results  # type: ignore[return-value]
