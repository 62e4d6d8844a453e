"""What is trained, and what a step teaches it: any network on what is visible, or ours by the method's losses.

A trainer has one learner. It owns whatever training needs beside nnU-Net's network, loss and optimizer, and says what
of it a checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.utils.hooks import RemovableHandle

from nnunetv2_mgml.dataloading.loader import visible_modalities
from nnunetv2_mgml.dataloading.teacher_view import stronger_intensity_transforms, teacher_view
from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.build import build_network, count_modalities
from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet
from nnunetv2_mgml.network.interface import bare, seeing, subset_network
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.network.subset_module import zero_absent
from nnunetv2_mgml.objective import Objective, Options, Progress, TermSpec, needs_of
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.upstream.cpu_layers import make_fast
from nnunetv2_mgml.upstream.distributed import on_own_device

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


_COMPILED = (
    "gradient_checkpointing does nothing in a compiled network; where memory is short, switch compiling off "
    "(nnUNet_compile=f)"
)


class Learner:
    """The stock network, which knows no subsets: invisible channels are zero, the loss is nnU-Net's.

    Args:
        trainer: after nnU-Net's own initialisation.
    """

    optimizers: Sequence[torch.optim.Optimizer] = ()
    """Those stepped together with nnU-Net's."""
    by_options: ClassVar[bool] = False
    """Whether our options decide which network is built; a stock network goes by nnU-Net's plans alone."""

    def __init__(self, trainer: nnUNetTrainerMGML) -> None:
        self.options = trainer.options
        self.network = trainer.network
        self.segmentation_loss = trainer.loss
        self.device = trainer.device
        self._emptying: RemovableHandle | None = None

    @classmethod
    def build_network(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool,
    ) -> nn.Module:
        """Build the network; the arguments are those of nnU-Net's ``build_network_architecture``."""
        network: nn.Module = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, deep_supervision
        )
        return network

    def describe(self) -> list[str]:
        """Return lines for the log, once everything is built."""
        return []

    def start_training(self, availability: Iterable[Subset]) -> None:
        """Called once before the first epoch with the modalities of every training case."""

    def start_epoch(self, progress: Progress) -> None:
        """Called before every epoch."""

    def loss(self, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Predict and compute the loss of one step.

        Args:
            batch: the loader's, on the training's device.
            progress: how far the training is.

        Returns:
            The scalar for backward, and detached scalars by column of the log.
        """
        output = self.network(zero_absent(batch["data"], visible_modalities(batch)))
        return self.segmentation_loss(output, batch["target"]), {}

    def end_epoch(self, progress: Progress) -> dict[str, float]:
        """Called after the steps of every epoch; returns further columns of the log."""
        return {}

    @contextmanager
    def only_visible(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the batch of a validation step, of which the network sees the visible modalities only."""
        yield {**batch, "data": zero_absent(batch["data"], visible_modalities(batch))}

    def announce(self, subset: Subset | None) -> None:
        """Called before nnU-Net predicts a whole case that has ``subset``, and with None after the last one.

        What stands for an absent modality need not be zero any more when it is normalised; it is made so, as in
        training.
        """
        if self._emptying is not None:
            self._emptying.remove()
            self._emptying = None
        if subset is not None and not all(subset):
            mask = torch.tensor([subset])
            self._emptying = bare(self.network).register_forward_pre_hook(
                lambda _, inputs: (zero_absent(inputs[0], mask.to(inputs[0].device)), *inputs[1:])
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside nnU-Net's own."""
        return {}

    def load_state_dict(self, state: dict[str, Any], stored: Options) -> None:
        """Take over a checkpoint's state.

        Args:
            state: what `state_dict` returned; tensors may still be on the disk, so what is kept must be a copy.
            stored: the options of the checkpoint.

        Raises:
            ValueError: it was written with other terms that keep a state.
        """


class ToldLearner(Learner):
    """A network that is told what is visible (`nnunetv2_mgml.network.interface.SubsetNetwork`)."""

    @contextmanager
    def only_visible(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Tell the network what is visible for the duration of a validation step."""
        with seeing(self.network, visible_modalities(batch).to(self.device)):
            yield batch

    def announce(self, subset: Subset | None) -> None:
        """Tell the network which modalities the next case has."""
        network = subset_network(self.network)
        if network is not None:
            network.set_visible(subset)


class ConditionedLearner(ToldLearner):
    """`ConditionedUNet`: the stock network with conditional norms; the loss is nnU-Net's."""

    @classmethod
    def build_network(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool,
    ) -> nn.Module:
        """Build nnU-Net's network and condition its norms; see `Learner.build_network`.

        Raises:
            ValueError: an architecture whose norms cannot be conditional.
        """
        unet = super().build_network(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, deep_supervision
        )
        network = ConditionedUNet(unet, count_modalities(configuration_manager))
        network.channel_names = tuple(map(str, plans_manager.plans.get(PLANS_KEY, {}).get("channels", ())))
        make_fast(network.modules())
        return network

    def loss(self, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Predict from what is visible; see `Learner.loss`."""
        output = self.network(batch["data"], visible_modalities(batch))
        return self.segmentation_loss(output, batch["target"]), {}


class SubsetLearner(ToldLearner):
    """`MultiEncoderUNet`, which is told what is visible, and the objective (eq. 10)."""

    by_options = True

    def __init__(self, trainer: nnUNetTrainerMGML) -> None:
        super().__init__(trainer)
        self.num_modalities = len(trainer.channels)
        self.use_mask_for_norm = trainer.configuration_manager.use_mask_for_norm
        spec = TermSpec(
            self.options,
            trainer.channels,
            trainer.num_classes,
            trainer.label_manager.has_regions,
            trainer.loss,
            trainer.label_manager.ignore_label,
            trainer.configuration_manager.batch_dice,
        )
        self.objective = Objective(spec).to(self.device)
        if trainer.is_ddp:
            self.objective.distribute(on_own_device)
        self.optimizers = self.objective.optimizers
        self._teacher_transforms = stronger_intensity_transforms() if self.objective.needs.own_view else None
        self._bare_network = trainer.bare_network
        self.compiled = any(name.endswith("_orig_mod") for name, _ in self.network.named_modules())
        network = cast(MultiEncoderUNet, trainer.bare_network)
        network.gradient_checkpointing = self.options.training.gradient_checkpointing

    @classmethod
    def build_network(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        deep_supervision: bool,
    ) -> nn.Module:
        """Build the multi-encoder network; see `Learner.build_network`.

        Raises:
            ValueError: plans that no trainer of ours has completed (the number of label classes is not in them).
        """
        plans = plans_manager.plans
        if "num_classes" not in plans.get(PLANS_KEY, {}):
            raise ValueError(
                f"The plans hold no '{PLANS_KEY}.num_classes'. Use the plans.json which the trainer wrote into its "
                f"model folder, not those in nnUNet_preprocessed."
            )
        options = Options.from_plans(plans)
        network = build_network(
            configuration_manager,
            options.network,
            num_input_channels,
            num_output_channels,
            plans[PLANS_KEY]["num_classes"],
            deep_supervision,
            needs_of(options),
        )
        network.channel_names = tuple(map(str, plans[PLANS_KEY].get("channels", ())))
        return network

    def describe(self) -> list[str]:
        """Return what kind of network and of steps it is, and the number of parameters of each part."""

        def millions(module: nn.Module | torch.Tensor | None) -> float:
            return 0.0 if not isinstance(module, nn.Module) else sum(p.numel() for p in module.parameters()) / 1e6

        network, every = self._bare_network, self.objective.complete_every
        steps = "every step is full" if every == 1 else f"one step in {every} is full"
        return [
            f"MGML: network_form {self.options.network.network_form}, fusion {self.options.network.fusion}, {steps}; "
            f"parameters in millions: network {millions(network):.3f} "
            f"(encoders {millions(network.encoders):.3f}, fusion {millions(network.fusion):.3f}, decoder "
            f"{millions(network.decoder):.3f}, shared modality decoder {millions(network.modality_decoder):.3f}), "
            f"MetaNetwork {millions(self.objective):.4f} (training only)",
            *([_COMPILED] if self.compiled and self.options.training.gradient_checkpointing else []),
        ]

    def start_training(self, availability: Iterable[Subset]) -> None:
        """Tell the terms what each training case has."""
        self.objective.begin_training(availability)

    def start_epoch(self, progress: Progress) -> None:
        """Let the terms set what changes with the epoch, such as learning rates of their own."""
        self.objective.begin_epoch(progress)

    def loss(self, batch: dict[str, Any], progress: Progress) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """One forward pass for all that the terms need, and the total of eq. 10; see `Learner.loss`."""
        data, full = batch["data"], self.objective.is_full(progress)
        own_images = None
        if full and self._teacher_transforms is not None:
            own_images = teacher_view(data, self.num_modalities, self._teacher_transforms, self.use_mask_for_norm)
        view = self.objective.draw_view(visible_modalities(batch), batch["available"], own_images, full)
        if not full and self.device.type == "cpu" and not self.compiled:  # a GPU would have to be asked
            view = view.of_available()
        output = self.network(data, view, self.objective.needs_in(full))
        value = self.objective(output, batch["target"], view, self.objective.ramp(progress), full)
        return value.total, value.columns

    def end_epoch(self, progress: Progress) -> dict[str, float]:
        """Let the terms change what they change between epochs."""
        return self.objective.end_epoch(progress)

    def state_dict(self) -> dict[str, Any]:
        """Return what the terms keep: the MetaNetwork and its optimizer, weights of the modalities."""
        return self.objective.training_state()

    def load_state_dict(self, state: dict[str, Any], stored: Options) -> None:
        """See `Learner.load_state_dict`."""
        self.objective.load_training_state(state, stored)
