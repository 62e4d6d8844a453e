"""`io.workers`: jobs in processes of their own, which end with their parent however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nnunetv2_mgml.io.workers import WorkerDiedError, WorkerPool, default_processes, run_jobs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="tests with signals")


def square(number: int) -> int:
    return number**2


def die_at_three(number: int) -> int:
    return os._exit(1) if number == 3 else number


def note_and_sleep(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(100)


@pytest.mark.parametrize("processes", [0, 1, 2, None])
def test_results_come_in_order(processes: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_jobs(square, list(range(20)), processes, "Squaring", True) == [n**2 for n in range(20)]
    assert "Squaring" in capsys.readouterr().err
    assert run_jobs(square, [], processes, "Squaring", False) == []
    assert 1 <= default_processes() <= 4


def test_a_negative_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"\(-np\) must be 0 \(this process\) or more, got -1"):
        run_jobs(square, [1], -1, "", False)


def test_only_the_job_that_dies_fails_and_the_option_is_named() -> None:
    with WorkerPool(2, "-np") as pool:
        results = pool.map(die_at_three, range(6))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(WorkerDiedError, match=r"worker process died.* \(-np; 0 works without any\)"):
            next(results)


def test_a_job_that_kills_its_worker_takes_no_other_with_it() -> None:
    with WorkerPool(2) as pool:
        tasks = [pool.submit(*call) for call in ((os.path.basename, "a/b"), (os._exit, 3), (os.path.basename, "c/d"))]
        assert pool.result(tasks[0]) == "b"
        with pytest.raises(WorkerDiedError, match="worker process died"):
            pool.result(tasks[1])
        assert pool.result(tasks[2]) == "d"
        assert pool.result(pool.submit(os.path.basename, "e/f")) == "f"  # a new pool serves the rest


@pytest.mark.parametrize("broken", [True, False])
def test_pipes_closed_under_a_job_are_a_worker_that_died(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """A pool that breaks while it starts a process for the next job raises what its closed pipes raise."""
    with WorkerPool(2, "-np") as pool:
        task = pool.submit(os._exit, 3) if broken else pool.submit(square, 3)
        task.future.exception()
        refusals = [OSError("handle is closed")]
        submit = ProcessPoolExecutor.submit

        def refuse_once(executor: ProcessPoolExecutor, *job: Any) -> Any:
            if refusals:
                raise refusals.pop()
            return submit(executor, *job)

        monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse_once)
        if broken:
            assert pool.result(pool.submit(square, 4)) == 16
        else:
            with pytest.raises(OSError, match="handle is closed"):
                pool.submit(square, 4)
            assert pool.result(pool.submit(square, 5)) == 25


def test_an_exception_in_a_job_is_raised_by_result_only() -> None:
    for workers in (0, 1):
        with WorkerPool(workers) as pool:
            task = pool.submit(int, "x")
            with pytest.raises(ValueError, match="invalid literal"):
                pool.result(task)
    with pytest.raises(ValueError, match="or more, got -1"):
        WorkerPool(-1)


def test_without_processes_an_exception_ends_the_run() -> None:
    done: list[int] = []

    def job(number: int) -> None:
        done.append(number)
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        run_jobs(job, [1, 2], 0, "", False)
    assert done == [1]


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_workers import note_and_sleep
from nnunetv2_mgml.io.workers import run_jobs
if __name__ == "__main__":
    run_jobs(note_and_sleep, [sys.argv[2]] * 2, 2, "", False)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent(tmp_path: Path, kill: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    pids = tmp_path / "pids"
    pids.mkdir()
    with subprocess.Popen([sys.executable, script, str(Path(__file__).parent), pids]) as parent:
        assert eventually(lambda: len(os.listdir(pids)) == 2), "the workers did not start"
        parent.send_signal(kill)
        parent.wait()
    workers = [int(pid) for pid in os.listdir(pids)]
    assert eventually(lambda: not any(alive(pid) for pid in workers))


def eventually(condition: object, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody waits for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path("/proc").is_dir()
