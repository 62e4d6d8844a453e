"""`nnUNetTrainerMGML`: the multi-encoder network, Meta-AMF and consistency regularisation inside nnU-Net's trainer."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mgml.dataloading.teacher_view import stronger_intensity_transforms, teacher_view
from nnunetv2_mgml.io.files import replacing
from nnunetv2_mgml.modalities import Subset
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.objective import MetaParameters, MGMLLoss, Options, build_meta_network, needs_of
from nnunetv2_mgml.objective.base import SharedOptions
from nnunetv2_mgml.objective.terms.rebalancing import RebalancingOptions
from nnunetv2_mgml.objective.terms.soft_label import SoftLabelOptions
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.presentation.figures.style import save
from nnunetv2_mgml.presentation.figures.training import training_curves
from nnunetv2_mgml.training.base import MissingModalityTrainer
from nnunetv2_mgml.training.rebalancing import ModalityBalance

CHECKPOINT_KEY = "mgml"
FIGURE_NAME = "mgml_progress.png"
_CLIP_NORM = 12.0  # nnU-Net's


class nnUNetTrainerMGML(MissingModalityTrainer):  # noqa: N801  nnU-Net's naming scheme; the name is the CLI's argument
    """Trains one model for every subset of the modalities.

    Overridden hooks, beside those of the base: ``build_network_architecture``, ``initialize``, ``on_train_start``,
    ``on_train_epoch_start``, ``train_step`` (mirrored), ``on_train_epoch_end``, ``on_epoch_end``, ``save_checkpoint``,
    ``load_checkpoint``.
    """

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network; at inference nnU-Net calls this with the plans found beside the checkpoint.

        Raises:
            ValueError: plans that no trainer of ours has completed (the number of label classes is not in them).
        """
        block = plans_manager.plans.get(PLANS_KEY, {})
        if "num_classes" not in block:
            raise ValueError(
                f"The plans hold no '{PLANS_KEY}.num_classes'. Use the plans.json which {cls.__name__} "
                f"wrote into its model folder, not those in nnUNet_preprocessed."
            )
        options = cls.resolve_options(plans_manager.plans)
        return build_network(
            configuration_manager,
            options.network,
            num_input_channels,
            num_output_channels,
            block["num_classes"],
            enable_deep_supervision,
            needs_of(options),
        )

    def initialize(self) -> None:
        """Build the MetaNetwork, its optimiser and the loss on top of nnU-Net's initialisation."""
        super().initialize()
        self.meta_network: nn.Module | None = build_meta_network(self.options, self.num_modalities, self.num_classes)
        self.meta_optimizer: torch.optim.Optimizer | None = None
        if self.meta_network is not None:
            self.meta_network.to(self.device)
            if self.is_ddp:
                self.meta_network = DistributedDataParallel(self.meta_network, device_ids=[self.local_rank])
            self.meta_optimizer = torch.optim.Adam(
                self.meta_network.parameters(), self.options.objective[SoftLabelOptions].meta_lr
            )
        self.needs = needs_of(self.options)
        self.mgml_loss = MGMLLoss(
            self.options,
            self.loss,
            regions=self.label_manager.has_regions,
            num_classes=self.num_classes,
            ignore_label=self.label_manager.ignore_label,
            batch_dice=self.configuration_manager.batch_dice,
            meta_network=self.meta_network,
        )
        rate = self.options.objective[RebalancingOptions].rebalancing_rate
        self.balance = ModalityBalance(self.channels, rate, self.device) if self.needs.single else None
        self._teacher_transforms = stronger_intensity_transforms() if self.needs.own_view else None
        self._report_size()

    def _report_size(self) -> None:
        def millions(module: nn.Module | None) -> float:
            return 0.0 if module is None else sum(p.numel() for p in module.parameters()) / 1e6

        network = self.bare_network
        self.print_to_log_file(
            f"MGML: fusion {self.options.network.fusion}; parameters in millions: network {millions(network):.3f} "
            f"(encoders {millions(network.encoders):.3f}, fusion {millions(network.fusion):.3f}, decoder "
            f"{millions(network.decoder):.3f}, shared modality decoder {millions(network.modality_decoder):.3f}), "
            f"MetaNetwork {millions(self.meta_network):.4f} (training only)"
        )

    @property
    def ramp(self) -> float:
        """Weight in [0, 1] of the soft-label and consistency terms at the current step (linear warm-up)."""
        share = self.options.objective[SharedOptions].ramp_up_fraction
        steps = share * self.num_epochs * self.num_iterations_per_epoch
        done = self.current_epoch * self.num_iterations_per_epoch + self._steps_in_epoch
        return 1.0 if steps <= 0 else min(1.0, done / steps)

    def on_train_start(self) -> None:
        """Count how many training cases have each modality."""
        super().on_train_start()
        if self.balance is not None:
            self.balance.count_cases(self.training_availability.values())

    def on_train_epoch_start(self) -> None:
        """Put the MetaNetwork's learning rate on the same poly schedule as the network's."""
        super().on_train_epoch_start()
        if self.meta_optimizer is not None:
            meta_lr = self.options.objective[SoftLabelOptions].meta_lr
            for group in self.meta_optimizer.param_groups:
                group["lr"] = meta_lr * (1 - self.current_epoch / self.num_epochs) ** 0.9

    def train_step(self, batch: dict) -> dict[str, Any]:
        """nnU-Net's step with the masked student, the complete teacher and the losses of eq. 10."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        target = (
            [t.to(self.device, non_blocking=True) for t in target]
            if isinstance(target, list)
            else target.to(self.device, non_blocking=True)
        )
        mask = batch["modality_mask"].to(self.device, non_blocking=True)
        available = batch["available"].to(self.device, non_blocking=True)
        own_view = None
        if self._teacher_transforms is not None:
            own_view = teacher_view(
                data, self.num_modalities, self._teacher_transforms, self.configuration_manager.use_mask_for_norm
            )
        with self.autocast():
            output = self.network(
                data,
                modality_mask=mask,
                available=available,
                return_aux=True,
                with_teacher=self.needs.complete != "no",
                teacher_input=own_view,
                with_single=self.needs.single,
                teacher_learns=self.needs.complete == "learns",
            )
            terms = self.mgml_loss(
                output, target, mask, available, self.ramp, None if self.balance is None else self.balance.weights()
            )
        self._optimize(terms.total)
        if self.balance is not None:
            self.balance.observe(terms.distance, available)
        self._steps_in_epoch += 1
        names = list(terms.parts)
        values = torch.stack([terms.total.detach().float(), *(terms.parts[n].float() for n in names)]).cpu().numpy()
        columns = [name if name in MetaParameters._fields else f"train_{name}" for name in names]
        return {"loss": values[0], **{name: float(v) for name, v in zip(columns, values[1:], strict=True)}}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the loss terms, then weigh the modalities anew once the warm-up is over."""
        super().on_train_epoch_end(train_outputs)
        if self.balance is not None:
            self.training_log.add(self.balance.end_epoch(self.current_epoch, self.num_epochs, self.ramp >= 1))

    def _optimize(self, loss: torch.Tensor) -> None:
        optimizers = [self.optimizer] if self.meta_optimizer is None else [self.optimizer, self.meta_optimizer]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def only_visible(self, batch: dict) -> AbstractContextManager[dict]:
        """Tell the network the batch's mask for the duration of a validation step."""

        @contextmanager
        def told() -> Iterator[dict]:
            self.bare_network.set_availability(batch["modality_mask"].to(self.device))
            try:
                yield batch
            finally:
                self.bare_network.set_availability(None)

        return told()

    def set_case_availability(self, subset: Subset | None) -> None:
        """Tell the network which modalities the next case has."""
        self.bare_network.set_availability(subset)

    def on_epoch_end(self) -> None:
        """Draw the curves after the epoch's row is written."""
        super().on_epoch_end()
        if self.local_rank == 0:
            save(training_curves(self.training_log.rows), os.path.join(self.output_folder, FIGURE_NAME))

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint plus, under a key of its own, what only training needs; renamed into place."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with replacing(filename) as temporary:
            super().save_checkpoint(str(temporary))
            checkpoint = torch.load(temporary, map_location="cpu", weights_only=False)
            checkpoint[CHECKPOINT_KEY] = self._training_state()
            torch.save(checkpoint, temporary)
        self._weights_file = filename

    def _training_state(self) -> dict[str, Any]:
        balance = {} if self.balance is None else {"balance": self.balance.state_dict()}
        if self.meta_network is None or self.meta_optimizer is None:
            return {"meta_network": None, "meta_optimizer": None, **balance}
        return {
            "meta_network": self._bare_meta_network().state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            **balance,
        }

    def _bare_meta_network(self) -> nn.Module:
        return self.meta_network.module if isinstance(self.meta_network, DistributedDataParallel) else self.meta_network

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's loading, then the MetaNetwork, its optimiser and the balance, so that ``--c`` resumes exactly.

        Raises:
            ValueError: the checkpoint was written with another choice of soft label or of rebalancing.
        """
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = filename_or_checkpoint
        if isinstance(checkpoint, str):
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
        state = checkpoint.get(CHECKPOINT_KEY, {"meta_network": None})
        if (state["meta_network"] is None) != (self.meta_network is None):
            raise ValueError(self._mismatch(checkpoint, "soft_label"))
        if ("balance" in state) != (self.balance is not None):
            raise ValueError(self._mismatch(checkpoint, "rebalancing"))
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])
        if self.meta_network is not None and self.meta_optimizer is not None:
            self._bare_meta_network().load_state_dict(state["meta_network"])
            # a copy, since on a CPU the optimiser would keep the tensors, and with them the mapped file
            self.meta_optimizer.load_state_dict(copy.deepcopy(state["meta_optimizer"]))

    def _mismatch(self, checkpoint: dict[str, Any], option: str) -> str:
        return self.option_mismatch(option, Options.from_plans(checkpoint["init_args"]["plans"]).value(option))
