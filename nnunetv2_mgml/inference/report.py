"""``mgml_prediction.json``: what a prediction was made with, and from which modalities of each case.

Where the model folder holds a ``subset_report.json`` it also says how good the model was on that subset, which regions
are unreliable there, and how good this very prediction may be (`case_quality`). Regions are flagged, never dropped.
"""

from __future__ import annotations

import logging
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_mgml import __version__
from nnunetv2_mgml.inference.case_quality import Summary, estimates, stored_fit
from nnunetv2_mgml.inference.earlier import Earlier
from nnunetv2_mgml.inference.subset_quality import (
    expected_quality,
    expected_volume_error,
    quality_line,
    quality_terms,
    unreliable_regions,
)
from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.io.prediction_reports import REPORT_NAME, part_name, part_reports, take_out
from nnunetv2_mgml.modalities import subset_name

if TYPE_CHECKING:
    from nnunetv2_mgml.inference.preprocessing import Item

SECONDS_BETWEEN_WRITES = 5.0
"""While cases finish the file is brought up to date at most this often."""

_log = logging.getLogger(__name__)


class PredictionReport:
    """Collects one entry per case and writes them beside the predictions, as they finish and at the end.

    Args:
        folder: the output folder.
        model: what to say of the model (folder, folds, checkpoint, trainer, ...).
        channels: the model's modality names in channel order.
        keep: start from the reports in the folder, so that a continued prediction describes all cases.
        part_id: with ``num_parts`` > 1 every part writes a file of its own, about its own cases.
        num_parts: number of parts the work is split into.
    """

    def __init__(
        self,
        folder: str,
        model: dict[str, Any],
        channels: Sequence[str],
        *,
        keep: bool = False,
        part_id: int = 0,
        num_parts: int = 1,
    ) -> None:
        self.path = Path(folder) / (REPORT_NAME if num_parts == 1 else part_name(part_id, num_parts))
        self.channels = tuple(channels)
        self.cases: dict[str, dict[str, Any]] = Earlier(folder).cases if keep else {}
        self._is_part, self._keep = num_parts > 1, keep
        self._todo: tuple[str, ...] = ()
        self._told: set[tuple[bool, ...]] = set()
        self._written = -math.inf
        self._head: dict[str, Any] = {
            "versions": {
                "nnunetv2_mgml": __version__,
                "python": platform.python_version(),
                **{package: version(package) for package in ("nnunetv2", "torch", "numpy")},
            },
            "command": shlex.join(sys.argv),
            "started": _now(),
            "model": model,
            "channels": list(channels),
        }
        self._fitted = self._fit_of(model.get("folder"))

    @property
    def estimates_quality(self) -> bool:
        """Whether `finish` can make something of a summary of probabilities."""
        return bool(self._fitted)

    @staticmethod
    def _fit_of(folder: str | None) -> dict[str, Any]:
        try:
            return {} if folder is None else stored_fit(folder)
        except (ValueError, OSError) as error:  # must not cost the prediction
            _log.warning("%s", error)
            return {}

    def begin(self, todo: Sequence[str], done: Sequence[str]) -> None:
        """Note the cases to predict, and those skipped because their output is there, and write that down.

        A run that is killed at once is thus known to have meant to replace what is there. Other reports in the folder
        then say nothing more of what this run replaces.
        """
        self._todo = tuple(todo)
        if self._is_part:
            self.cases = {case: entry for case, entry in self.cases.items() if case in {*todo, *done}}
        self.cases.update({case: {"status": "pending"} for case in todo})
        for case in done:
            entry = self.cases.setdefault(case, {"status": "skipped"})
            if entry.get("status") == "pending":  # interrupted after its segmentation was written
                entry["status"] = "skipped"
            elif entry.get("status") == "failed":  # the segmentation is of an earlier run
                self.cases[case] = {"status": "skipped"}
        self._try_to_write()
        self._written = -math.inf
        self._correct_others()

    def _correct_others(self) -> None:
        """Delete the reports of parts where everything is predicted anew; a part takes its own cases out of the others.

        It does so at both ends of its run: meanwhile another part may write what it has read before.
        """
        folder = self.path.parent
        try:
            if self._is_part:
                for file in (folder / REPORT_NAME, *part_reports(folder)):
                    if file != self.path and file.is_file():
                        take_out(file, self._todo)
            elif not self._keep:
                for file in part_reports(folder):
                    file.unlink(missing_ok=True)
        except OSError as error:  # must not cost the prediction
            _log.warning("%s", error)

    def add_item(self, item: Item) -> None:
        """Note what a preprocessed case is predicted from."""
        there = dict(zip(self.channels, item.available, strict=True))
        self.cases[item.case] = {
            "status": "pending",
            "present": [name for name in self.channels if there[name]],
            "missing": [name for name in self.channels if not there[name]],
            "files": item.files,
            **self._quality(item.available),
        }

    def _quality(self, subset: Sequence[bool]) -> dict[str, Any]:
        """What the model reached on this subset, where its folder says so; told once per subset."""
        folder = self._head["model"].get("folder")
        try:
            expected = None if folder is None else expected_quality(folder, subset)
            if folder is None or expected is None:
                return {}
            if tuple(subset) not in self._told:
                self._told.add(tuple(subset))
                _log.info("%s: %s", subset_name(subset, self.channels), quality_line(folder, subset))
                self._head["expected_dice_from"] = quality_terms(folder)
            volumes = expected_volume_error(folder, subset)
            return {
                "expected_dice": expected,
                **({} if volumes is None else {"expected_volume_error_ml": volumes}),
                "unreliable_regions": unreliable_regions(folder, subset),
            }
        except (ValueError, OSError) as error:  # a note that cannot be read must not cost the prediction
            _log.warning("%s", error)
            return {}

    def finish(self, case: str, error: str | None = None, summary: Summary | None = None) -> None:
        """Note how a case ended and, from what its probabilities say, how good it may be."""
        entry = self.cases.setdefault(case, {})
        entry["status"] = "predicted" if error is None else "failed"
        if summary is not None and "present" in entry:
            subset = [name in entry["present"] for name in self.channels]
            found = estimates(self._fitted, subset, self.channels, summary)
            entry.update(found)
            if found:
                _log.info("%s: %s", case, estimate_line(found))
        if error is not None:
            entry["error"] = error
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._try_to_write()

    def save(self) -> None:
        """Write the file for the last time. Cases that are still pending were interrupted.

        Raises:
            OSError: it cannot be written; it names the file.
        """
        self._write(_now())
        if self._is_part:
            self._correct_others()

    def _try_to_write(self) -> None:
        try:
            self._write(None)
        except OSError as error:  # must not cost the prediction; `save` tries again, and raises
            _log.warning("%s", error)
            self._written = time.monotonic()

    def _write(self, finished: str | None) -> None:
        write_json(self.path, {**self._head, "finished": finished, "cases": self.cases})
        self._written = time.monotonic()


def estimate_line(found: dict[str, Any]) -> str:
    """Return what `estimates` found in one line, for the log."""
    parts = []
    for region, value in found["estimated_dice"].items():
        around = "" if value["low"] is None else f" ({value['low']:.2f} to {value['high']:.2f})"
        doubt = ", doubtful" if region in found["doubtful_regions"] else ""
        parts.append(f"{region} {value['estimate']:.2f}{around}{doubt}")
    return f"estimated Dice of this case: {'; '.join(parts)}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
