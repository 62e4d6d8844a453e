"""Reads the page of ``mgml report`` as a browser would: tags, texts, what it would fetch, the viewer's sprites."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Collects tags with attributes, checks nesting, and keeps texts by the tag they are in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]

    def viewer(self) -> dict[str, Any]:
        """The viewer's data as the script will read it."""
        index = next(i for i, (t, a) in enumerate(self.tags) if a.get("id") == "viewer-data")
        assert self.tags[index][1]["type"] == "application/json"
        return json.loads(next(text for tag, text in self.texts if tag == "script" and text.startswith("{")))


def assert_self_contained(text: str) -> Page:
    """Nothing in the page may be fetched from anywhere."""
    page = Page(text)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
    assert not page.find("iframe") + page.find("object") + page.find("embed")
    styles = " ".join(t for tag, t in page.texts if tag == "style")
    scripts = " ".join(t for tag, t in page.texts if tag == "script" and not t.startswith("{"))
    assert not re.search(r"@import|url\(", styles)
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest|import\(|eval\(|innerHTML", scripts)
    [policy] = [a["content"] for a in page.find("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    return page


def decode(uri: str) -> np.ndarray:
    head, _, body = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(body))))


def tiles(case: dict[str, Any], uri: str) -> np.ndarray:
    """Cut a sprite as viewer.js does, ``(n, y, x)``."""
    sheet = decode(uri)
    result = []
    for index in range(len(case["slices"])):
        top = index // case["columns"] * case["tileHeight"]
        left = index % case["columns"] * case["tileWidth"]
        result.append(sheet[top : top + case["height"], left : left + case["width"]])
    return np.array(result)
