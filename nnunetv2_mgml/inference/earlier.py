"""What earlier runs say of the predictions in an output folder, and whether a run may go on with them.

Each run, or part of one, has a report of its own (`report`); of a case the run that began last counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnunetv2_mgml.inference.inputs import parse_missing
from nnunetv2_mgml.io.prediction_reports import read_reports
from nnunetv2_mgml.io.targets import is_same

_KEPT = ("predicted", "skipped")
_WEIGHTS = "checkpoint_size_and_time_ns"
"""By fold: how a file of weights is known that another training has replaced."""
_DECIDING = (
    "folder",
    "folds",
    "checkpoint",
    _WEIGHTS,
    "trainer",
    "missing_modalities",
    "tile_step_size",
    "use_mirroring",
    "cpu_bfloat16",
)
"""Settings that make another prediction. ``device`` and ``backend`` are left out: they are equal up to rounding, and an
evaluation is resumed on another device as well."""


class _Known(NamedTuple):
    entry: dict[str, Any]
    model: dict[str, Any]


class Earlier:
    """The reports in an output folder; what is damaged tells nothing.

    Args:
        folder: it need not exist; None: there is nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = folder
        self._cases: dict[str, _Known] = {}
        for content in [] if folder is None else read_reports(Path(folder)):
            model = content.get("model")
            for case, entry in content["cases"].items():
                if isinstance(entry, dict):
                    self._cases[case] = _Known(entry, model if isinstance(model, dict) else {})

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        """Case -> its entry."""
        return {case: known.entry for case, known in self._cases.items()}

    @property
    def unfinished(self) -> set[str]:
        """Cases that the last run meant to predict and did not: a segmentation that is there is of a run before."""
        return {case for case, known in self._cases.items() if known.entry.get("status") in ("pending", "failed")}

    def refuse_other_settings(self, model: Mapping[str, Any], channels: Sequence[str], kept: Collection[str]) -> None:
        """Raise where a report would say of segmentations that are kept what does not hold of them.

        Args:
            model: what the new report says of the model.
            channels: the model's modality names in channel order.
            kept: cases that are not predicted again.

        Raises:
            ValueError: a case was predicted with other settings; the message names them.
        """
        for case, known in self._cases.items():
            if case in kept and known.entry.get("status") in _KEPT:
                differences = [
                    _difference(name, known.model[name], model[name])
                    for name in _DECIDING
                    if name in known.model
                    and name in model
                    and not _equal(name, known.model[name], model[name], channels)
                ]
                if differences:
                    raise ValueError(
                        f"{self.folder} holds predictions with other settings (case {case}): "
                        f"{'; '.join(differences)}. Use another output folder, or predict all cases again, without "
                        f"--continue_prediction."
                    )


def _difference(name: str, before: Any, now: Any) -> str:
    if name == _WEIGHTS:
        return "the model's weights have been replaced since"
    return f"{name} was {before!r}, is now {now!r}"


def _equal(name: str, before: Any, now: Any, channels: Sequence[str]) -> bool:
    try:
        if name == "folder":
            return is_same(before, now)
        if name == "folds":
            return sorted(map(str, before)) == sorted(map(str, now))
        if name == _WEIGHTS:  # of other folds it is said that they are others
            return all(before[fold] == now[fold] for fold in before.keys() & now.keys())
        if name == "missing_modalities":
            return parse_missing(before, channels) == parse_missing(now, channels)
    except (TypeError, ValueError, AttributeError, KeyError):  # a damaged report
        return False
    return bool(before == now)
