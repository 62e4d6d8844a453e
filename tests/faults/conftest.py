"""A small file system of its own for the tests of full and read-only disks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conversion_cases import tree


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def leave(self, free: int) -> None:
        """Fill it until this many bytes are free."""
        self._ballast.unlink(missing_ok=True)
        room = os.statvfs(self.folder)
        with open(self._ballast, "wb") as file:
            file.write(b"\1" * max(0, room.f_bavail * room.f_frsize - free))

    def clear(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def writable(self, wanted: bool) -> None:
        """Let it be written to, or not; that also holds for root."""
        mode = "rw" if wanted else "ro"
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.folder)], check=True)

    def files(self) -> dict[str, bytes]:
        """Return what lies on it, hidden things too, but the ballast."""
        return {
            name: (self.folder / name).read_bytes()
            for name in tree(self.folder)
            if name != self._ballast.name and (self.folder / name).is_file()
        }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        sys.platform != "linux"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system can be mounted")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
