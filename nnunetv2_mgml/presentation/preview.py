"""``--preview``: one PNG per predicted case, from ``mgml_prediction.json`` and the files it names."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.io.targets import PREVIEW, is_current
from nnunetv2_mgml.presentation.figures.preview import preview_sheet
from nnunetv2_mgml.presentation.figures.slices import knows_sides, read_axial, telling_slice
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.presentation.report.sheets import names_of_values
from nnunetv2_mgml.scoring.regions import label_set, short_names

FOLDER = PREVIEW
_log = logging.getLogger(__name__)


def without_preview(folder: Path, cases: Sequence[str], ending: str) -> list[str]:
    """Return the cases of an output folder whose picture is not there, or older than their segmentation."""
    return [case for case in cases if not is_current(folder / FOLDER / f"{case}.png", folder / f"{case}{ending}")]


def write_previews(
    report: Path, dataset_json: Mapping[str, Any], cases: Sequence[str] | None = None
) -> tuple[list[Path], dict[str, str]]:
    """Draw the predicted cases of a report into ``preview/CASE.png`` beside their segmentations.

    A case that cannot be drawn (its images have been moved, say) costs its picture, nothing else.

    Args:
        report: ``mgml_prediction.json`` in the output folder.
        dataset_json: the model's.
        cases: only these.

    Returns:
        The files written, and case -> message of those that could not be drawn.

    Raises:
        ValueError: a report that cannot be read.
    """
    content = read_json(report)
    written, failures = [], {}
    for case, entry in content["cases"].items():
        if entry.get("status") not in ("predicted", "skipped") or (cases is not None and case not in cases):
            continue
        target = report.parent / FOLDER / f"{case}.png"
        try:
            written.append(_draw(case, entry, report.parent, dataset_json, target))
        except (ValueError, OSError, KeyError) as error:
            failures[case] = str(error)
            _log.warning("No preview of %s: %s", case, error)
    return written, failures


def _draw(case: str, entry: Mapping[str, Any], folder: Path, dataset_json: Mapping[str, Any], target: Path) -> Path:
    segmentation, spacing = read_axial(folder / f"{case}{dataset_json['file_ending']}")
    segmentation = segmentation.astype(np.int64)
    index = telling_slice(segmentation)
    files = entry.get("files", {})
    images = {name: read_axial(file)[0][index] for name, file in files.items() if name in entry["present"]}
    if not images:
        raise ValueError("its report names no image files.")
    regions = label_set(dict(dataset_json)).regions
    names, titles = names_of_values(regions), short_names(regions)
    oriented = knows_sides(f"{case}{dataset_json['file_ending']}")
    millilitres = float(np.prod(spacing)) / 1000
    counts = {name: np.isin(segmentation, labels).sum() for name, labels in regions.items()}
    volumes = [
        f"{titles[name]} {count * millilitres:.1f} ml" if oriented else f"{titles[name]} {count} voxels"
        for name, count in counts.items()
    ]
    missing = f", without {', '.join(entry['missing'])}" if entry["missing"] else ""
    lines = [
        f"Segmented: {', '.join(volumes)}.",
        *quality_lines(entry),
    ]
    width = max(70, 34 * len(images))
    figure = preview_sheet(
        images,
        segmentation[index],
        names,
        title=f"{case}: from {', '.join(entry['present'])}{missing} (slice {index + 1} of {len(segmentation)})",
        notes="\n".join(wrapped(line, width) for line in lines),
        pixel_aspect=spacing[1] / spacing[2],
        oriented=oriented,
    )
    return save(figure, target, dpi=130)


def wrapped(line: str, width: int) -> str:
    """Break a line after commas and colons where that is enough, so that a region's numbers stay together."""
    rows: list[str] = []
    for part in re.split(r"(?<=[,:]) ", line):
        if rows and len(rows[-1]) + 1 + len(part) <= width:
            rows[-1] += f" {part}"
        else:
            rows.append(part)
    return "\n".join(textwrap.fill(row, width) for row in rows)


def quality_lines(entry: Mapping[str, Any]) -> list[str]:
    """Return what a case's entry in the report says of its quality, as sentences."""
    expected = entry.get("expected_dice")
    if not expected:
        return ["Quality: not known (the model folder holds no subset_report.json)."]
    parts = []
    estimated = entry.get("estimated_dice") or {}
    titles = short_names({**expected, **estimated, **dict.fromkeys(entry.get("unreliable_regions") or [])})
    volumes = entry.get("expected_volume_error_ml") or {}
    for region, values in expected.items():
        if values["mean"] is None:
            parts.append(f"{titles[region]} unknown")
            continue
        error = volumes.get(region, {}).get("mean")
        spread = "" if values["sd"] is None else f" ± {values['sd']:.2f}"
        parts.append(
            f"{titles[region]} {values['mean']:.2f}{spread}" + ("" if error is None else f" (± {error:.1f} ml)")
        )
    lines = [f"Dice of validation cases with these sequences: {', '.join(parts)}."]
    if estimated:
        doubtful = entry.get("doubtful_regions") or []
        told = [
            f"{titles[region]} {value['estimate']:.2f}"
            + ("" if value["low"] is None else f" ({value['low']:.2f} to {value['high']:.2f})")
            + (" doubtful" if region in doubtful else "")
            for region, value in estimated.items()
        ]
        lines.append(f"Estimated for this case: {', '.join(told)}.")
    if entry.get("unreliable_regions"):
        lines.append(
            f"Unreliable from these sequences: {', '.join(map(titles.__getitem__, entry['unreliable_regions']))}."
        )
    return lines
