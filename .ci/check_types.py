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


def main() -> int:
    """Return mypy's exit code; its messages name the files of the checkout."""
    if COPY.exists():
        shutil.rmtree(COPY)
    for source, target in ((ROOT / "nnunetv2_mgml", COPY), (ROOT / CONVERSION, COPY / CONVERSION)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))  # keeps times: mypy's cache holds
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--strict"]
    done = subprocess.run(
        [*command, "--cache-dir", str(CACHE), *sys.argv[1:]],
        cwd=COPY.parent,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(COPY.parent)},
    )
    sys.stdout.write(done.stdout.replace(str(Path("nnunetv2_mgml", CONVERSION)), CONVERSION))
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
