"""Files and folders that are complete or absent, and JSON (imports nothing but the standard library).

Everything is written into a scratch folder ``.mgml_XXXXXXXX.tmp`` beside its place and renamed once it is complete. A
scratch folder is locked as long as its process lives. The system frees that lock however a process ends and whoever
gets its process id, so what dead processes left behind is known, and goes with the next write into the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SCRATCH = ".mgml_????????.tmp"
_LOCK = ".lock"
_NEW, _REPLACED = "new", "replaced"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "; make room (df -h) and run the command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; the folder must be one you may write to"),
}
"""What to do about an error of the system."""
_swept: set[str] = set()


@contextmanager
def scratch(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder inside ``folder``, hence on the same disk, to write to; it is removed at the end.

    For several files that are then renamed in an order of their own; one file or folder is easier with `replacing` or
    `replacing_folder`.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    place = Path(folder)
    _sweep(place)
    temporary, lock = _locked_folder(place)
    try:
        (temporary / _NEW).mkdir()
        yield temporary / _NEW
    finally:
        os.close(lock)  # before the removal: Windows deletes no open file
        with contextlib.suppress(OSError):
            _remove(temporary)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path, of the same name, to write a file to; it becomes ``path`` if nothing is raised.

    What was written is flushed to the disk first, because some systems report only then that it is full.

    Raises:
        OSError: the disk is full, the folder cannot be written to or does not exist; it names ``path``.
    """
    path = Path(path)
    with naming(path), scratch(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextmanager
def naming(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
    """Let errors of the system about a temporary place, or about no file at all, name the place that is meant.

    Args:
        path: the file or folder that is to be written in the end.
        temporary: what stands for it meanwhile; None for a file of that name in a scratch folder.

    Raises:
        OSError: of the same kind, with advice where there is any.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of ours
            if temporary is None or str(temporary) not in str(error):
                raise
            raise type(error)(str(error).replace(str(temporary), str(path))) from error
        names = [_meant(name, path, temporary) for name in (error.filename, error.filename2)]
        if names == [error.filename, error.filename2] and (names[0] is not None or error.errno not in _ADVICE):
            raise
        told = f"{error.strerror}{_ADVICE.get(error.errno, '')}"
        raise OSError(error.errno, told, names[0] or str(path), None, names[1]) from error


def _meant(name: Any, path: str | os.PathLike[str], temporary: Path | None) -> Any:
    if not isinstance(name, (str, os.PathLike)):
        return name
    if temporary is not None:
        return os.fspath(name).replace(str(temporary), str(path))
    return str(path) if any(Path(part).match(_SCRATCH) for part in Path(name).parts) else name


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to fill; it becomes ``path`` if nothing is raised, in place of the one that is there.

    A kill leaves the old folder or the new one: should it come between the two renames, the next write beside ``path``
    puts the old one back.

    Raises:
        ValueError: another process is filling the same folder.
    """
    path = Path(path)
    with only_writer(path), scratch(path.parent) as new:
        old = new.parent / _REPLACED / path.name
        with naming(path, new):
            yield new
        if path.exists():
            old.parent.mkdir()
            os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise


@contextmanager
def only_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the right to write ``path`` (whose parent exists), which one process at a time has.

    Raises:
        ValueError: another process has it.
    """
    path = Path(path)
    file = path.with_name(f".{path.name}.lock")
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if _try_lock(lock) is False:
            os.close(lock)
            raise ValueError(
                f"{path} is being written by another process at this moment. Wait until it is done, or choose another "
                f"name."
            )
        if _is_at(lock, file):
            break
        os.close(lock)  # removed by the process that had it, between opening and locking
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file; an empty one that stays harms nobody
            file.unlink()
        os.close(lock)


def _locked_folder(place: Path) -> tuple[Path, int]:
    """Return a new scratch folder and the open file that locks it."""
    while True:
        folder = place / _SCRATCH.replace("????????", secrets.token_hex(4))
        folder.mkdir()
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # swept away in between by a process that took it for a dead one's
            if place.is_dir():
                continue
            raise
        if _try_lock(lock) is not False and _is_at(lock, folder / _LOCK):
            return folder, lock
        os.close(lock)


def _sweep(place: Path) -> None:
    """Remove what dead processes left in a folder, once per process."""
    name = os.path.abspath(place)
    if name not in _swept:
        _swept.add(name)
        for folder in place.glob(_SCRATCH):
            with contextlib.suppress(OSError):  # another user's, or another process is sweeping, too
                _clear(folder)


def _clear(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        folder.rmdir()  # killed before it was locked; one that is not empty stays
        return
    try:
        dead = _try_lock(lock) is True
        if dead:
            for old in folder.glob(f"{_REPLACED}/*"):
                if not (folder.parent / old.name).exists():
                    os.rename(old, folder.parent / old.name)
    finally:
        os.close(lock)
    if dead:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a scratch folder, its lock last, so that a removal that is cut off can be gone on with."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    (folder / _LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: int) -> bool | None:
        """Lock an open file; return False where another process has locked it."""
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: int) -> bool | None:
        """Lock an open file; return False where another process has locked it, None where the disk has no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems have none: then nothing is ever taken for a dead process's
            return None
        return True


def link_or_copy(source: Path, target: Path) -> None:
    """Let ``target`` be a link to a file, or a copy of it where no links can be made (Windows, exFAT)."""
    try:
        os.symlink(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON in one step; NaN and infinities become null, because JSON has none."""
    write_text(path, json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if type(value).__module__ == "numpy":
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def file_stamp(path: Path) -> list[int] | None:
    """Return size (bytes) and time of change (ns) of a file, by which a resumed run knows it; None if there is none."""
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
