"""What every trainer of ours needs: configuration from the plans, the masking loader, and a log over random subsets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist
from torch import nn

from nnunetv2_mgml import __version__
from nnunetv2_mgml.dataloading.augmentation import AugmentationTrainer
from nnunetv2_mgml.dataloading.availability import case_availability
from nnunetv2_mgml.dataloading.loader import MGMLDataLoader
from nnunetv2_mgml.dataloading.masking import SubsetSampler, build_sampler
from nnunetv2_mgml.modalities import Subset, channel_names, subset_name
from nnunetv2_mgml.network.multi_encoder_unet import zero_absent
from nnunetv2_mgml.plans.options import PLANS_KEY, MGMLConfig
from nnunetv2_mgml.training.compatibility import network_differences, refuse_other_network
from nnunetv2_mgml.training.determinism import make_deterministic
from nnunetv2_mgml.training.epoch_log import TrainingLog
from nnunetv2_mgml.training.run_notes import run_notes
from nnunetv2_mgml.training.validation import drop_report_of_other_weights, validate_subsets
from nnunetv2_mgml.upstream.wrappers import bare

_TRAINER_ATTRIBUTES = (
    "num_epochs",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "save_every",
)


class MissingModalityTrainer(AugmentationTrainer):
    """nnU-Net's trainer with a random subset of modalities per sample, in training and in validation.

    Overridden hooks: ``__init__``, ``initialize``, ``get_dataloaders`` (mirrored: the loader class is fixed there),
    ``configure_optimizers``, ``on_train_start``, ``on_train_epoch_start``, ``on_train_epoch_end``,
    ``on_epoch_end``, ``validation_step``, ``save_checkpoint``, ``load_checkpoint``, ``perform_actual_validation``.
    """

    supports_missing_modalities: ClassVar[bool] = True
    """Read by the predictor: a model of this trainer may be given fewer modalities than it has channels."""
    config_overrides: ClassVar[dict[str, Any]] = {}
    """Options a variant fixes, whatever the plans say; ``fusion_options`` are merged (`MGMLConfig.overridden`)."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - upstream's default
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        for note in run_notes(
            type(self).__name__, MGMLConfig.from_plans(plans), self.config_overrides, get_allowed_n_proc_DA()
        ):
            self.print_to_log_file(note)
        self.config = self.resolve_config(plans)
        self.channels = channel_names(dataset_json)
        for name in _TRAINER_ATTRIBUTES:
            value = getattr(self.config, name)
            if value is not None:
                setattr(self, name, value)
        # plans is nnU-Net's dict: it is copied beside the checkpoint, so inference finds the resolved configuration
        plans[PLANS_KEY] = {
            "version": __version__,
            "config": self.config.as_dict(),
            "channels": list(self.channels),
            "num_classes": self.num_classes,
        }
        self.training_availability: dict[str, Subset] = {}
        self.training_log = TrainingLog(self.output_folder)
        self._steps_in_epoch = 0
        self._weights_file: str | None = None
        self._loaded_optimizer = self.config.optimizer

    @classmethod
    def resolve_config(cls, plans: dict[str, Any]) -> MGMLConfig:
        """Return the plans' configuration with what this trainer fixes."""
        return MGMLConfig.from_plans(plans).overridden(cls.config_overrides)

    @property
    def num_classes(self) -> int:
        """``K``: label classes with background; regions become classes in ``regions_class_order``."""
        heads = self.label_manager.num_segmentation_heads
        return heads + 1 if self.label_manager.has_regions else heads

    @property
    def num_modalities(self) -> int:
        """``M``."""
        return len(self.channels)

    def initialize(self) -> None:
        """Refuse what cannot work, seed, then nnU-Net's own initialisation."""
        if self.num_modalities < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two modalities; {self.plans_manager.dataset_name} "
                f"has {self.num_modalities} ({', '.join(self.channels)}). Use nnUNetTrainer."
            )
        self.seed_epoch()
        super().initialize()

    def seed_epoch(self) -> None:
        """With ``seed`` set, make what follows depend on the seed, the epoch and the rank only."""
        if self.config.seed is None:
            return
        seed = (self.config.seed + 1_000_003 * self.current_epoch + 7919 * self.local_rank) % 2**32
        np.random.seed(seed)
        torch.manual_seed(seed)

    # --- data ---------------------------------------------------------------------------------------------------------
    def get_dataloaders(self) -> tuple[Any, Any]:
        """Mirror of nnU-Net's method with `MGMLDataLoader` in place of its loader (guarded by a drift test)."""
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        labels = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }
        train_transforms = self.get_training_transforms(
            patch_size,
            rotation,
            scales,
            mirror_axes,
            dummy_2d,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            **labels,
        )
        val_transforms = self.get_validation_transforms(scales, **labels)
        train, val = self.get_tr_and_val_datasets()
        self._report_availability(train)
        loaders = (
            self._loader(train, initial_patch_size, train_transforms),
            self._loader(val, patch_size, val_transforms),
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
                    pin_memory=self.device.type == "cuda",
                    wait_time=0.002,
                )
                for loader, (processes, cached) in zip(loaders, counts, strict=True)
            ]
        for generator in generators:
            next(generator)
        return generators[0], generators[1]

    def _loader(self, dataset: nnUNetBaseDataset, initial_patch_size: Any, transforms: Any) -> MGMLDataLoader:
        return MGMLDataLoader(
            dataset,
            self.batch_size,
            initial_patch_size,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            sampling_probabilities=None,
            pad_sides=None,
            transforms=transforms,
            probabilistic_oversampling=self.probabilistic_oversampling,
            availability=case_availability(dataset, dataset.identifiers, self.num_modalities),
            sampler=self.build_sampler(),
        )

    def build_sampler(self) -> SubsetSampler:
        """Return the sampler of the modality masks."""
        return build_sampler(self.config, self.channels)

    def _report_availability(self, dataset: nnUNetBaseDataset) -> None:
        self.training_availability = availability = case_availability(dataset, dataset.identifiers, self.num_modalities)
        incomplete = {name: subset for name, subset in availability.items() if not all(subset)}
        self.print_to_log_file(
            f"Modalities: {', '.join(self.channels)}; {len(incomplete)} of {len(availability)} "
            f"training cases are incomplete"
        )
        for name, subset in incomplete.items():
            self.print_to_log_file(f"  {name}: only {subset_name(subset, self.channels)}", also_print_to_console=False)

    # --- optimisation -------------------------------------------------------------------------------------------------
    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's SGD, or the paper's Adam (section 4.1), under nnU-Net's poly schedule."""
        optimizer, scheduler = super().configure_optimizers()
        if self.config.optimizer == "adam":
            optimizer = torch.optim.Adam(
                self.network.parameters(),
                self.initial_lr,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=self.weight_decay,
                amsgrad=True,
            )
            scheduler = type(scheduler)(optimizer, self.initial_lr, self.num_epochs)
        return optimizer, scheduler

    def autocast(self) -> AbstractContextManager[Any]:
        """nnU-Net's autocast on CUDA; bfloat16 on a CPU where ``cpu_bfloat16`` asks for it; else none."""
        if self.device.type == "cuda":
            return torch.autocast("cuda", enabled=True)
        if self.device.type == "cpu" and self.config.cpu_bfloat16:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return nullcontext()

    @property
    def bare_network(self) -> nn.Module:
        """The network without the DDP and compile wrappers."""
        return bare(self.network)

    # --- the epoch ----------------------------------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """Refuse to spoil another fold's model, then nnU-Net's own preparations, then resume the log.

        Raises:
            ValueError: another fold's network differs, or the loaded checkpoint holds the state of another optimizer.
        """
        if self._loaded_optimizer != self.config.optimizer:  # not on loading: --val needs the weights only
            raise ValueError(self.option_mismatch("optimizer", self._loaded_optimizer))
        if self.config.deterministic:  # here, because nnU-Net switches cudnn.benchmark on just before
            make_deterministic()
        if self.local_rank == 0:
            refuse_other_network(
                Path(self.output_folder_base),
                Path(self.output_folder).name,
                self.plans_manager.plans,
                self.configuration_name,
            )
        super().on_train_start()
        self.training_log.resume(self.current_epoch)

    def on_train_epoch_start(self) -> None:
        """Seed the epoch."""
        super().on_train_epoch_start()
        self.seed_epoch()
        self._steps_in_epoch = 0
        self._weights_file = None

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step on the subset drawn for each sample, so that pseudo Dice speaks of random subsets."""
        with self.only_visible(batch) as visible, self.autocast():
            return super().validation_step(visible)

    def only_visible(self, batch: dict) -> AbstractContextManager[dict]:
        """Return a context with the batch under which the network sees only ``batch["modality_mask"]``."""
        return nullcontext({**batch, "data": zero_absent(batch["data"], batch["modality_mask"])})

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the mean of every loss term."""
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        for output in train_outputs:
            self.training_log.add({name: value for name, value in output.items() if name != "loss"})

    def on_epoch_end(self) -> None:
        """Write the epoch's row and figure, then nnU-Net's bookkeeping (which counts the epoch up)."""
        row = {"epoch": self.current_epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        row.update(self._mean_over_ranks(self.training_log.means()))
        row["train_total"] = float(self.logger.get_value("train_losses", step=-1))
        row["val_loss"] = float(self.logger.get_value("val_losses", step=-1))
        for name, dice in zip(
            self.region_names(), self.logger.get_value("dice_per_class_or_region", step=-1), strict=True
        ):
            row[f"pseudo_dice_{name}"] = float(dice)
        row["pseudo_dice_mean"] = float(self.logger.get_value("mean_fg_dice", step=-1))
        super().on_epoch_end()
        times = [self.logger.get_value(f"epoch_{side}_timestamps", step=-1) for side in ("start", "end")]
        row["seconds"] = times[1] - times[0]
        self.training_log.end_epoch(row, write=self.local_rank == 0)

    def region_names(self) -> list[str]:
        """Names of the regions, or of the foreground labels, in the order of nnU-Net's pseudo Dice."""
        labels = self.dataset_json["labels"]
        names = [name for name in labels if name not in ("background", "ignore")]
        if not self.label_manager.has_regions:  # by label value; regions keep the order of dataset.json
            names.sort(key=lambda name: np.max(labels[name]))
        return [name.replace(" ", "_") for name in names]

    def _mean_over_ranks(self, values: dict[str, float]) -> dict[str, float]:
        if not self.is_ddp:
            return values
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, values)
        return {name: float(np.mean([rank[name] for rank in gathered])) for name in values}

    # --- final validation ---------------------------------------------------------------------------------------------
    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's saving; the subset table is made from the file whose weights are in memory."""
        super().save_checkpoint(filename)
        if not self.disable_checkpointing:
            self._weights_file = filename

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's loading. Another optimizer is no obstacle to ``--val``; `on_train_start` refuses to train with it.

        Raises:
            ValueError: the checkpoint is of another network.
        """
        if isinstance(filename_or_checkpoint, str):
            stored = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False, mmap=True)
            differences = network_differences(
                stored["init_args"]["plans"], self.plans_manager.plans, self.configuration_name
            )
            if differences:
                raise ValueError(
                    f"{filename_or_checkpoint} was trained with another network: "
                    f"{'; '.join(differences)}. Use the plans it was trained with."
                )
            self._weights_file = filename_or_checkpoint
            self._loaded_optimizer = self.resolve_config(stored["init_args"]["plans"]).optimizer
        if self._loaded_optimizer == self.config.optimizer:
            super().load_checkpoint(filename_or_checkpoint)
        else:
            self._load_all_but_optimizer(filename_or_checkpoint)

    def _load_all_but_optimizer(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's loading where the optimizer is of another kind, whose state does not fit."""
        if not self.was_initialized:
            self.initialize()
        own, self.optimizer = self.optimizer, SimpleNamespace(load_state_dict=lambda _: None)
        try:
            super().load_checkpoint(filename_or_checkpoint)
        finally:
            self.optimizer = own

    def option_mismatch(self, option: str, stored: Any) -> str:
        """Return what to say of a checkpoint whose ``option`` was ``stored`` and that therefore cannot be resumed."""
        return (
            f"The checkpoint was trained with {option}={stored}, this trainer has "
            f"{option}={getattr(self.config, option)}; use the same plans and trainer."
        )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, then the table over all subsets (``validate_subsets``).

        Before each case the network is told which modalities the case has.
        """
        stock_class = self.dataset_class
        self.dataset_class = announcing(stock_class, self._announce_case)
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = stock_class
            self.set_case_availability(None)
        if self.local_rank != 0:
            return
        drop_report_of_other_weights(self)
        if self.config.validate_subsets:
            self.print_to_log_file(validate_subsets(self, self._weights_file))

    def _announce_case(self, dataset: nnUNetBaseDataset, identifier: str) -> None:
        self.set_case_availability(case_availability(dataset, [identifier], self.num_modalities)[identifier])

    def set_case_availability(self, subset: Subset | None) -> None:
        """Tell the network what the next case has; nothing to do where empty channels already say it."""


def announcing(
    dataset_class: type[nnUNetBaseDataset], announce: Callable[[nnUNetBaseDataset, str], None]
) -> type[nnUNetBaseDataset]:
    """Return a dataset class that calls ``announce(dataset, identifier)`` before it loads a case."""

    class Announcing(dataset_class):
        def load_case(self, identifier: str) -> Any:
            stock = dataset_class(self.source_folder, [identifier], self.folder_with_segs_from_previous_stage)
            announce(stock, identifier)
            return super().load_case(identifier)

    return Announcing
