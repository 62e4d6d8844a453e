"""``subset_report.json`` in a model folder: how good the model was on each subset, for predictions to quote.

Written from an evaluation, read by prediction. Importing this module imports neither torch nor nnU-Net nor pandas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_mgml.files import write_json
from nnunetv2_mgml.modalities import channel_names, subset_name

if TYPE_CHECKING:
    from nnunetv2_mgml.evaluation.results import Evaluation

REPORT_NAME = "subset_report.json"
RELIABILITY_BOUND = 0.5
"""Expected Dice below which a region is called unreliable: fewer voxels right than wrong."""
_METRIC = "dice"


def write_subset_report(evaluation: Evaluation, model_folder: Path | str) -> Path:
    """Store mean Dice, spread and number of cases per subset and region in the model folder.

    Args:
        evaluation: with the metric ``dice``; of validation cases, or predictions are promised too much.
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the evaluation has no Dice, or is of a model with other modalities.
    """
    folder = Path(model_folder)
    model_json = folder / "dataset.json"
    if not model_json.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no dataset.json.")
    channels = channel_names(json.loads(model_json.read_text(encoding="utf-8")))
    if channels != tuple(evaluation.channels):
        raise ValueError(f"The evaluation is of modalities {', '.join(evaluation.channels)}, the model of "
                         f"{', '.join(channels)}.")
    if _METRIC not in evaluation.metrics:
        raise ValueError(f"The evaluation has no {_METRIC}; evaluate with --metrics {_METRIC} (or the default).")
    summaries = {region: evaluation.summary(_METRIC, region) for region in evaluation.region_names}
    model = evaluation.info.get("model") or {}
    content = {
        "folds": model.get("folds"), "checkpoint": model.get("checkpoint"), "mirroring": model.get("mirroring"),
        "metric": _METRIC, "policy": evaluation.policy, "channels": list(channels),
        "number_of_cases": len(evaluation.cases), "evaluated": evaluation.info.get("source"),
        "created": evaluation.info.get("created"), "versions": evaluation.info.get("versions"),
        "subsets": {name: {region: _finite(summaries[region][name]) for region in summaries}
                    for name in evaluation.subset_names}}
    path = folder / REPORT_NAME
    write_json(path, content)
    return path


def _finite(entry: dict[str, float]) -> dict[str, float | None]:
    return {key: None if value != value else value for key, value in entry.items()}


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
    path = Path(model_folder) / REPORT_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name = subset_name(subset, content["channels"])
        return content["subsets"].get(name)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another model ({error}). Write it again with 'mgml evaluate "
                         f"--write_subset_report', or delete it.") from error


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
    return (f"expected Dice: {', '.join(parts)}; over {' to '.join(map(str, sorted(counts)))} cases"
            f"{_made_with(Path(model_folder) / REPORT_NAME)}")


def _made_with(path: Path) -> str:
    """Say which weights the report is of: predictions may use others."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not content.get("folds"):
        return ""
    mirroring = "" if content.get("mirroring") else ", without mirroring"
    return f" (fold {', '.join(content['folds'])}, {content['checkpoint']}{mirroring})"
