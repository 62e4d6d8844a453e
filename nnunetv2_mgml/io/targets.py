"""Where a command may write: never over what it reads, over what is there only when asked to, and nothing in vain."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNCERTAINTY, PREVIEW = "uncertainty", "preview"
"""Folders beside segmentations, of what is made from them: ``uncertainty/CASE<ending>``, ``preview/CASE.png``."""


def check_output_file(path: Path, *, overwrite: bool, reads: Iterable[Path] = ()) -> None:
    """Raise unless a file may be written.

    Args:
        path: the file.
        overwrite: whether one that is there may be replaced.
        reads: files it is made from; they are never replaced.

    Raises:
        FileExistsError: it is there.
        ValueError: it is a folder, or one of the files it is made from.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Name the file to write with -o, such as {path / 'FILE'}.")
    for source in reads:
        if is_same(path, source):
            raise ValueError(f"-o {path} is what is read ({source}) and would be lost. Give another name.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Give another name, or --overwrite.")


def is_current(made: Path, source: Path) -> bool:
    """Return whether a file is there and no older than the one it is made from."""
    return made.is_file() and made.stat().st_mtime_ns >= source.stat().st_mtime_ns


def is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths are one file or folder, by whatever names and links."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return Path(one).resolve() == Path(other).resolve()


@contextmanager
def removing_if_empty(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Remove a folder, and those above it, that were made meanwhile and hold nothing in the end."""
    place = Path(folder).absolute()
    absent = [path for path in (place, *place.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in absent:
            with contextlib.suppress(OSError):  # something is in it, or it was never made
                path.rmdir()
