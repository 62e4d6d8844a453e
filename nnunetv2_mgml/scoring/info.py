"""What ``summary.json`` says of an evaluation beside its scores: from which files, by which model and versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import nnunetv2_mgml

_LIBRARIES = ("nnunetv2", "torch", "numpy", "scipy", "pandas", "SimpleITK", "panoptica")


@dataclass(frozen=True)
class Source:
    """Where the cases of an evaluation came from; None for what does not apply or is not known."""

    kind: str | None = None
    """``predictions`` (finished label maps), ``folder`` or ``validation`` (predicted by a model)."""
    dataset: str | None = None
    """Name of the data set whose validation cases these are."""
    folds: tuple[str, ...] | None = None
    """Folds whose validation cases these are."""
    images: Path | None = None
    """Folder of ``<case>_XXXX<ending>``; not known where dataset.json lists the files one by one."""
    labels: Path | None = None
    """Folder of reference label maps ``<case><ending>``."""
    folders: dict[str, Path] | None = None
    """Subset name -> folder of finished predictions ``<case><ending>``."""


@dataclass(frozen=True)
class EvaluatedModel:
    """The model an evaluation ran, and how; None for what an older version did not say."""

    folder: Path | None = None
    """``TRAINER__PLANS__CONFIGURATION``."""
    folds: tuple[str, ...] | None = None
    checkpoint: str | None = None
    """File name in the folds' folders."""
    checkpoint_size_and_time_ns: tuple[tuple[int, ...], ...] | None = None
    """Size (bytes) and time of change (ns) of each fold's checkpoint."""
    trainer: str | None = None
    mirroring: bool | None = None
    tile_step_size: float | None = None
    """Step of the sliding window, as a share of the patch."""
    cpu_bfloat16: bool | None = None
    shared_preprocessing: bool | None = None


@dataclass(frozen=True)
class EvaluationInfo:
    """Everything of ``summary.json`` that is neither a score nor needed to read one."""

    min_region_voxels: dict[str, int] = field(default_factory=dict)
    """Region -> N: a predicted region of fewer than N voxels counted as empty."""
    ignore_label: int | None = None
    """Label of reference voxels that count on neither side."""
    command: tuple[str, ...] = ()
    created: str = ""
    """ISO 8601, UTC."""
    versions: dict[str, str] = field(default_factory=dict)
    source: Source = Source()
    model: EvaluatedModel | None = None
    """None for finished predictions."""
    missing_cases: tuple[str, ...] = ()
    """Of finished predictions: labelled cases that were left out because a prediction is missing."""
    not_evaluated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a model: case -> subsets it has no data for."""
    folds_of_cases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a model: case -> folds that predicted it."""

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of ``summary.json``, JSON-ready; those that do not apply to the source are left out."""
        names = ["min_region_voxels", "ignore_label", "command", "created", "versions"]
        if self.source != Source():
            names.append("source")
        if self.model is not None:
            names += ["model", "not_evaluated", "folds_of_cases"]
        elif self.source != Source():
            names.append("missing_cases")
        return {name: as_json(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EvaluationInfo:
        """Read what `as_dict` wrote, now or in an older version; keys it does not know are left alone.

        Raises:
            ValueError: a value of another kind; its key is named.
        """
        return typing.cast("EvaluationInfo", _record(cls, content, ""))


def provenance() -> dict[str, Any]:
    """Return what reproduces a run: command line, time, versions (libraries without a version are left out)."""
    versions = {"python": platform.python_version(), "nnunetv2_mgml": nnunetv2_mgml.__version__}
    for package in _LIBRARIES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
    }


def as_json(value: Any) -> Any:
    """Return a value of this module JSON-ready: fields that are None are left out, paths become text."""
    if dataclasses.is_dataclass(value):
        found = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: as_json(entry) for name, entry in found.items() if entry is not None}
    if isinstance(value, dict):
        return {name: as_json(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return [as_json(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _record(kind: type[Any], content: Any, where: str) -> Any:
    """Return a dataclass from a JSON object; fields that are absent or null keep their default."""
    _check(isinstance(content, Mapping), where, content, "an object")
    types = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    given = {f.name: content[f.name] for f in dataclasses.fields(kind) if content.get(f.name) is not None}
    return kind(**{name: _value(types[name], value, f"{prefix}{name}") for name, value in given.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the type of a field, or raise a ValueError naming the field."""
    arguments = typing.get_args(kind)
    if type(None) in arguments:
        return _value(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _record(typing.cast("type[Any]", kind), value, where)
    if typing.get_origin(kind) is tuple:
        _check(isinstance(value, list), where, value, "a list")
        return tuple(_value(arguments[0], entry, where) for entry in value)
    if typing.get_origin(kind) is dict:
        _check(isinstance(value, dict), where, value, "an object")
        return {name: _value(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    known = {str: "a text", Path: "a text", bool: "true or false", int: "a whole number", float: "a number"}
    accepted: Any = {Path: str, float: (int, float)}.get(kind, kind)
    _check(isinstance(value, accepted) and (kind is bool) == isinstance(value, bool), where, value, known[kind])
    return kind(value)


def _check(holds: bool, where: str, value: Any, needed: str) -> None:
    if not holds:
        raise ValueError(f"'{where}' must be {needed}, found {value!r}")
