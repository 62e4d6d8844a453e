"""One training step, ours or stock nnU-Net's: the one file of the benchmarks that knows how the package trains.

Everything is as nnU-Net's trainer has it: its Dice and cross-entropy under deep supervision, SGD with Nesterov
momentum, gradients clipped at 12, autocast (16 bit) with a gradient scaler on CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mgml.modalities import BRATS_CHANNELS
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.network.subset_module import zero_absent
from nnunetv2_mgml.objective import Objective, Options, TermSpec, needs_of

MODALITIES, CLASSES, REGIONS = 4, 4, 3
CLIP_NORM = 12.0
TERMS: dict[str, dict[str, Any]] = {
    "plain": {"soft_label": "none", "consistency_weight": 0.0, "complete_view_weight": 0.0},
    "mgml": {"complete_view_weight": 0.0},
    "shipped": {},
}
"""Without our terms; with Meta-AMF and L_CR; with the loss on the complete view as well (the default)."""
DESIGNS: dict[str, dict[str, Any]] = {
    **{name: {"fusion": name} for name in fusion_designs()},
    "region_aware_full": {"fusion": "region_aware", "fusion_options": {"full_resolution_regions": True}},
    "demoseg_early": {"fusion": "demoseg", "network_form": "early_fusion"},
}
"""Every design with its default options, the design of `nnUNetTrainerRFNet`, and the early-fusion form."""


class Batch(NamedTuple):
    """What a loader gives: ``B`` samples of ``M`` modalities."""

    x: torch.Tensor
    """``(B, M, *spatial)`` float32, z-scores; all the case has, also what is not visible."""
    targets: list[torch.Tensor]
    """Regions ``(B, R, *spatial_s)`` bool, full resolution first."""
    visible: torch.Tensor
    """``(B, M)`` bool, what the network may see."""
    available: torch.Tensor
    """``(B, M)`` bool, what the case has."""


def make_plan(
    patch: Sequence[int], stages: int, convs: int = 2, widths: Sequence[int] | None = None
) -> ConfigurationManager:
    """Return nnU-Net's PlainConvUNet in 3d for four modalities, every stage but the first at half the resolution.

    Args:
        patch: voxels per axis.
        stages: resolution stages.
        convs: convolutions per stage.
        widths: feature channels per stage; None: nnU-Net's 32, 64, 128, 256, 320, 320.
    """
    unet = {
        "n_stages": stages,
        "features_per_stage": list(widths or [min(320, 32 * 2**s) for s in range(stages)]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [convs] * stages,
        "n_conv_per_stage_decoder": [convs] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return ConfigurationManager(
        {
            "patch_size": list(patch),
            "batch_dice": False,
            "normalization_schemes": ["ZScoreNormalization"] * MODALITIES,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": unet,
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    )


def scales(plan: ConfigurationManager) -> list[list[int]]:
    """Return, per output of deep supervision, by how much its grid is coarser than the patch's, per axis."""
    strides = [list(np.ravel(stride)) for stride in plan.network_arch_init_kwargs["strides"]]
    return np.cumprod(strides, 0)[:-1].tolist()


