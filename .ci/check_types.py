"""Run mypy --strict on the package as it is installed: dataset_conversion/ in its place below nnunetv2_mgml/.

Files that are not clean yet stand in ``.ci/types_to_do.txt``. An error in any other file fails; a file on the list that
has become clean is named, to be taken off. ``--update`` writes the list anew, ``--all`` also shows the errors of
the files on it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".mypy_cache"
COPY = CACHE / "installed" / "nnunetv2_mgml"
CONVERSION = "dataset_conversion"
TO_DO = ROOT / ".ci" / "types_to_do.txt"


def messages() -> list[str]:
    """Return mypy's lines about files of the checkout, ``file:line: error: text``."""
    if COPY.exists():
        shutil.rmtree(COPY)
    for source, target in ((ROOT / "nnunetv2_mgml", COPY), (ROOT / CONVERSION, COPY / CONVERSION)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))  # keeps times: mypy's cache holds
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--strict"]
    done = subprocess.run(
        [*command, "--cache-dir", str(CACHE), "--no-error-summary", "--hide-error-context"],
        cwd=COPY.parent,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(COPY.parent)},
    )
    if done.returncode > 1 or done.stderr:
        sys.exit(done.stderr + done.stdout)
    return [
        line.replace("\\", "/").replace(f"nnunetv2_mgml/{CONVERSION}/", f"{CONVERSION}/")
        for line in done.stdout.splitlines()
    ]


def judge(lines: list[str], listed: list[str]) -> tuple[list[str], list[str]]:
    """Return the files that have errors although they are not listed, and the listed ones that have none.

    Args:
        lines: of `messages`.
        listed: files that are not clean yet.
    """
    unclean = {line.partition(":")[0] for line in lines if ": error: " in line}
    return sorted(unclean - set(listed)), sorted(set(listed) - unclean)


def main(arguments: list[str]) -> int:
    """Return 0 where only files on the list have errors."""
    lines = messages()
    if "--update" in arguments:
        TO_DO.write_text("".join(f"{name}\n" for name in judge(lines, [])[0]), encoding="utf-8")
        return 0
    listed = TO_DO.read_text(encoding="utf-8").split()
    worse, clean = judge(lines, listed)
    for line in lines:
        if "--all" in arguments or line.partition(":")[0] not in listed:
            print(line)
    for name in clean:
        print(f"{name}: clean now, take it off {TO_DO.relative_to(ROOT)}")
    print(f"mypy --strict: {len(worse)} files have errors and should not, {len(listed) - len(clean)} are still to do")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
