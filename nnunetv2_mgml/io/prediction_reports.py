"""``mgml_prediction.json`` and the reports of parts in a folder of predictions: which there are and what they say.

`inference.report` writes them. Imports nothing but the standard library and `io.files`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import only_writer, read_json, write_json

REPORT_NAME = "mgml_prediction.json"


def part_name(part_id: int, num_parts: int) -> str:
    """Return the name of the report of one part."""
    return f"{Path(REPORT_NAME).stem}_part{part_id}of{num_parts}.json"


def part_reports(folder: Path) -> list[Path]:
    """Return the reports of parts in a folder."""
    return sorted(folder.glob(f"{Path(REPORT_NAME).stem}_part*of*.json"))


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the content of a folder's reports, that the run that began last at the end; damaged ones tell nothing."""
    found = [content for file in (*part_reports(folder), folder / REPORT_NAME) if (content := _content(file))]
    return sorted(found, key=lambda content: str(content.get("started")))


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return case -> what the run that began last says of it; nothing for folders that hold no report."""
    return {
        case: entry
        for content in read_reports(folder)
        for case, entry in content["cases"].items()
        if isinstance(entry, dict)
    }


def take_out(file: Path, cases: Collection[str]) -> None:
    """Let a report say no more of some cases, whose segmentations are replaced; one that says nothing is deleted.

    While another process does the same, nothing happens.

    Raises:
        OSError: it cannot be written.
    """
    with contextlib.suppress(ValueError), only_writer(file):
        content = _content(file)
        kept = {case: entry for case, entry in content.get("cases", {}).items() if case not in cases}
        if not content or len(kept) == len(content["cases"]):
            return
        if kept:
            write_json(file, {**content, "cases": kept})
        else:
            file.unlink(missing_ok=True)


def _content(file: Path) -> dict[str, Any]:
    """Return what a report holds; empty where there is none that can be read."""
    try:
        content = read_json(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("cases"), dict) else {}
