"""``mgml_prediction.json``: what a prediction was made with, and from which modalities of each case.

Where the model folder holds a ``subset_report.json`` it also says how good the model was on that subset, and which
regions are unreliable there. They are flagged, never dropped.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.files import write_json
from nnunetv2_mgml.modalities import subset_name
from nnunetv2_mgml.subset_report import expected_quality, quality_line, unreliable_regions

REPORT_NAME = "mgml_prediction.json"
_log = logging.getLogger(__name__)


class PredictionReport:
    """Collects one entry per case and writes them beside the predictions.

    Args:
        folder: the output folder.
        model: what to say of the model (folder, folds, checkpoint, trainer, ...).
        channels: the model's modality names in channel order.
        keep: start from the report in the folder, so that a continued prediction describes all cases.
        part_id: with ``num_parts`` > 1 every part writes a file of its own.
        num_parts: number of parts the work is split into.
    """

    def __init__(self, folder: str, model: dict[str, Any], channels: Sequence[str], *, keep: bool = False,
                 part_id: int = 0, num_parts: int = 1) -> None:
        name = REPORT_NAME if num_parts == 1 else f"{Path(REPORT_NAME).stem}_part{part_id}of{num_parts}.json"
        self.path = Path(folder) / name
        self.channels = tuple(channels)
        self.cases: dict[str, dict[str, Any]] = _earlier_cases(self.path) if keep else {}
        self._told: set[tuple[bool, ...]] = set()
        self._head: dict[str, Any] = {
            "versions": {"nnunetv2_mgml": __version__, "python": platform.python_version(),
                         **{package: version(package) for package in ("nnunetv2", "torch", "numpy")}},
            "command": shlex.join(sys.argv), "started": _now(), "model": model, "channels": list(channels)}

    def begin(self, todo: Sequence[str], done: Sequence[str]) -> None:
        """Note the cases to predict, and those skipped because their output is there."""
        self.cases.update({case: {"status": "pending"} for case in todo})
        for case in done:
            self.cases.setdefault(case, {"status": "skipped"})

    def add_item(self, item: dict[str, Any]) -> None:
        """Note what a preprocessed case is predicted from."""
        there = dict(zip(self.channels, item["availability"], strict=True))
        self.cases[item["case"]] = {
            "status": "pending", "present": [name for name in self.channels if there[name]],
            "missing": [name for name in self.channels if not there[name]], "files": item["files"],
            **self._quality(item["availability"])}

    def _quality(self, subset: Sequence[bool]) -> dict[str, Any]:
        """What the model reached on this subset, where its folder says so; told once per subset."""
        folder = self._head["model"].get("folder")
        try:
            expected = None if folder is None else expected_quality(folder, subset)
        except ValueError as error:  # a note that cannot be read must not cost the prediction
            _log.warning("%s", error)
            return {}
        if folder is None or expected is None:
            return {}
        if tuple(subset) not in self._told:
            self._told.add(tuple(subset))
            _log.info("%s: %s", subset_name(subset, self.channels), quality_line(folder, subset))
        return {"expected_dice": expected, "unreliable_regions": unreliable_regions(folder, subset)}

    def finish(self, case: str, error: str | None = None) -> None:
        """Note how a case ended."""
        entry = self.cases.setdefault(case, {})
        entry["status"] = "predicted" if error is None else "failed"
        if error is not None:
            entry["error"] = error

    def save(self) -> None:
        """Write the file. Cases that are still pending were interrupted."""
        write_json(self.path, {**self._head, "finished": _now(), "cases": self.cases})


def _earlier_cases(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["cases"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return {}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
