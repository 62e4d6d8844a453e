"""What a model folder says of its own quality per subset (``subset_report.json``), for predictions to quote.

`scoring.subset_report` writes it from an evaluation. Importing this module imports neither torch nor nnU-Net.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_mgml.modalities import subset_name

REPORT_NAME = "subset_report.json"
CARRIER = "dataset_fingerprint.json"
"""A file of the model folder that nnU-Net exports and installs with a model, and never reads there. It carries a copy
of the report, under `CARRIED_KEY`, since ``nnUNetv2_export_model_to_zip`` leaves `REPORT_NAME` out."""
CARRIED_KEY = "mgml_subset_report"
RELIABILITY_BOUND = 0.5
"""Expected Dice below which a region is called unreliable: fewer voxels right than wrong."""


def stored_report(model_folder: Path | str) -> tuple[Path, dict[str, Any]] | None:
    """Return the report of a model folder and the file it is from: its own, or the copy that travelled with the model.

    Raises:
        ValueError: the report is damaged; the message names it and says what to do.
    """
    path = Path(model_folder) / REPORT_NAME
    try:
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            path = Path(model_folder) / CARRIER
            if not path.is_file():
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
            content = content.get(CARRIED_KEY) if isinstance(content, dict) else None
            if content is None:
                return None
        wrong = _wrong_entry(content)
        if wrong:
            raise TypeError(f"'{wrong}' is missing or of another kind")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, OSError) as error:
        raise damaged(path, error) from error
    return path, content


def _wrong_entry(content: Any) -> str:
    """Name the first entry that is not what `scoring.subset_report` writes, or return an empty string."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    def amount(value: Any) -> bool:
        return value is None or (type(value) in (int, float) and abs(value) < math.inf)

    if not isinstance(content, dict):
        return "the report"
    sizes = content.get("min_region_voxels")
    for name, holds in (
        ("channels", texts(content.get("channels"))),
        ("folds", content.get("folds") is None or texts(content["folds"])),
        ("checkpoint", content.get("checkpoint") is None or isinstance(content["checkpoint"], str)),
        ("min_region_voxels", sizes is None or (isinstance(sizes, dict) and all(map(amount, sizes.values())))),
    ):
        if not holds:
            return name
    for name in ("subsets", "absolute_volume_error_ml"):
        subsets = content.get(name)
        if subsets is None and name != "subsets":
            continue
        if not isinstance(subsets, dict):
            return name
        for subset, regions in subsets.items():
            entries = list(regions.values()) if isinstance(regions, dict) else [None]
            if not all(
                isinstance(e, dict) and all(n in e and amount(e[n]) for n in ("mean", "sd", "n")) and e["n"] is not None
                for e in entries
            ):
                return f"{name}.{subset}"
    return ""


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for a report that cannot be used; to be rid of it, its copy has to go as well."""
    copy = f"the entry {CARRIED_KEY} of {CARRIER}"
    both = f"it and {copy} beside it, where there is one" if path.name == REPORT_NAME else copy
    return ValueError(
        f"{path} is damaged or of another model ({error}). Write it again with 'mgml evaluate "
        f"--write_subset_report', or delete {both}."
    )


def expected_quality(model_folder: Path | str, subset: Sequence[bool]) -> dict[str, dict[str, Any]] | None:
    """Return what the model reached on a subset in its stored evaluation.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        subset: ``M`` bools in the model's channel order.

    Returns:
        region -> ``{"mean": Dice as a fraction or None, "sd": fraction or None, "n": cases}``; None when nothing is
        stored for this subset.

    Raises:
        ValueError: the stored report is damaged or of another number of modalities.
    """
    stored = stored_report(model_folder)
    if stored is None:
        return None
    path, content = stored
    try:
        name = subset_name(subset, content["channels"])
        found: dict[str, dict[str, Any]] | None = content["subsets"].get(name)
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from error


def expected_volume_error(model_folder: Path | str, subset: Sequence[bool]) -> dict[str, dict[str, Any]] | None:
    """Return the absolute volume error of a subset in the stored evaluation, shaped as `expected_quality`, in ml.

    None where nothing is stored: reports written before 0.2 have no volumes.
    """
    stored = stored_report(model_folder)
    if stored is None:
        return None
    volumes = stored[1].get("absolute_volume_error_ml") or {}
    found: dict[str, dict[str, Any]] | None = volumes.get(subset_name(subset, stored[1]["channels"]))
    return found


def quality_terms(model_folder: Path | str, bound: float = RELIABILITY_BOUND) -> dict[str, Any]:
    """Return what `expected_quality` and `unreliable_regions` rest on, for a prediction's report.

    Returns:
        ``reliability_bound`` (Dice as a fraction) and, of the stored evaluation, ``policy`` for empty regions,
        ``min_region_voxels`` (region -> N: fewer predicted voxels counted as empty), ``shared_preprocessing``,
        ``folds``, ``checkpoint``, ``mirroring``.

    Raises:
        FileNotFoundError, ValueError: no stored report, or a damaged one.
    """
    stored = stored_report(model_folder)
    if stored is None:
        raise FileNotFoundError(f"{model_folder} holds no {REPORT_NAME}.")
    content = stored[1]
    names = ("policy", "min_region_voxels", "shared_preprocessing", "folds", "checkpoint", "mirroring")
    return {"reliability_bound": bound, **{name: content.get(name) for name in names}}


def unreliable_regions(model_folder: Path | str, subset: Sequence[bool], bound: float = RELIABILITY_BOUND) -> list[str]:
    """Return the regions whose expected Dice is below ``bound`` (or was never defined); none when nothing is stored."""
    expected = expected_quality(model_folder, subset) or {}
    return [region for region, entry in expected.items() if entry["mean"] is None or entry["mean"] < bound]


def quality_line(model_folder: Path | str, subset: Sequence[bool], bound: float = RELIABILITY_BOUND) -> str | None:
    """Return one line for the log: expected Dice per region, unreliable ones marked; None when nothing is stored."""
    expected = expected_quality(model_folder, subset)
    if expected is None:
        return None
    weak = set(unreliable_regions(model_folder, subset, bound))
    parts = []
    for region, entry in expected.items():
        value = "unknown" if entry["mean"] is None else f"{entry['mean']:.2f}"
        spread = "" if entry["sd"] is None else f" ± {entry['sd']:.2f}"
        parts.append(f"{region} {value}{spread}" + (f" (unreliable, below {bound:g})" if region in weak else ""))
    counts = {entry["n"] for entry in expected.values()}
    return (
        f"expected Dice: {', '.join(parts)}; over {' to '.join(map(str, sorted(counts)))} cases"
        f"{_made_with(model_folder)}"
    )


def _made_with(model_folder: Path | str) -> str:
    """Say which weights and rules the report is of: predictions may use others."""
    stored = stored_report(model_folder)
    content: dict[str, Any] = {} if stored is None else stored[1]
    parts = []
    if content.get("folds"):
        parts += [f"fold {', '.join(content['folds'])}", str(content.get("checkpoint"))]
        parts += [] if content.get("mirroring") else ["without mirroring"]
        parts += ["shared preprocessing"] if content.get("shared_preprocessing") else []
    parts += [
        f"{region} of fewer than {size} voxels counted as empty"
        for region, size in (content.get("min_region_voxels") or {}).items()
    ]
    return f" ({', '.join(parts)})" if parts else ""
