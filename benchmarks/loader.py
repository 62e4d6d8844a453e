"""Time of a batch from our loader against nnU-Net's own, on a preprocessed dataset, in turns.

    python benchmarks/loader.py nnUNet_preprocessed/Dataset901_Phantom nnUNetMGMLPlans 3d_fullres

Augmentation is nnU-Net's, in this process; the first batches (file cache, availability scan) are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_mgml.dataloading.availability import case_availability
from nnunetv2_mgml.dataloading.loader import MGMLDataLoader
from nnunetv2_mgml.dataloading.masking import build_sampler
from nnunetv2_mgml.modalities import channel_names
from nnunetv2_mgml.plans.options import SamplingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("plans")
    parser.add_argument("configuration")
    parser.add_argument("--batches", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(args.dataset, args.plans, args.configuration, args.batches)
    means = {name: statistics.fmean(values) for name, values in times.items()}
    print(
        f"nnU-Net {means['nnunet'] * 1e3:.1f} ms, with masks {means['mgml'] * 1e3:.1f} ms a batch "
        f"(x {means['mgml'] / means['nnunet']:.3f}), mean of {args.batches} batches, CPU time"
    )


def measure(folder: Path, plans: str, name: str, batches: int) -> dict[str, list[float]]:
    """Return seconds of CPU time of every batch, of ``nnunet``'s loader and of ours, ``mgml``: the same patches.

    Args:
        folder: of the preprocessed dataset.
        plans: name of the plans.
        name: of the configuration.
        batches: how many are counted.
    """
    dataset_json = json.loads((folder / "dataset.json").read_text())
    manager = PlansManager(str(folder / f"{plans}.json"))
    configuration = manager.get_configuration(name)
    labels = manager.get_label_manager(dataset_json)
    data = str(folder / configuration.data_identifier)
    dataset = infer_dataset_class(data)(data)
    channels = channel_names(dataset_json)
    transforms = nnUNetTrainer.get_training_transforms(
        configuration.patch_size,
        (-0.5, 0.5),
        None,
        (0, 1, 2),
        False,
        use_mask_for_norm=None,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    arguments = (dataset, configuration.batch_size, configuration.patch_size, configuration.patch_size, labels)
    options = {"oversample_foreground_percent": 0.33, "transforms": transforms}
    loaders = {
        "nnunet": nnUNetDataLoader(*arguments, **options),
        "mgml": MGMLDataLoader(
            *arguments,
            **options,
            sampler=build_sampler(SamplingOptions(), channels),
            availability=case_availability(dataset, dataset.identifiers, len(channels)),
        ),
    }
    times: dict[str, list[float]] = {kind: [] for kind in loaders}
    for turn in range(batches + 5):
        for kind, loader in loaders.items():
            np.random.seed(turn)  # the same patches and augmentation for both
            torch.manual_seed(turn)
            start = time.process_time()
            loader.generate_train_batch()
            if turn >= 5:
                times[kind].append(time.process_time() - start)
    return times


if __name__ == "__main__":
    main()