def at_scales(target: torch.Tensor, plan: ConfigurationManager) -> list[torch.Tensor]:
    """Return a target ``(B, R, *patch)`` for every output of deep supervision, sampled as nnU-Net does it."""
    return [target[(..., *(slice(step // 2, None, step) for step in steps))] for steps in scales(plan)]


def nnunet_loss(plan: ConfigurationManager, every_head: bool = False) -> nn.Module:
    """Return the loss nnU-Net's trainer builds for regions; ``every_head``: as under DDP, which waits for all heads."""
    loss = DC_and_BCE_loss(
        {}, {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}, dice_class=MemoryEfficientSoftDiceLoss
    )
    weights = np.array([0.5**scale for scale in range(len(scales(plan)))])
    weights[-1] = 1e-6 if every_head else 0
    return DeepSupervisionWrapper(loss, (weights / weights.sum()).tolist())


class Learner:
    """Our network with the losses its options ask for.

    Args:
        plan: of nnU-Net.
        options: of the plugin; what is not named has its default.
        device: torch device.
        distributed: whether to wrap for DDP (the process group exists).
        every_head: whether the coarsest head learns too, as under DDP.

    Attributes:
        network: what nnU-Net's trainer calls so, without wrappers.
        called: the network as it is called, possibly wrapped for DDP or compiled.
        extra: modules only training has, with a learning rate of their own each.
    """

    def __init__(
        self,
        plan: ConfigurationManager,
        options: Mapping[str, Any],
        device: torch.device | str = "cpu",
        distributed: bool = False,
        every_head: bool = False,
    ) -> None:
        self.options = Options().updated(dict(options))
        needs = needs_of(self.options)
        self.network: nn.Module = build_network(
            plan, self.options.network, MODALITIES, REGIONS, CLASSES, True, needs
        ).to(device)
        self.network.gradient_checkpointing = self.options.training.gradient_checkpointing
        self.called = DistributedDataParallel(self.network) if distributed else self.network
        spec = TermSpec(self.options, BRATS_CHANNELS, CLASSES, True, nnunet_loss(plan, every_head))
        self.objective = Objective(spec).to(device)
        self.extra: list[tuple[nn.Module, float]] = [
            (self.objective, optimizer.param_groups[0]["lr"]) for optimizer in self.objective.optimizers
        ]
        if distributed:
            self.objective.distribute(DistributedDataParallel)

    def loss(self, batch: Batch, ramp: float | torch.Tensor = 1.0, full: bool = True) -> torch.Tensor:
        """Return the total loss of a batch: forward pass and all terms.

        Args:
            batch: on the network's device.
            ramp: weight of the terms that are warmed up, in [0, 1].
            full: whether the step is a full one, or one between (``complete_every``).
        """
        view = self.objective.draw_view(batch.visible, batch.available, full=full)
        if not full and batch.x.device.type == "cpu":
            view = view.of_available()
        output = self.called(batch.x, view, self.objective.needs_in(full))
        return self.objective(output, batch.targets, view, ramp, full).total

    def modules(self) -> list[nn.Module]:
        """Return everything with parameters."""
        return [self.network, *(module for module, _ in self.extra)]

    def predict(self, x: torch.Tensor, subsets: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, S, R, *spatial)`` of ``x (B, M, *spatial)`` for subsets ``(S, M)`` bool, encoded once."""
        return self.network.decode_subsets(self.network.encode(x), subsets)


class StockLearner(Learner):
    """Stock nnU-Net's network and loss, its absent channels empty: `nnUNetTrainerModalityDropout`.

    Args:
        plan: the network's.
        device: of the network.
        width_factor: feature channels as a multiple of the plan's.
        conditional: with conditional norms, `nnUNetTrainerModalityDropout_conditional`.
    """

    def __init__(
        self,
        plan: ConfigurationManager,
        device: torch.device | str = "cpu",
        width_factor: float = 1.0,
        conditional: bool = False,
    ) -> None:
        kwargs = copy.deepcopy(plan.network_arch_init_kwargs)
        kwargs["features_per_stage"] = [max(8, round(w * width_factor / 8) * 8) for w in kwargs["features_per_stage"]]
        self.network = get_network_from_plans(
            plan.network_arch_class_name,
            kwargs,
            plan.network_arch_init_kwargs_req_import,
            MODALITIES,
            REGIONS,
            allow_init=True,
            deep_supervision=True,
        ).to(device)
        if conditional:
            self.network = ConditionedUNet(self.network, MODALITIES)
        self.conditional = conditional
        self.called = self.network
        self.extra = []
        self.objective = nnunet_loss(plan)

    def loss(self, batch: Batch, ramp: float | torch.Tensor = 1.0, full: bool = True) -> torch.Tensor:
        """Return nnU-Net's loss of a batch; every step is alike."""
        if self.conditional:
            return self.objective(list(self.called(batch.x, batch.visible)), batch.targets)
        return self.objective(list(self.called(zero_absent(batch.x, batch.visible))), batch.targets)

    def predict(self, x: torch.Tensor, subsets: torch.Tensor) -> torch.Tensor:
        """Return logits as `Learner.predict`, from one pass per subset."""
        if self.conditional:
            return self.network.decode_subsets([x], subsets)
        rows = [self.network(zero_absent(x, row.expand(len(x), -1))) for row in subsets]
        return torch.stack(rows, 1)


def random_batch(plan: ConfigurationManager, size: int, device: torch.device | str = "cpu", seed: int = 0) -> Batch:
    """Return noise with random labels; sample by sample three modalities are visible, or one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, MODALITIES, *plan.patch_size, generator=generator)
    labels = torch.randint(0, CLASSES, (size, 1, *plan.patch_size), generator=generator)
    target = torch.cat([labels >= region for region in range(1, CLASSES)], 1).to(device)
    rows = [[True, False, True, True], [False, True, False, False]]
    visible = torch.tensor([rows[sample % 2] for sample in range(size)], device=device)
    return Batch(x.to(device), at_scales(target, plan), visible, torch.ones_like(visible))


class TrainingStep:
    """nnU-Net's training step for a learner and one batch; calling it does one step.

    Args:
        learner: network and losses.
        batch: on the learner's device.
        precision: "float16" (with a gradient scaler), "bfloat16" or "float32". None: as nnU-Net, float16 on CUDA and
            float32 elsewhere.
    """

    def __init__(self, learner: Learner, batch: Batch, precision: str | None = None) -> None:
        self.learner, self.batch = learner, batch
        self.device = batch.x.device
        self.precision = precision or ("float16" if self.device.type == "cuda" else "float32")
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(learner.network.parameters(), 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True),
            *(torch.optim.Adam(module.parameters(), rate) for module, rate in learner.extra),
        ]
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == "float16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return autocast(self.device, self.precision)

    def forward(self, full: bool = True) -> torch.Tensor:
        """Forward pass and loss."""
        with self.autocast():
            return self.learner.loss(self.batch, full=full)

    def __call__(self, full: bool = True) -> torch.Tensor:
        """Do one step, a full one or one between, and return its loss (on the device, detached)."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.forward(full)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for optimizer in self.optimizers if self.scaler is not None else ():
            self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.learner.network.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        return loss.detach()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return autocast to "float16" or "bfloat16" on a device, or no autocast for "float32"."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


def predictions(
    learner: Learner, x: torch.Tensor, subsets: Iterable[tuple[bool, ...]]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the predictions of a patch that are compared: from all modalities, from one, and for all subsets.

    Args:
        learner: ours; switched to inference.
        x: ``(1, M, *spatial)``.
        subsets: those of "fifteen", which runs the encoders once, and of "separately", one by one.
    """
    network = learner.network.eval()
    network.decoder.deep_supervision = False
    subsets = list(subsets)
    table = torch.tensor(subsets, device=x.device)

    def one(subset: tuple[bool, ...]) -> torch.Tensor:
        network.set_visible(subset)
        return network(x)

    return {
        "four": lambda: one((True,) * MODALITIES),
        "one": lambda: one((True, *(False,) * (MODALITIES - 1))),
        "fifteen": lambda: learner.predict(x, table),
        "separately": lambda: torch.stack([one(subset) for subset in subsets], 1),
    }
