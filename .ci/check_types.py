"""Run mypy --strict on the package as it is installed: dataset_conversion/ in its place below nnunetv2_mgml/.

Files that are not clean yet stand in ``.ci/types_to_do.txt``. An error in any other file fails, and so does a file on
the list that has become clean: take it off. ``--update`` writes the list anew, ``--all`` also shows the errors of the
files on it.
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


def judge(lines: list[str], listed: list[str], everything: bool = False) -> tuple[list[str], str]:
    """Return the lines to show, and what is wrong; the latter is empty where nothing is.

    Args:
        lines: of `messages`.
        listed: files that are not clean yet.
        everything: show the lines about those too.
    """
    unclean = {line.partition(":")[0] for line in lines if ": error: " in line}
    shown = [line for line in lines if everything or line.partition(":")[0] not in listed]
    wrong = [f"{name}: mypy --strict finds errors" for name in sorted(unclean - set(listed))]
    wrong += [f"{name}: clean now, take it off {TO_DO.relative_to(ROOT)}" for name in listed if name not in unclean]
    return shown, "\n".join(wrong)


def main(arguments: list[str]) -> int:
    """Return 0 where only files on the list have errors, and all of those have."""
    lines = messages()
    if "--update" in arguments:
        TO_DO.write_text(
            "".join(f"{name}\n" for name in sorted({li.partition(":")[0] for li in lines})), encoding="utf-8"
        )
        return 0
    listed = TO_DO.read_text(encoding="utf-8").split()
    shown, wrong = judge(lines, listed, "--all" in arguments)
    result = wrong or f"mypy --strict: clean but for the {len(listed)} files in {TO_DO.relative_to(ROOT)}"
    print(*shown, result, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
