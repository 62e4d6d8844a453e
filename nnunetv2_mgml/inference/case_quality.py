"""How good this very prediction may be: the mean of its subset, moved by how sure its own probabilities are.

Under the network's probabilities p a mask has the expected precision ``sum_mask p / voxels of mask`` and the expected
sensitivity ``sum_mask p / sum p`` (their harmonic mean is its expected Dice). Networks are too sure of themselves, so
neither is taken at its word: the log-odds of both, compared with what the validation cases have from the same subset,
move the subset's mean Dice by weights fitted on those cases (`scoring.case_quality`). What was fitted is the
``case_quality`` of ``subset_report.json`` and travels with the model. Importing this module imports neither torch nor
nnU-Net.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.inference.subset_quality import damaged, stored_report
from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.modalities import subset_name

KEY = "case_quality"
"""In ``subset_report.json``; reports written before 0.2 have none."""
SMALLEST = "min_region_voxels"
"""Of a region's entry: a mask of fewer voxels counted as empty where this was fitted. None or absent: no rule."""
SUMMARY_ENDING = ".probabilities.json"
"""Of the file that an evaluation keeps beside each label map: what `sum_up` found."""
SIGNS = ("expected_precision", "expected_sensitivity")
_VOXELS_AT_ONCE = 2**21
_ODDS_WITHIN = 1e-3
"""Probabilities closer to 0 or 1 than this count as this close: log-odds end somewhere."""

Summary = dict[str, dict[str, float | None]]
"""Region -> ``voxels`` of its mask, `SIGNS` and ``expected_dice`` (None where it is empty).

Expectations are those on the network's grid. What is kept and used has the voxels of the label map, on the image's grid
(`on_image`), as the scores have; files written before counted them on the network's.
"""


