"""What ``mkdocs build`` adds to the pages in docs/: the generated reference, and CONTRIBUTING, CHANGELOG, SECURITY."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
SHARED = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Files at the top of the repository that are pages of the site as well."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files in docs/."""
    spec = importlib.util.spec_from_file_location("tables", Path(__file__).with_name("tables.py"))
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name, text in tables.pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for name in SHARED:
        text = as_page((ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, name.lower(), content=text))
    return files


def as_page(text: str) -> str:
    """Return a file of the repository's top with its links as they are seen from docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(rf"\]\(({'|'.join(SHARED)})", lambda link: f"]({link[1].lower()}", text)
