"""Does nnU-Net's post-processing help every subset as it helps complete cases? On cubes of real patients.

The largest component of each region alone is kept, in what the model of `cubes_case_quality.py` predicted.

    MGML_REAL_DATA=... python benchmarks/ablation/cubes_postprocessing.py --work /tmp/case_quality
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component

sys.path.insert(0, str(Path(__file__).parents[1]))
from cubes_data import REGIONS, cubes_file, read_cubes, split
from cubes_scores import dice_of, to_regions
from cubes_variants import CHANNELS

from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.modalities import all_subsets, subset_name

RESULT = Path(__file__).parents[1] / "results" / "postprocessing.json"


def main() -> None:
    """Compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="of cubes_case_quality.py")
    args = parser.parse_args()
    cubes = read_cubes(cubes_file())
    parts = split(cubes.patients)
    names = [subset_name(subset, CHANNELS) for subset in all_subsets(len(CHANNELS))]
    content = {}
    for part in ("validation", "test"):
        stored = np.load(args.work / f"logits_{part}.npy", mmap_mode="r")
        gain = np.empty(stored.shape[:3])
        for number, case in enumerate(parts[part]):
            masks = to_regions(torch.from_numpy(stored[number].astype(np.float32)))
            kept = torch.stack([largest(mask) for mask in masks.flatten(0, 1)]).view_as(masks)
            gain[number] = (dice_of(kept, cubes.regions[case]) - dice_of(masks, cubes.regions[case])).numpy()
        means = 100 * gain.mean(0)
        content[part] = {
            region: {
                "all_subsets": round(float(means[:, row].mean()), 2),
                **{name: round(float(value), 2) for name, value in zip(names, means[:, row], strict=True)},
            }
            for row, region in enumerate(REGIONS)
        }
        print(part, content[part])
    about = {
        "patients": {part: len(parts[part]) for part in content},
        "training": read_json(args.work / "training.json"),
    }
    write_json(RESULT, {**about, "gain_in_dice_points": content})


def largest(mask: torch.Tensor) -> torch.Tensor:
    """Return the largest component of a mask ``(x, y, z)`` bool."""
    return torch.from_numpy(remove_all_but_largest_component(mask.numpy())) if mask.any() else mask


if __name__ == "__main__":
    main()
