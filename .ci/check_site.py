"""Check that a built site needs no network: ``python .ci/check_site.py site``.

No page may load a script, style, font, image or frame from another host; links that a reader may follow are fine.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
RELATIONS = {"stylesheet", "preload", "prefetch", "preconnect", "modulepreload", "icon", "manifest", "dns-prefetch"}


class _Page(HTMLParser):
    """Collects what a browser fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `html.parser.HTMLParser`."""
        values = {name: value or "" for name, value in attrs}
        if tag in LOADED:
            self.fetched.append(values.get(LOADED[tag], ""))
        elif tag == "link" and RELATIONS & set(values.get("rel", "").split()):
            self.fetched.append(values.get("href", ""))


def outside(text: str, suffix: str) -> list[str]:
    """Return the addresses on other hosts that a page or style sheet loads."""
    if suffix == ".css":
        fetched = re.findall(r"(?:url\(\s*[\"']?|@import\s+[\"'])([^\"')\s]+)", text)
    else:
        page = _Page()
        page.feed(text)
        fetched = page.fetched
    return [address for address in fetched if re.match(r"(https?:)?//", address)]


def main(folder: str) -> int:
    """Print every address that would be fetched; the exit code is 1 if there is one, or no page."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".html", ".css"))
    found = [f"{path}: {a}" for path in files for a in outside(path.read_text(encoding="utf-8"), path.suffix)]
    if not any(path.suffix == ".html" for path in files):
        found.append(f"{folder}: no page")
    for line in found:
        print(line)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
