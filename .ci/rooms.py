#!/usr/bin/env python3
"""Print the package room by room: files, lines, and the longest file, in the order of the imports."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ORDER = (
    "modalities",
    "io",
    "plans",
    "upstream",
    "phantom",
    "dataset_conversion",
    "dataloading",
    "network",
    "objective",
    "inference",
    "scoring",
    "presentation",
    "workflows",
    "training",
    "ext",
    "commands",
)
"""As tests/project/test_imports.py allows them to import each other."""


def rooms(root: Path = ROOT) -> Iterator[tuple[str, dict[Path, int]]]:
    """Yield room and file -> lines; the files at the package's top but `modalities` come last."""
    package = root / "nnunetv2_mgml"
    for name in ORDER:
        folder = root / name if name == "dataset_conversion" else package / name
        files = [package / f"{name}.py"] if not folder.is_dir() else sorted(folder.rglob("*.py"))
        yield name, _lines(files)
    yield "(top)", _lines(sorted(path for path in package.glob("*.py") if path.stem not in ORDER))


def table(root: Path = ROOT) -> list[str]:
    """Return the table, a line a room, and one of the sums."""
    rows = []
    for name, files in rooms(root):
        longest = max(files, key=lambda file: files[file])
        rows.append((name, len(files), sum(files.values()), f"{longest.relative_to(root).as_posix()} {files[longest]}"))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), ""))
    lines = [f"{'room':<20}{'files':>6}{'lines':>7}  longest file"]
    return lines + [f"{name:<20}{count:>6}{total:>7}  {longest}".rstrip() for name, count, total, longest in rows]


def _lines(files: list[Path]) -> dict[Path, int]:
    return {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
