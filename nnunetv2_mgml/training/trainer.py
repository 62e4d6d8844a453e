"""`nnUNetTrainerMGML`: one model for every subset of the modalities, trained through nnU-Net's own hooks."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_mgml import __version__
from nnunetv2_mgml._moved import forward
from nnunetv2_mgml.dataloading import augmentation
from nnunetv2_mgml.io.cpus import usable_cpus
from nnunetv2_mgml.modalities import Subset, channel_names
from nnunetv2_mgml.network.interface import bare
from nnunetv2_mgml.objective import Options, Progress
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.plans.regions import check_regions
from nnunetv2_mgml.plans.splits import (
    TRAINING_CASES,
    cases_digest,
    fold_warning,
    other_cases,
    trains_on_test_cases,
)
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.presentation.figures.training import training_curves
from nnunetv2_mgml.scoring.subset_report import carry_report
from nnunetv2_mgml.training import checkpoint
from nnunetv2_mgml.training.compatibility import cannot_resume, options_of_model, refuse_other_network
from nnunetv2_mgml.training.epoch_log import TrainingLog, epoch_row, mean_over_ranks, region_names, tell_loggers
from nnunetv2_mgml.training.final_validation import announcing_cases
from nnunetv2_mgml.training.learners import Learner, SubsetLearner
from nnunetv2_mgml.training.loaders import build_loaders
from nnunetv2_mgml.training.optimisation import adam_of_the_paper
from nnunetv2_mgml.training.overrides import merged_overrides
from nnunetv2_mgml.training.repetition import make_deterministic, seed_epoch
from nnunetv2_mgml.training.run_notes import run_notes
from nnunetv2_mgml.training.validation import drop_report_of_other_weights, validate_subsets
from nnunetv2_mgml.training.warm_start import Start, read_donor
from nnunetv2_mgml.upstream import training_step
from nnunetv2_mgml.upstream.best_checkpoint import best_average, keep_average_finite
from nnunetv2_mgml.upstream.checkpoints import loading
from nnunetv2_mgml.upstream.cpu_layers import make_fast
from nnunetv2_mgml.upstream.distributed import place
from nnunetv2_mgml.upstream.optimizer_state import without_optimizer_state
from nnunetv2_mgml.upstream.plain_errors import PlainError
from nnunetv2_mgml.upstream.pretrained_weights import let_take

FIGURE_NAME = "mgml_progress.png"


class nnUNetTrainerMGML(nnUNetTrainer):  # type: ignore[misc]  # nnunetv2 ships no types  # noqa: N801  nnU-Net's way
    """nnU-Net's trainer with a random subset of the modalities per sample, in training and in validation.

    Every method but three is a hook of nnU-Net; what a hook does lies in a file of its own beside this one. A trainer
    of your own subclasses it, fixes options by ``config_overrides`` and overrides hooks as with any nnU-Net trainer.
    """

    supports_missing_modalities: ClassVar[bool] = True
    """Read by the predictor: a model of this trainer may be given fewer modalities than it has channels."""
    config_overrides: ClassVar[dict[str, Any]] = {}
    """Options a variant fixes, whatever the plans say, beside those its bases fix; ``fusion_options`` are merged
    (`Options.overridden`)."""
    my_init_kwargs: dict[str, Any]
    """nnU-Net's: the arguments this was made with, which a checkpoint keeps."""
    learner_class: ClassVar[type[Learner]] = SubsetLearner
    """Which network is trained, and how a step teaches it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a variant of a variant fix what that one fixes."""
        super().__init_subclass__(**kwargs)
        cls.config_overrides = merged_overrides(cls)

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - upstream's default
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        place(self, device)
        if device.type == "cpu":  # nnU-Net starts a thread for every CPU of the machine
            torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
        folder = self.output_folder_base  # None without nnUNet_results
        if PLANS_KEY not in plans and folder and (before := options_of_model(Path(folder))):
            plans[PLANS_KEY] = {"config": before}  # nnU-Net's own plans cannot say what this model is
        planned = Options.from_plans(plans)
        name, workers, regions = type(self).__name__, get_allowed_n_proc_DA(), self.label_manager.has_regions
        for note in run_notes(name, planned, self.fixed_on(planned), workers, self.is_cascaded, regions):
            self.print_to_log_file(note)
        self.options = self.resolve_options(plans)
        self.channels = channel_names(dataset_json)
        for name, value in self.options.training.trainer_attributes().items():
            setattr(self, name, value)
        heads = self.label_manager.num_segmentation_heads
        self.num_classes: int = heads + 1 if self.label_manager.has_regions else heads
        # plans is nnU-Net's dict: it is copied beside the checkpoint, so inference finds the resolved configuration
        plans[PLANS_KEY] = {
            "version": __version__,
            "config": self.options.as_dict(),
            "channels": list(self.channels),
            "num_classes": self.num_classes,
        }
        self.training_availability: dict[str, Subset] = {}
        self.training_log = TrainingLog(self.output_folder)
        self.steps_in_epoch = 0
        self.weights_file: str | None = None
        self.stored_optimizer = self.options.training.optimizer
        self.stored_cases: dict[str, Any] | None = None

    @classmethod
    def resolve_options(cls, plans: dict[str, Any]) -> Options:
        """Return the options of plans that are to be trained with, and what this trainer fixes.

        The plans beside a checkpoint hold the result, and there it counts as it is: what a trainer fixes may change.
        """
        planned = Options.from_plans(plans)
        return planned.overridden(cls.fixed_on(planned))

    @classmethod
    def fixed_on(cls, planned: Options) -> dict[str, Any]:
        """Return what this trainer fixes where the plans have these options: its ``config_overrides``."""
        return cls.config_overrides

    @property
    def bare_network(self) -> nn.Module:
        """The network without the DDP and compile wrappers."""
        return bare(self.network)

    @property
    def progress(self) -> Progress:
        """How far the training is."""
        return Progress(self.current_epoch, self.num_epochs, self.steps_in_epoch, self.num_iterations_per_epoch)

    # --- what is built ------------------------------------------------------------------------------------------------
    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network; at inference nnU-Net calls this with the plans found beside the checkpoint."""
        return cls.learner_class.build_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )

    def initialize(self) -> None:
        """Refuse what cannot work, seed, build nnU-Net's own and what teaches the network."""
        if len(self.channels) < 2:
            raise ValueError(
                f"{type(self).__name__} needs at least two modalities; {self.plans_manager.dataset_name} "
                f"has {len(self.channels)} ({', '.join(self.channels)}). Use nnUNetTrainer."
            )
        check_regions(self.dataset_json)
        seed_epoch(self.options.training.seed, self.current_epoch, self.local_rank)
        super().initialize()
        if self.device.type == "cpu" and self.options.training.cpu_bfloat16:  # also of a stock network
            make_fast(bare(self.network).modules())
        self.learner = self.learner_class(self)
        for line in self.learner.describe():
            self.print_to_log_file(line)
        let_take(self.network, self.take_pretrained_weights)

    def take_pretrained_weights(self, filename: str) -> None:
        """Start from a checkpoint of a stock nnU-Net, of ours or of self-supervised pretraining (-pretrained_weights).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a checkpoint, or one of which nothing fits this network.
        """
        taken = Start(self.network, self.dataset_json).take(read_donor(filename))
        self.print_to_log_file(f"Pretrained weights of {filename}, matched by the names of modalities:")
        for line in taken.lines():
            self.print_to_log_file(line)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """nnU-Net's SGD, or the paper's Adam (section 4.1), under nnU-Net's poly schedule."""
        optimizer, scheduler = super().configure_optimizers()
        if self.options.training.optimizer == "adam":
            optimizer = adam_of_the_paper(self.network, self.initial_lr, self.weight_decay)
            scheduler = type(scheduler)(optimizer, self.initial_lr, self.num_epochs)
        return optimizer, scheduler

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's loaders with the masks of what each sample may show."""
        return build_loaders(self)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:  # noqa: N802
        """nnU-Net's choices, or the paper's."""
        stock = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return augmentation.spatial_choices(self.options.training, self.configuration_manager.patch_size, stock)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's transforms, or the paper's."""
        return augmentation.training_transforms(self.options.training, super().get_training_transforms, *args, **kwargs)

    # --- a training ---------------------------------------------------------------------------------------------------
    def on_train_start(self) -> None:
        """Refuse to spoil another fold's model, then nnU-Net's own preparations, then resume the log.

        Raises:
            ValueError: another fold's network differs, the loaded checkpoint holds the state of another optimizer, or
                the fold would be drawn at random from test cases too.
        """
        if self.stored_optimizer != self.options.training.optimizer:  # not on loading: --val needs the weights only
            raise cannot_resume("optimizer", self.stored_optimizer, self.options.training.optimizer)
        self._check_split()
        if self.options.training.deterministic:  # here, because nnU-Net switches cudnn.benchmark on just before
            make_deterministic()
        if self.local_rank == 0:
            refuse_other_network(
                Path(self.output_folder_base),
                Path(self.output_folder).name,
                self.plans_manager.plans,
                self.configuration_name,
                self.dataset_json,
                self.learner_class.by_options,
            )
        super().on_train_start()
        # a checkpoint has its plans from here; those of the model folder, which are written by now, serve all folds
        self.my_init_kwargs["plans"][PLANS_KEY][TRAINING_CASES] = cases_digest(self.training_availability)
        if self.local_rank == 0:
            carry_report(self.output_folder_base)  # nnU-Net has just written the file that carries it
        self.logger.update_config({PLANS_KEY: self.options.as_dict()})
        self.training_log.resume(self.current_epoch)
        self.learner.start_training(self.training_availability.values())

    def take_training_cases(self, available: dict[str, Subset]) -> None:
        """Keep what the training cases have; refuse to go on from a checkpoint that was trained on others."""
        self.training_availability = available
        if changed := other_cases(self.fold, self.stored_cases, available):
            raise PlainError(f"{changed} Put the splits_final.json of that time back, or train anew, without --c.")

    def _check_split(self) -> None:
        """Refuse a fold that would train on the test cases of a fixed split; warn of other surprises."""
        base = Path(self.preprocessed_dataset_folder_base)
        dataset_class = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        cases = dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        if refusal := trains_on_test_cases(base, self.fold, cases):
            raise PlainError(refusal)
        if warning := fold_warning(base, self.fold, cases):
            self.print_to_log_file(f"WARNING: {warning}")

    def on_train_epoch_start(self) -> None:
        """Seed the epoch and set the learning rates."""
        super().on_train_epoch_start()
        seed_epoch(self.options.training.seed, self.current_epoch, self.local_rank)
        self.steps_in_epoch = 0
        self.weights_file = None
        self.learner.start_epoch(self.progress)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step, with the loss of the learner; returns the columns of the log beside ``loss``."""
        batch = training_step.moved(batch, self.device)
        with training_step.autocast(self.device, self.options.training.cpu_bfloat16):
            loss, logged = self.learner.loss(batch, self.progress)
        training_step.optimise(loss, [self.optimizer, *self.learner.optimizers], self.network, self.grad_scaler)
        self.steps_in_epoch += 1
        return training_step.as_numbers({"loss": loss, **logged})

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the mean of everything the steps returned, then what the learner changes between epochs."""
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        for output in train_outputs:
            self.training_log.add({name: value for name, value in output.items() if name != "loss"})
        self.training_log.add(self.learner.end_epoch(self.progress))

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's step on the subset drawn for each sample, so that pseudo Dice speaks of random subsets."""
        with (
            self.learner.only_visible(batch) as shown,
            training_step.autocast(self.device, self.options.training.cpu_bfloat16),
        ):
            result: dict[str, Any] = super().validation_step(shown)
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """nnU-Net's; an epoch whose patches hold nothing, of which nothing is predicted, does not spoil its average."""
        super().on_validation_epoch_end(val_outputs)
        keep_average_finite(self.logger, self.current_epoch)

    def on_epoch_end(self) -> None:
        """Write the epoch's row and figure around nnU-Net's bookkeeping (which saves checkpoints, counts the epoch up).

        The row comes first: a run killed after its checkpoint goes on with the next epoch, and would never write it.
        """
        rate = self.optimizer.param_groups[0]["lr"]
        means = mean_over_ranks(self.training_log.means(), self.is_ddp)
        row = epoch_row(
            self.current_epoch, rate, means, self.logger, region_names(self.dataset_json, self.label_manager)
        )
        row = {**row, "seconds": time.time() - self.logger.get_value("epoch_start_timestamps", step=-1)}
        self.training_log.end_epoch(row, write=self.local_rank == 0)
        super().on_epoch_end()
        tell_loggers(self.logger, row)
        if self.local_rank == 0:
            save(training_curves(self.training_log.rows), os.path.join(self.output_folder, FIGURE_NAME))

    # --- checkpoints --------------------------------------------------------------------------------------------------
    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint plus, under a key of its own, what only training needs; renamed into place."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        checkpoint.save(filename, super().save_checkpoint, self.learner.state_dict())
        self.weights_file = filename

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """nnU-Net's loading, then the learner's state, so that ``--c`` resumes exactly.

        Another optimizer is no obstacle to ``--val``; `on_train_start` refuses to train with it.

        Raises:
            ValueError: the checkpoint is of another network, or was written with other terms that keep a state.
        """
        stored = checkpoint.Stored.read(filename_or_checkpoint)
        if isinstance(filename_or_checkpoint, str):
            stored.refuse_other_network(
                filename_or_checkpoint,
                self.plans_manager.plans,
                self.configuration_name,
                self.dataset_json,
                self.learner_class.by_options,
            )
            self.weights_file = filename_or_checkpoint
            self.stored_optimizer = stored.options.training.optimizer
        if not self.was_initialized:
            self.initialize()
        own = self.my_init_kwargs
        same = self.stored_optimizer == self.options.training.optimizer
        name = filename_or_checkpoint if isinstance(filename_or_checkpoint, str) else "checkpoint"
        with loading(name, flag=False), nullcontext() if same else without_optimizer_state(self):
            super().load_checkpoint(filename_or_checkpoint)
        self._best_ema: float | None = best_average(self.logger, self._best_ema)
        self.my_init_kwargs = own  # the next checkpoint is of these plans; nnU-Net has put the stored ones there
        self.stored_cases = stored.training_cases
        for group in self.optimizer.param_groups:  # it came with the state, as it was then
            group["weight_decay"] = self.weight_decay
        self.learner.load_state_dict(stored.training_state, stored.options)

    # --- final validation ---------------------------------------------------------------------------------------------
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, the network told of each case what it has, then the table over all subsets.

        Weights that were trained on another split get a warning and no table, since predictions would quote it.
        """
        changed = "" if self.stored_cases is None else other_cases(self.fold, self.stored_cases, self.do_split()[0])
        if changed:
            self.print_to_log_file(f"WARNING: {changed} These scores may be too good.")
        with announcing_cases(self):
            super().perform_actual_validation(save_probabilities)
        if self.local_rank != 0:
            return
        drop_report_of_other_weights(self)
        if changed:
            self.print_to_log_file("No table over all modality subsets: the split has changed since the training.")
        elif self.options.training.validate_subsets:
            self.print_to_log_file(validate_subsets(self, self.weights_file))


if not TYPE_CHECKING:
    __getattr__ = forward(__name__)
