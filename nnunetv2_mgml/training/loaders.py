"""The trainer's loaders: nnU-Net's, with the masks of what each sample may show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_mgml.dataloading.availability import case_availability
from nnunetv2_mgml.dataloading.loader import MGMLDataLoader
from nnunetv2_mgml.dataloading.masking import build_sampler
from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.modalities import subset_name
from nnunetv2_mgml.plans.cohort import FINGERPRINT, LEFT_OUT
from nnunetv2_mgml.upstream.loaders import get_dataloaders

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


def build_loaders(trainer: nnUNetTrainerMGML) -> tuple[Any, Any]:
    """Return the running loaders of training and validation, and log which training cases are incomplete."""

    def make(dataset: nnUNetBaseDataset, patch_size: Any, transforms: Any, is_training: bool) -> MGMLDataLoader:
        available = case_availability(dataset, dataset.identifiers, len(trainer.channels))
        if is_training:
            trainer.take_training_cases(available)
            _note_availability(trainer, Path(dataset.source_folder).parent)
        return MGMLDataLoader(
            dataset,
            trainer.batch_size,
            patch_size,
            trainer.configuration_manager.patch_size,
            trainer.label_manager,
            oversample_foreground_percent=trainer.oversample_foreground_percent,
            sampling_probabilities=None,
            pad_sides=None,
            transforms=transforms,
            probabilistic_oversampling=trainer.probabilistic_oversampling,
            availability=available,
            sampler=build_sampler(trainer.options.sampling, trainer.channels),
        )

    return get_dataloaders(trainer, make)


def _note_availability(trainer: nnUNetTrainerMGML, folder: Path) -> None:
    available = trainer.training_availability
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
    _note_spoiled_statistics(trainer, folder, counts, len(available))


def _note_spoiled_statistics(trainer: nnUNetTrainerMGML, folder: Path, counts: list[int], total: int) -> None:
    """Say that placeholders have been in the fingerprint, where that matters: a CT is normalised by its statistics."""
    schemes = trainer.configuration_manager.normalization_schemes
    spoiled = [
        name
        for name, scheme, count in zip(trainer.channels, schemes, counts, strict=False)
        if count < total and scheme == "CTNormalization"
    ]
    fingerprint = folder / FINGERPRINT
    known = fingerprint.is_file() and LEFT_OUT in read_json(fingerprint)
    if spoiled and not known:
        trainer.print_to_log_file(
            f"WARNING: {', '.join(spoiled)} is absent in some cases and normalised by the fingerprint's statistics, in "
            f"which placeholder volumes may have been. Record them (mgml convert raw -d {folder.name}), if they are "
            f"not, and run nnUNetv2_plan_and_preprocess --clean."
        )
