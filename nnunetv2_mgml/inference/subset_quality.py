"""What a model folder says of its own quality per subset (``subset_report.json``), for predictions to quote.

`scoring.subset_report` writes it from an evaluation. Importing this module imports neither torch nor nnU-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import subset_name

REPORT_NAME = "subset_report.json"
RELIABILITY_BOUND = 0.5
"""Expected Dice below which a region is called unreliable: fewer voxels right than wrong."""


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
    content = _stored(Path(model_folder))
    if content is None:
        return None
    try:
        found: dict[str, dict[str, Any]] | None = content["subsets"].get(subset_name(subset, content["channels"]))
    except ValueError as error:
        raise _damaged(Path(model_folder), str(error)) from error
    return found


def _stored(model_folder: Path) -> dict[str, Any] | None:
    """Read the stored report, checked; None where there is none."""
    path = model_folder / REPORT_NAME
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except (ValueError, OSError) as error:
        raise _damaged(model_folder, str(error)) from error
    wrong = _wrong_entry(content)
    if wrong:
        raise _damaged(model_folder, f"'{wrong}' is missing or of another kind")
    return dict(content)


def _damaged(model_folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"{model_folder / REPORT_NAME} is damaged or of another model ({reason}). Write it again with 'mgml evaluate "
        f"--write_subset_report', or delete it."
    )


def _wrong_entry(content: Any) -> str:
    """Name the first entry that is not what `scoring.subset_report` writes, or return an empty string."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    def amount(value: Any) -> bool:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value))

    if not isinstance(content, dict):
        return "the file"
    sizes = content.get("min_region_voxels")
    for name, holds in (
        ("channels", texts(content.get("channels"))),
        ("subsets", isinstance(content.get("subsets"), dict)),
        ("folds", content.get("folds") is None or texts(content["folds"])),
        ("checkpoint", content.get("checkpoint") is None or isinstance(content["checkpoint"], str)),
        ("min_region_voxels", sizes is None or (isinstance(sizes, dict) and all(map(amount, sizes.values())))),
    ):
        if not holds:
            return name
    for subset, regions in content["subsets"].items():
        if not isinstance(regions, dict):
            return f"subsets.{subset}"
        for region, entry in regions.items():
            if not isinstance(entry, dict) or not all(n in entry and amount(entry[n]) for n in ("mean", "sd", "n")):
                return f"subsets.{subset}.{region}"
    return ""


def quality_terms(model_folder: Path | str, bound: float = RELIABILITY_BOUND) -> dict[str, Any]:
    """Return what `expected_quality` and `unreliable_regions` rest on, for a prediction's report.

    Returns:
        ``reliability_bound`` (Dice as a fraction) and, of the stored evaluation, ``policy`` for empty regions,
        ``min_region_voxels`` (region -> N: fewer predicted voxels counted as empty), ``shared_preprocessing``,
        ``folds``, ``checkpoint``, ``mirroring``.

    Raises:
        FileNotFoundError, ValueError: no stored report, or a damaged one.
    """
    content = _stored(Path(model_folder))
    if content is None:
        raise FileNotFoundError(f"{Path(model_folder) / REPORT_NAME} does not exist.")
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
        f"{_made_with(Path(model_folder))}"
    )


def _made_with(model_folder: Path) -> str:
    """Say which weights and rules the report is of: predictions may use others."""
    content = _stored(model_folder) or {}
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
