"""Mirror of nnU-Net's ``get_dataloaders``, which fixes the loader's class (guarded by the drift test)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_mgml.dataloading.availability import case_availability
from nnunetv2_mgml.dataloading.loader import MGMLDataLoader
from nnunetv2_mgml.dataloading.masking import build_sampler
from nnunetv2_mgml.modalities import subset_name
from nnunetv2_mgml.plans.cohort import MISSING_FILE

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


def build_loaders(trainer: nnUNetTrainerMGML) -> tuple[Any, Any]:
    """Return the running loaders of training and validation, and log which training cases are incomplete."""
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
    _note_availability(trainer, train)
    loaders = (
        _loader(trainer, train, initial_patch_size, train_transforms),
        _loader(trainer, val, plan.patch_size, val_transforms),
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


def _loader(
    trainer: nnUNetTrainerMGML, dataset: nnUNetBaseDataset, initial_patch_size: Any, transforms: Any
) -> MGMLDataLoader:
    return MGMLDataLoader(
        dataset,
        trainer.batch_size,
        initial_patch_size,
        trainer.configuration_manager.patch_size,
        trainer.label_manager,
        oversample_foreground_percent=trainer.oversample_foreground_percent,
        sampling_probabilities=None,
        pad_sides=None,
        transforms=transforms,
        probabilistic_oversampling=trainer.probabilistic_oversampling,
        availability=case_availability(dataset, dataset.identifiers, len(trainer.channels)),
        sampler=build_sampler(trainer.options.sampling, trainer.channels),
    )


def _note_availability(trainer: nnUNetTrainerMGML, dataset: nnUNetBaseDataset) -> None:
    available = case_availability(dataset, dataset.identifiers, len(trainer.channels))
    trainer.training_availability = available
    incomplete = {name: subset for name, subset in available.items() if not all(subset)}
    trainer.print_to_log_file(
        f"Modalities: {', '.join(trainer.channels)}; {len(incomplete)} of {len(available)} "
        f"training cases are incomplete"
    )
    counts = [sum(column) for column in zip(*available.values(), strict=True)]
    trainer.print_to_log_file(
        "Training cases that have each: "
        + ", ".join(f"{name} {count}" for name, count in zip(trainer.channels, counts, strict=True))
    )
    for name, subset in incomplete.items():
        trainer.print_to_log_file(
            f"  {name}: only {subset_name(subset, trainer.channels)}", also_print_to_console=False
        )
    _note_spoiled_statistics(trainer, Path(dataset.source_folder).parent, counts, len(available))


def _note_spoiled_statistics(trainer: nnUNetTrainerMGML, folder: Path, counts: list[int], total: int) -> None:
    """Say that placeholders have been in the fingerprint, where that matters: a CT is normalised by its statistics."""
    schemes = trainer.configuration_manager.normalization_schemes
    spoiled = [
        name
        for name, scheme, count in zip(trainer.channels, schemes, counts, strict=False)
        if count < total and scheme == "CTNormalization"
    ]
    if spoiled and not (folder / MISSING_FILE).is_file():
        trainer.print_to_log_file(
            f"WARNING: {', '.join(spoiled)} is absent in some cases and normalised by the fingerprint's statistics, in "
            f"which placeholder volumes have been. Record them (mgml convert raw -d {folder.name}), then run "
            f"nnUNetv2_plan_and_preprocess --clean."
        )
