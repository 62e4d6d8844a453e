"""`io.files`: what is written is whole or absent, also when a process is killed, a disk full or two write at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunetv2_mgml.io import files
from nnunetv2_mgml.io.files import only_writer, read_json, replacing, replacing_folder, scratch, write_json


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@contextlib.contextmanager
def another(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run code in another process, which is waited for until it prints a line and killed at the end."""
    command = [sys.executable, "-c", f"from nnunetv2_mgml.io import files\n{code}", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
            yield process
        finally:
            process.kill()


HALF_A_FILE = """
import sys, time
with files.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(100)
"""

HALF_A_FOLDER = """
import sys, time
with files.replacing_folder(sys.argv[1]) as folder:
    (folder / "one").write_text("half")
    print("ready", flush=True)
    time.sleep(100)
"""

BETWEEN_THE_RENAMES = """
import os, sys, time
rename = os.rename
def stop(source, target):
    if os.fspath(target) == sys.argv[1]:
        print("ready", flush=True)
        time.sleep(100)
    rename(source, target)
os.rename = stop
with files.replacing_folder(sys.argv[1]) as folder:
    (folder / "one").write_text("new")
"""


@pytest.fixture(autouse=True)
def next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is a run of its own, that has not yet looked for what others left."""
    monkeypatch.setattr(files, "_swept", set())


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.name == path.name  # writers tell the format by it
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_was_not_written_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"), replacing(tmp_path / "gone" / "file"):
        pass


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_text("old")
    with another(HALF_A_FILE, path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_text() == "old"
    assert len(hidden(tmp_path)) == 1
    write_json(tmp_path / "another.json", {})  # any write into this folder
    assert hidden(tmp_path) == []
    assert path.read_text() == "old"


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    with another(HALF_A_FILE, tmp_path / "file"):
        write_json(tmp_path / "file", {"whole": True})
        assert len(hidden(tmp_path)) == 1
    assert read_json(tmp_path / "file") == {"whole": True}


def test_killed_before_the_lock_or_amid_the_removal(tmp_path: Path) -> None:
    (tmp_path / ".mgml_0123abcd.tmp").mkdir()
    (tmp_path / ".mgml_0123abce.tmp").mkdir()
    (tmp_path / ".mgml_0123abce.tmp" / ".lock").touch()
    (tmp_path / ".mgml_strangers.tmp").mkdir()
    write_json(tmp_path / "file", {})
    assert hidden(tmp_path) == [".mgml_strangers.tmp"]


def test_a_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be told from a living process's files then, so nothing is removed; writing works all the same."""
    left = tmp_path / ".mgml_0123abcd.tmp"
    left.mkdir()
    (left / ".lock").touch()
    monkeypatch.setattr(files, "_try_lock", lambda file: None)
    write_json(tmp_path / "file", {})
    with replacing_folder(tmp_path / "folder"):
        pass
    assert sorted(os.listdir(tmp_path)) == [left.name, "file", "folder"]


def test_a_scratch_folder_that_is_swept_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, times = files._try_lock, []

    def swept_once(file: int) -> bool | None:
        times.append(file)
        if len(times) == 1:
            [folder] = tmp_path.glob(".mgml_*")
            (folder / ".lock").unlink()
            folder.rmdir()
        return lock(file)

    monkeypatch.setattr(files, "_try_lock", swept_once)
    with scratch(tmp_path) as folder:
        assert os.listdir(folder) == []
    assert len(times) == 2


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "Dataset001_A"
    for content in ("first", "second"):
        with replacing_folder(path) as folder:
            (folder / content).write_text(content)
        assert os.listdir(path) == [content]

    def write_half() -> None:
        with replacing_folder(path) as folder:
            (folder / "third").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert os.listdir(path) == ["second"]
    assert os.listdir(tmp_path) == [path.name]


def test_a_killed_process_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    (path / "one").write_text("old")
    with another(HALF_A_FOLDER, path) as process:
        with pytest.raises(ValueError, match=r"data is being written by another process.* Wait"):
            replacing_folder(path).__enter__()
        process.kill()
        process.wait()
    assert (path / "one").read_text() == "old"
    with replacing_folder(path) as folder:
        (folder / "one").write_text("new")
    assert (path / "one").read_text() == "new"
    assert os.listdir(tmp_path) == [path.name]


def test_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    (path / "one").write_text("old")
    with another(BETWEEN_THE_RENAMES, path) as process:
        assert not path.exists()
        process.kill()
        process.wait()
    write_json(tmp_path / "another.json", {})
    assert (path / "one").read_text() == "old"
    assert [name for name in hidden(tmp_path) if name != ".data.lock"] == []


def test_a_failed_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "data", os.rename
    path.mkdir()
    (path / "one").write_text("old")

    def full(source: Path, target: Path) -> None:
        if target == path and source.name == "new":
            raise OSError("no space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="no space"), replacing_folder(path):
        pass
    assert (path / "one").read_text() == "old"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with only_writer(tmp_path / "a"):
        with pytest.raises(ValueError, match="another process"), only_writer(tmp_path / "a"):
            pass
        with only_writer(tmp_path / "b"):
            pass
    with only_writer(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_numbers_json_cannot_hold_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "file.json", {1: float("nan"), "b": [float("inf"), 2.5]})
    assert read_json(tmp_path / "new" / "file.json") == {"1": None, "b": [None, 2.5]}


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json does not exist"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")
