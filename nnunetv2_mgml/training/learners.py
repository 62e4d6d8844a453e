"""What is trained, and what a step teaches it: any network on what is visible, or ours by the method's losses.

A trainer has one learner. It owns whatever training needs beside nnU-Net's network, loss and optimizer, and says what
of it a checkpoint keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mgml.dataloading.loader import visible_modalities
from nnunetv2_mgml.dataloading.teacher_view import stronger_intensity_transforms, teacher_view
from nnunetv2_mgml.inference.model_check import bare
from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet, zero_absent
from nnunetv2_mgml.objective import MetaParameters, MGMLLoss, build_meta_network
from nnunetv2_mgml.plans.options import PLANS_KEY, MGMLConfig
from nnunetv2_mgml.training.compatibility import cannot_resume
from nnunetv2_mgml.training.rebalancing import ModalityBalance

if TYPE_CHECKING:
    from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML


class Learner:
    """The stock network, which knows no subsets: invisible channels are zero, the loss is nnU-Net's.

    Args:
        trainer: after nnU-Net's own initialisation.
    """

    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    """Those stepped together with nnU-Net's."""

    def __init__(self, trainer: nnUNetTrainerMGML) -> None:
        self.config = trainer.config
        self.network = trainer.network
        self.segmentation_loss = trainer.loss
        self.device = trainer.device

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

    def start_epoch(self, epoch: int, num_epochs: int) -> None:
        """Called before every epoch (from 0)."""

    def loss(self, batch: dict[str, Any], ramp: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Predict and compute the loss of one step.

        Args:
            batch: the loader's, on the training's device.
            ramp: weight in [0, 1] of the terms that are warmed up.

        Returns:
            The scalar for backward, and detached scalars by column of the log.
        """
        output = self.network(zero_absent(batch["data"], visible_modalities(batch)))
        return self.segmentation_loss(output, batch["target"]), {}

    def end_epoch(self, epoch: int, num_epochs: int, warmed_up: bool) -> dict[str, float]:
        """Called after the steps of every epoch; returns further columns of the log."""
        return {}

    @contextmanager
    def only_visible(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the batch of a validation step, of which the network sees the visible modalities only."""
        yield {**batch, "data": zero_absent(batch["data"], visible_modalities(batch))}

    def announce(self, subset: Subset | None) -> None:
        """Called before nnU-Net predicts a whole case that has ``subset``, and with None after the last one."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps beside nnU-Net's own."""
        return {}

    def load_state_dict(self, state: dict[str, Any], stored: MGMLConfig) -> None:
        """Take over a checkpoint's state.

        Args:
            state: what `state_dict` returned; tensors may still be on the disk, so what is kept must be a copy.
            stored: the options of the checkpoint.

        Raises:
            ValueError: it was written with other terms that keep a state.
        """


class SubsetLearner(Learner):
    """`MultiEncoderUNet`, told what is visible, and the losses of eq. 10."""

    def __init__(self, trainer: nnUNetTrainerMGML) -> None:
        super().__init__(trainer)
        config = self.config
        self.num_modalities = len(trainer.channels)
        self.use_mask_for_norm = trainer.configuration_manager.use_mask_for_norm
        self.meta_network: nn.Module | None = build_meta_network(config, self.num_modalities, trainer.num_classes)
        if self.meta_network is not None:
            self.meta_network.to(self.device)
            if trainer.is_ddp:
                self.meta_network = DistributedDataParallel(self.meta_network, device_ids=[trainer.local_rank])
            self.optimizers = (torch.optim.Adam(self.meta_network.parameters(), config.meta_lr),)
        self.mgml_loss = MGMLLoss(
            config,
            trainer.loss,
            regions=trainer.label_manager.has_regions,
            num_classes=trainer.num_classes,
            ignore_label=trainer.label_manager.ignore_label,
            batch_dice=trainer.configuration_manager.batch_dice,
            meta_network=self.meta_network,
        )
        self.balance = (
            ModalityBalance(trainer.channels, config.rebalancing_rate, self.device) if config.uses_rebalancing else None
        )
        self._teacher_transforms = stronger_intensity_transforms() if config.teacher_augmentation else None
        self._bare_network = cast("MultiEncoderUNet", trainer.bare_network)

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
        return build_network(
            configuration_manager,
            MGMLConfig.from_plans(plans),
            num_input_channels,
            num_output_channels,
            plans[PLANS_KEY]["num_classes"],
            deep_supervision,
        )

    def describe(self) -> list[str]:
        """Return the number of parameters of each part."""

        def millions(module: nn.Module | None) -> float:
            return 0.0 if module is None else sum(p.numel() for p in module.parameters()) / 1e6

        network = self._bare_network
        return [
            f"MGML: fusion {self.config.fusion}; parameters in millions: network {millions(network):.3f} (encoders "
            f"{millions(network.encoders):.3f}, fusion {millions(network.fusion):.3f}, decoder "
            f"{millions(network.decoder):.3f}, shared modality decoder {millions(network.modality_decoder):.3f}), "
            f"MetaNetwork {millions(self.meta_network):.4f} (training only)"
        ]

    def start_training(self, availability: Iterable[Subset]) -> None:
        """Count how many training cases have each modality."""
        if self.balance is not None:
            self.balance.count_cases(availability)

    def start_epoch(self, epoch: int, num_epochs: int) -> None:
        """Put the MetaNetwork's learning rate on the same poly schedule as the network's."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.meta_lr * (1 - epoch / num_epochs) ** 0.9

    @property
    def needs_teacher(self) -> bool:
        """Whether a pass on all modalities is needed; rebalancing has one anyway where no modality is removed."""
        return (
            self.config.uses_teacher
            or self.config.supervises_teacher
            or (self.config.uses_rebalancing and self.config.mask_sampling != "fixed")
        )

    def loss(self, batch: dict[str, Any], ramp: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The masked student, the complete teacher and the losses of eq. 10; see `Learner.loss`."""
        data, visible, available = batch["data"], visible_modalities(batch), batch["available"]
        own_view = None
        if self._teacher_transforms is not None and self.config.uses_teacher:
            own_view = teacher_view(data, self.num_modalities, self._teacher_transforms, self.use_mask_for_norm)
        output = self.network(
            data,
            modality_mask=visible,
            available=available,
            return_aux=True,
            with_teacher=self.needs_teacher,
            teacher_input=own_view,
            with_single=self.balance is not None,
            teacher_learns=self.config.supervises_teacher,
        )
        weights = None if self.balance is None else self.balance.weights()
        terms = self.mgml_loss(output, batch["target"], visible, available, ramp, weights)
        if self.balance is not None:
            self.balance.observe(terms.distance, available)
        logged = {
            name if name in MetaParameters._fields else f"train_{name}": value for name, value in terms.parts.items()
        }
        return terms.total, logged

    def end_epoch(self, epoch: int, num_epochs: int, warmed_up: bool) -> dict[str, float]:
        """Weigh the modalities anew once the warm-up is over."""
        return {} if self.balance is None else self.balance.end_epoch(epoch, num_epochs, warmed_up)

    @contextmanager
    def only_visible(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Tell the network what is visible for the duration of a validation step."""
        self._bare_network.set_availability(visible_modalities(batch).to(self.device))
        try:
            yield batch
        finally:
            self.announce(None)

    def announce(self, subset: Subset | None) -> None:
        """Tell the network which modalities the next case has."""
        self._bare_network.set_availability(subset)

    def state_dict(self) -> dict[str, Any]:
        """Return the MetaNetwork, its optimizer, and the weights of the modalities where they are balanced."""
        balance = {} if self.balance is None else {"balance": self.balance.state_dict()}
        if self.meta_network is None:
            return {"meta_network": None, "meta_optimizer": None, **balance}
        return {
            "meta_network": bare(self.meta_network).state_dict(),
            "meta_optimizer": self.optimizers[0].state_dict(),
            **balance,
        }

    def load_state_dict(self, state: dict[str, Any], stored: MGMLConfig) -> None:
        """See `Learner.load_state_dict`."""
        if (state.get("meta_network") is None) != (self.meta_network is None):
            raise cannot_resume("soft_label", stored.soft_label, self.config.soft_label)
        if ("balance" in state) != (self.balance is not None):
            raise cannot_resume("rebalancing", stored.rebalancing, self.config.rebalancing)
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])
        if self.meta_network is not None:
            bare(self.meta_network).load_state_dict(state["meta_network"])
            # a copy, since on a CPU the optimizer would keep the tensors, and with them the mapped file
            self.optimizers[0].load_state_dict(copy.deepcopy(state["meta_optimizer"]))
