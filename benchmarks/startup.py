"""What the start-up line costs a Python process that is no nnUNetv2_* command: fresh environments, with and without it.

    python benchmarks/startup.py            # 200 interpreter starts per environment and round

Needs setuptools and pip in the running Python, no network. Rounds alternate, so drift of the machine hits all alike.

Result (Linux, Python 3.11.7, 2 cores under other load, CPU time, median of 800 starts): nothing 9.63 ms; wheel 9.87 ms
(+0.24); editable 10.26 ms (+0.63). With setuptools' own finder for editable installs it was +9 ms (wall time, idle).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
INSTALL = {"nothing": None, "wheel": [str(REPOSITORY)], "editable": ["--editable", str(REPOSITORY)]}


def environment(folder: Path, arguments: list[str] | None) -> Path:
    """Make a virtual environment with the project installed as told; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    if arguments is not None:
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        borrowed = Path(site, "_borrowed.pth")
        borrowed.write_text(sysconfig.get_path("purelib"))  # setuptools for the build
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "--python",
                python,
                "install",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
                *arguments,
            ],
            check=True,
        )
        borrowed.unlink()
    return python


def milliseconds(python: Path, starts: int) -> list[float]:
    """Return the CPU time of each of some interpreter starts that do nothing (wall time depends on other load)."""
    times = []
    for _ in range(starts):
        process = subprocess.Popen([python, "-c", "pass"])
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{python} ended with exit code {process.returncode}")
        times.append((usage.ru_utime + usage.ru_stime) * 1e3)
    return times


def main() -> None:
    """Measure and print one line per environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pythons = {name: environment(Path(folder, name), arguments) for name, arguments in INSTALL.items()}
        times: dict[str, list[float]] = {name: [] for name in pythons}
        for _ in range(args.rounds):
            for name, python in pythons.items():
                times[name] += milliseconds(python, args.starts)
    base = statistics.median(times["nothing"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<9} CPU time, median {median:.2f} ms ({median - base:+.2f}), minimum {min(values):.2f} ms")


if __name__ == "__main__":
    main()
