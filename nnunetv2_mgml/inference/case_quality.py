"""How good this very prediction may be: what its own probabilities say, translated by what they said of known cases.

The expected Dice of a mask under the network's probabilities p is ``2 sum_mask p / (voxels of mask + sum p)``. It is
too high where a network is too sure, so it is translated, per region, by a line fitted on validation cases
(`scoring.case_quality`), which lies in the ``case_quality`` of ``subset_report.json`` and travels with the model.
Importing this module imports neither torch nor nnU-Net.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.io.files import write_json

KEY = "case_quality"
"""In ``subset_report.json``; reports written before 0.2 have none."""
SUMMARY_ENDING = ".probabilities.json"
"""Of the file that an evaluation keeps beside each label map: what `sum_up` found."""
_VOXELS_AT_ONCE = 2**21

Summary = dict[str, dict[str, float | None]]
"""Region -> ``voxels`` of its mask on the network's grid and ``expected_dice`` (None where the mask is empty)."""


def sum_up(logits: NDArray[Any], label_manager: Any) -> Summary:
    """Return what a prediction's probabilities say of its own masks.

    Args:
        logits: ``(heads, z, y, x)`` on the preprocessed grid.
        label_manager: nnU-Net's, of the model.

    Returns:
        Per region of ``dataset.json``, in its order; see `Summary`.
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
    return {
        region: {"voxels": int(voxels), "expected_dice": 2 * inside / (voxels + everywhere) if voxels else None}
        for region, (voxels, inside, everywhere) in zip(regions, sums.tolist(), strict=True)
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
    """Run `upstream.export.export_case` and return `sum_up`; runs in workers.

    Args:
        keep: also write the summary beside the label map, and before it, so that none is without.
        logits: see `sum_up`.
        *arguments: the others of `export_case`.
    """
    from nnunetv2_mgml.upstream.export import export_case  # nnU-Net is slow to import

    _, _, plans_manager, dataset_json, ofile, _ = arguments
    summary = sum_up(logits, plans_manager.get_label_manager(dataset_json))
    if keep:
        Path(ofile).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(f"{ofile}{SUMMARY_ENDING}"), summary)
    export_case(logits, *arguments)
    return summary
