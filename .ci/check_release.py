"""Check that a tag may be released: ``python .ci/check_release.py v0.2.0``. Needs nothing but Python."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what speaks against releasing the checkout under this tag; empty if nothing does."""
    init = (root / "nnunetv2_mgml" / "__init__.py").read_text(encoding="utf-8")
    cited = (root / "CITATION.cff").read_text(encoding="utf-8")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    [version] = re.findall(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, the package's version is {version}: the tag has to be v{version}")
    if f"\nversion: {version}\n" not in cited:
        found.append(f"CITATION.cff does not say 'version: {version}'")
    if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d{{2}}-\d{{2}}$", changes, re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading '## {version} - YYYY-MM-DD'")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/check_release.py TAG")
    sys.exit("\n".join(problems(sys.argv[1])) or 0)
