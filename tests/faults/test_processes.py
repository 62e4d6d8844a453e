"""Conversions as real processes: killed at random moments, and two at once into one dataset id."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversion_cases import needs_installation, tree, write_cases

from nnunetv2_mgml.commands import main as cli

COMMAND = [sys.executable, "-c", "import sys; from nnunetv2_mgml.commands.main import main; sys.exit(main())"]
KILLS = 4


def arguments(source: Path, command: str = "brats", name: str = "Test") -> list[str]:
    found = {
        "brats": ["brats", str(source)],
        "folders": [
            "folders",
            str(source),
            "--label",
            "*_seg.nii.gz",
            "--modalities",
            "t1=*_t1.nii.gz",
            "t2=*_t2.nii.gz",
        ],
    }
    return ["convert", *found[command], "-d", "137", "--name", name, "-np", "2"]


def start(*words: str) -> subprocess.Popen[str]:
    """Start ``mgml`` in a session of its own, by which its workers are known."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*COMMAND, *words], text=True, start_new_session=True, **pipes)


def alive(session: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, NotADirectoryError):
            continue
        if entry.name.isdigit() and int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
def test_killed_at_random_moments(nnunet_folders: Path, tmp_path: Path) -> None:
    """No worker outlives it, nothing half-made is taken for a data set, and the next run needs nobody to clear up."""
    needs_installation()
    source, raw = tmp_path / "source", nnunet_folders / "raw"
    write_cases(source, 8)
    undisturbed = start(*arguments(source))
    began = time.monotonic()
    said, _ = undisturbed.communicate(timeout=120)
    assert undisturbed.returncode == 0, said
    seconds, whole = time.monotonic() - began, tree(raw)
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(*arguments(source), "--overwrite")
        time.sleep(moments.uniform(0.3, 1) * seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert alive(process.pid) == []
        assert set(tree(raw / "Dataset137_Test")) == {name.partition("/")[2] for name in whole if "/" in name}
    assert cli.main([*arguments(source)[:-1], "0", "--overwrite"]) == 0
    assert tree(raw) == whole


@pytest.mark.parametrize("other", ["brats", "folders"])
def test_two_at_once_into_one_id(nnunet_folders: Path, tmp_path: Path, other: str) -> None:
    """Under two names, so that neither sees the other's folder: one is written, the other refused and says why."""
    needs_installation()
    source = tmp_path / "source"
    write_cases(source, 4)
    both = [start(*arguments(source, "brats", "One")), start(*arguments(source, other, "Two"))]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    (written,) = (nnunet_folders / "raw").glob("Dataset137_*")
    done = next(number for number, process in enumerate(both) if process.returncode == 0)
    assert written.name == f"Dataset137_{('One', 'Two')[done]}"
    assert "another process" in said[1 - done] or "is taken by" in said[1 - done]
    assert [name for name in os.listdir(nnunet_folders / "raw") if name.endswith(".tmp")] == []
