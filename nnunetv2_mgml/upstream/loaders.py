"""nnU-Net's loaders, made of a class of one's own.

Bends: ``nnUNetTrainer.get_dataloaders``, whose body is repeated with one change: who makes a loader.
Why: it fixes the loader's class.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA


def get_dataloaders(
    trainer: nnUNetTrainer, make_loader: Callable[[nnUNetBaseDataset, Any, Any, bool], Any]
) -> tuple[Any, Any]:
    """Return the running loaders of training and validation, as ``get_dataloaders`` of nnU-Net's trainer does.

    Args:
        trainer: whose plans, labels, data sets and transforms are used.
        make_loader: from a data set, the patch size to cut in voxels (z, y, x), the transforms, and whether it is for
            training.
    """
    plan, labels = trainer.configuration_manager, trainer.label_manager
    scales = trainer._get_deep_supervision_scales()
    rotation, dummy_2d, initial_patch_size, mirror_axes = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    of_labels = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    train_transforms = trainer.get_training_transforms(
        plan.patch_size,
        rotation,
        scales,
        mirror_axes,
        dummy_2d,
        use_mask_for_norm=plan.use_mask_for_norm,
        **of_labels,
    )
    val_transforms = trainer.get_validation_transforms(scales, **of_labels)
    train, val = trainer.get_tr_and_val_datasets()
    loaders = (
        make_loader(train, initial_patch_size, train_transforms, True),
        make_loader(val, plan.patch_size, val_transforms, False),
    )
    workers = get_allowed_n_proc_DA()
    counts = ((workers, max(6, workers // 2)), (max(1, workers // 2), max(3, workers // 4)))
    if workers == 0:
        generators = [SingleThreadedAugmenter(loader, None) for loader in loaders]
    else:
        generators = [
            NonDetMultiThreadedAugmenter(
                data_loader=loader,
                transform=None,
                num_processes=processes,
                num_cached=cached,
                seeds=None,
                pin_memory=trainer.device.type == "cuda",
                wait_time=0.002,
            )
            for loader, (processes, cached) in zip(loaders, counts, strict=True)
        ]
    for generator in generators:
        next(generator)
    return generators[0], generators[1]
