"""Run mypy --strict on the package as it is installed: dataset_conversion/ in its place below nnunetv2_mgml/."""

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


def main() -> int:
    """Print what is wrong; return 0 where nothing is."""
    lines = messages()
    print("\n".join([*lines, f"mypy --strict: {sum(': error: ' in line for line in lines)} errors"]))
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
