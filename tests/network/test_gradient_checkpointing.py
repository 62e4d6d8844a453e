"""``gradient_checkpointing``: the same training in less memory."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from builders import configuration
from network_cases import batch, config
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.objective.memory import step_memory
from nnunetv2_mgml.training.trainer import nnUNetTrainerMGML

PATCH = (16, 16, 16)


def gradients(
    recompute: bool, dropout: bool, needs: Needs, view: View, fusion: str = "region_aware", **options: object
) -> list[torch.Tensor]:
    """Return outputs and gradients of a step with the same weights and random numbers."""
    plan = configuration(PATCH)
    if dropout:
        plan["architecture"]["arch_kwargs"].update(dropout_op="torch.nn.Dropout3d", dropout_op_kwargs={"p": 0.4})
    torch.manual_seed(0)
    network = build_network(ConfigurationManager(plan), config(fusion, **options).network, 4, 3, 4, True, needs)
    network.gradient_checkpointing = recompute
    torch.manual_seed(1)
    out = network(batch(PATCH), view, needs)
    assert out.modality is not None
    assert out.complete is not None
    outputs = [*out.student, *out.complete, out.modality]
    torch.manual_seed(2)  # as whatever draws before the backward pass
    sum(output.square().mean() for output in outputs).backward()
    return [*(output.detach() for output in outputs), *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("own_images", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_same_outputs_and_gradients(dropout: bool, own_images: bool) -> None:
    """Bit for bit, with the plan's dropout too, and where the teacher, which is silent, has images of its own."""
    visible = torch.tensor([[True, False, True, True], [False, True, False, False]])
    view = View(visible, torch.ones_like(visible), 1.1 * batch(PATCH) if own_images else None)
    needs = Needs(complete="learns", modality=True)
    kept, again = (gradients(recompute, dropout, needs, view) for recompute in (False, True))
    assert len(kept) == len(again)
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))


@pytest.mark.parametrize(("fusion", "share"), [("demoseg", 0.7), ("uhved", 0.95)])
def test_early_fusion_has_the_same_gradients_in_less_memory(fusion: str, share: float) -> None:
    """What draws random numbers, the fusion of `uhved`, is not computed again; here it takes most of the memory."""
    visible = torch.tensor([[True, False, True, True], [False, True, False, False]])
    view, needs = View(visible, torch.ones_like(visible)), Needs(complete="learns", modality=True)
    options = {"network_form": "early_fusion", "decoder_width_ratio": 1.0}
    kept, again = (gradients(recompute, False, needs, view, fusion, **options) for recompute in (False, True))
    assert len(kept) == len(again)
    assert all(torch.equal(one, two) for one, two in zip(kept, again, strict=True))
    needed = []
    for recompute in (False, True):
        plans = builders.plans()
        plans["mgml"] = {"config": {**builders.TINY, **options, "fusion": fusion, "gradient_checkpointing": recompute}}
        needed.append(step_memory(plans, "3d_fullres", builders.BRATS_JSON).peak)
    assert needed[1] < share * needed[0]


@pytest.mark.parametrize(
    ("form", "module"), [("multi_encoder", "multi_encoder_unet"), ("shared_encoder", "shared_encoder")]
)
def test_only_training_steps_pay(form: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = builders.network(config("concat", network_form=form)).eval()
    network.gradient_checkpointing = True

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(f"nnunetv2_mgml.network.{module}.checkpoint", refuse)
    with torch.no_grad():
        network(batch(PATCH))
        network.train()(batch(PATCH))
    with pytest.raises(AssertionError):
        network(batch(PATCH))


def test_a_step_needs_less_memory() -> None:
    needed = []
    for recompute in (False, True):
        plans = builders.plans()
        plans["mgml"] = {"config": {**builders.TINY, "gradient_checkpointing": recompute, "width_factor": 1.0}}
        needed.append(step_memory(plans, "3d_fullres", builders.BRATS_JSON))
    assert needed[0].weights == needed[1].weights
    assert needed[1].peak < 0.92 * needed[0].peak  # these encoders have one convolution per stage


def test_the_plans_option_reaches_the_network(nnunet_folders: Any) -> None:
    written = builders.write_dataset(nnunet_folders)
    trainer = builders.make_trainer(nnUNetTrainerMGML, written, {"gradient_checkpointing": True})
    trainer.initialize()
    assert trainer.bare_network.gradient_checkpointing is True
