"""Where a command may write: never over what it reads, and over what is there only when asked to."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


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


def is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths are one file or folder, by whatever names and links."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is not there
        return Path(one).resolve() == Path(other).resolve()