def sum_up(logits: NDArray[Any], label_manager: Any) -> Summary:
    """Return what a prediction's probabilities say of its own masks.

    Args:
        logits: ``(heads, z, y, x)`` on the preprocessed grid.
        label_manager: nnU-Net's, of the model.

    Returns:
        Per region of ``dataset.json``, in its order; see `Summary`. Voxels are those of the preprocessed grid.
    """
    regions = _regions(label_manager)
    heads = (
        list(range(len(regions)))
        if label_manager.has_regions
        else [label_manager.all_labels.index(labels[0]) for labels in regions.values()]
    )
    sums = np.zeros((len(regions), 3))  # voxels of the mask, probability inside it, probability everywhere
    planes = max(1, _VOXELS_AT_ONCE // max(1, math.prod(logits.shape[2:])))
    for start in range(0, logits.shape[1], planes):
        part = np.ascontiguousarray(logits[:, start : start + planes], dtype=np.float32)
        p = label_manager.apply_inference_nonlin(part)
        labels = np.asarray(label_manager.convert_probabilities_to_segmentation(p))
        p = np.asarray(p)
        for row, (head, members) in enumerate(zip(heads, regions.values(), strict=True)):
            mask = np.isin(labels, members)
            sums[row] += mask.sum(), p[head][mask].sum(dtype=np.float64), p[head].sum(dtype=np.float64)
    return {region: summary(*row) for region, row in zip(regions, sums.tolist(), strict=True)}


def summary(voxels: float, inside: float, everywhere: float) -> dict[str, float | None]:
    """Return the entry of a region in `Summary` from sums of voxels and of probabilities."""
    if not voxels:
        return {"voxels": 0, **dict.fromkeys((*SIGNS, "expected_dice"))}
    return {
        "voxels": int(voxels),
        "expected_precision": inside / voxels,
        "expected_sensitivity": inside / max(everywhere, 1e-12),
        "expected_dice": 2 * inside / (voxels + everywhere),
    }


def on_image(found: Summary, segmentation: NDArray[Any], label_manager: Any) -> Summary:
    """Return a summary with the voxels that the label map has on the image's grid.

    Args:
        found: of `sum_up`.
        segmentation: ``(z, y, x)`` integers, as written.
        label_manager: nnU-Net's, of the model.
    """
    counts = np.bincount(segmentation.ravel())
    told = {}
    for region, members in _regions(label_manager).items():
        voxels = int(counts[[label for label in members if label < len(counts)]].sum())
        told[region] = {**found[region], "voxels": voxels} if voxels else summary(0, 0, 0)
    return told


def counts_as_empty(entry: Mapping[str, float | None], smallest: float = 1) -> bool:
    """Return whether a region of a prediction counts as empty: it has fewer than ``smallest`` voxels, or none.

    Args:
        entry: of the region in `Summary`; without ``voxels``, that it has no `SIGNS` says so.
        smallest: the rule the scores were made with (``--remove_small``), in voxels of the image.
    """
    voxels = entry.get("voxels")
    return signs_of(entry)[0] != signs_of(entry)[0] if voxels is None else voxels < max(1, smallest)


def signs_of(entry: Mapping[str, float | None]) -> tuple[float, ...]:
    """Return the log-odds of `SIGNS` of a region's entry in `Summary`; NaN where its mask is empty."""
    found = []
    for name in SIGNS:
        value = entry[name]
        p = math.nan if value is None else min(max(value, _ODDS_WITHIN), 1 - _ODDS_WITHIN)
        found.append(math.log(p / (1 - p)) if p == p else p)
    return tuple(found)


def estimate(fitted: Mapping[str, Any], subset: str, entry: Mapping[str, float | None]) -> dict[str, Any] | None:
    """Estimate the Dice of one region of one prediction.

    Args:
        fitted: what `scoring.case_quality` fitted for the region.
        subset: name of the subset it was predicted from.
        entry: of the region in `Summary`.

    Returns:
        ``estimate``, ``low`` and ``high`` (Dice as fractions; the interval holds 90 % of validation cases, each left
        out in turn) and ``doubtful``; None where validation cases say nothing.
    """
    if counts_as_empty(entry, fitted.get(SMALLEST) or 1):
        value = fitted["empty"]
        if value is None:
            return None
        return {"estimate": value, "low": None, "high": None, "doubtful": value < fitted["doubtful_below"]}
    known = fitted["subsets"].get(subset)
    signs = signs_of(entry)
    if known is None or signs[0] != signs[0]:  # no signs: what is there on the image's grid only
        return None
    moved = known["dice"]
    for sign, usual, weight, (low, high) in zip(signs, known["signs"], fitted["weights"], fitted["range"], strict=True):
        moved += weight * (min(max(sign, low), high) - usual)
    least, most = fitted["dice_range"]  # no better and no worse than a validation case was
    value = min(max(moved, least), most)
    return {
        "estimate": value,
        "low": min(max(value + known["low"], 0.0), 1.0),
        "high": min(max(value + known["high"], 0.0), 1.0),
        "doubtful": value < fitted["doubtful_below"],
    }


def stored_fit(model_folder: Path | str) -> dict[str, Any]:
    """Return region -> what was fitted, of the regions where that beats the subset's mean; empty where none is stored.

    Raises:
        ValueError: the stored report is damaged; the message names it and says what to do.
    """
    stored = stored_report(model_folder)
    if stored is None or stored[1].get(KEY) is None:
        return {}
    path, content = stored
    try:
        rules = content.get(SMALLEST) or {}  # of the whole report; the first fits had none of their own
        regions = {
            str(name): _checked({SMALLEST: rules.get(name), **entry}) for name, entry in content[KEY]["regions"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, TypeError(f"'{KEY}' is not what 'mgml evaluate' writes")) from error
    return {name: entry for name, entry in regions.items() if entry["used"]}


def _checked(entry: Any) -> dict[str, Any]:
    """Return a region's entry if `estimate` can use it, or raise some error."""

    def number(value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < math.inf:
            raise TypeError(value)
        return float(value)

    if entry["used"] is not True:
        return {"used": False}
    for pair in (entry["weights"], *entry["range"], *(known["signs"] for known in entry["subsets"].values())):
        _, _ = map(number, pair)
    _, _ = entry["range"]
    _, _ = map(number, entry["dice_range"])
    number(entry["doubtful_below"])
    for known in entry["subsets"].values():
        number(known["dice"]), number(known["low"]), number(known["high"])
    for name in ("empty", SMALLEST):
        if entry[name] is not None:
            number(entry[name])
    return dict(entry)


def estimates(
    fitted: Mapping[str, Any], subset: Sequence[bool], channels: Sequence[str], found: Summary
) -> dict[str, Any]:
    """Return the entries of a case in ``mgml_prediction.json``.

    Args:
        fitted: of `stored_fit`.
        subset: ``M`` bools, what the case was predicted from.
        channels: the model's modality names.
        found: of `sum_up`.

    Returns:
        ``estimated_dice`` (region -> ``estimate``, ``low``, ``high``) and ``doubtful_regions``; empty where nothing
        was fitted.
    """
    name = subset_name(subset, channels)
    known = {
        region: value
        for region, entry in fitted.items()
        if region in found and (value := estimate(entry, name, found[region])) is not None
    }
    if not known:
        return {}
    return {
        "estimated_dice": {
            region: {what: value[what] for what in ("estimate", "low", "high")} for region, value in known.items()
        },
        "doubtful_regions": [region for region, value in known.items() if value["doubtful"]],
    }


def _regions(label_manager: Any) -> dict[str, tuple[int, ...]]:
    """Return region -> its labels, in the order of the network's heads where these are regions."""
    found = {}
    for name, value in label_manager.label_dict.items():
        labels = tuple(int(label) for label in (value if isinstance(value, (list, tuple)) else (value,)))
        if name != "ignore" and set(labels) != {0}:
            found[str(name)] = labels
    return found


def export_and_sum_up(keep: bool, logits: NDArray[Any], *arguments: Any) -> Summary:
    """Run `upstream.export.export_case` and return `sum_up` of the label map it wrote; runs in workers.

    Args:
        keep: also write the summary beside the label map, and before it, so that none is without.
        logits: see `sum_up`.
        *arguments: the others of `export_case`.
    """
    from nnunetv2_mgml.upstream.export import export_case  # nnU-Net is slow to import

    _, _, plans_manager, dataset_json, ofile, _ = arguments
    write: Callable[..., None] = export_case
    label_manager = plans_manager.get_label_manager(dataset_json)
    found = sum_up(logits, label_manager)

    def look(segmentation: NDArray[Any]) -> None:
        found.update(on_image(found, segmentation, label_manager))
        if keep:
            write_json(Path(f"{ofile}{SUMMARY_ENDING}"), found)

    write(logits, *arguments, look=look)
    return found
