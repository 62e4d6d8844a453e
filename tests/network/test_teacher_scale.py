"""`teacher_scale`: the prediction from all modalities, and what is learned from it, end before full resolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import network, options_with
from loss_cases import labels_of, nnunet_loss, objective_of, slow_consistency_loss
from network_cases import LAYOUTS, batch, config
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.objective import Options, needs_of
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.plans.presets import PAPER_LOSSES, REFERENCE_LOSSES

MASK = torch.tensor([[True, False, True, True], [False, True, False, False]])
VIEW = View(MASK, torch.ones_like(MASK))
HALF = Needs("learns", teacher_scale=1)
FORMS: list[dict[str, Any]] = [
    {"fusion": "mean"},
    {"fusion": "region_aware"},
    {"fusion": "concat", "network_form": "early_fusion"},
]


@pytest.mark.parametrize("changes", FORMS, ids=lambda changes: "-".join(changes.values()))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ends_with_the_output_of_that_scale(changes: dict[str, Any], layout: str) -> None:
    """What comes out is what the whole pass has there, and nothing finer of the decoder learns from it."""
    sizes = LAYOUTS[layout]
    net = network(options_with(width_factor=1.0, **changes), deep_supervision=True, **sizes)
    x = batch(sizes["patch"])
    whole, half = net(x, VIEW, Needs("learns")), net(x, VIEW, HALF)
    assert len(half.complete) == len(whole.complete) - 1 == len(half.student) - 1
    for one, other in zip(half.complete, whole.complete[1:], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for one, other in zip(half.student, whole.student, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    sum(output.sum() for output in half.complete).backward()
    untouched = {name for name, p in net.decoder.named_parameters() if p.grad is None or not p.grad.any()}
    net.zero_grad(set_to_none=True)
    sum(output.sum() for output in whole.complete).backward()
    last = len(net.decoder.transpconvs) - 1 if hasattr(net.decoder, "transpconvs") else 0  # a trunk's finest is 0
    of_finest = tuple(f"{part}.{last}." for part in ("stages", "transpconvs", "seg_layers", "up", "merge", "heads"))
    assert untouched == {name for name, _ in net.decoder.named_parameters() if name.startswith(of_finest)}
    assert untouched
    assert all(p.grad is not None and p.grad.any() for p in net.decoder.parameters())


@pytest.mark.parametrize(("deep", "stages"), [(False, 3), (True, 2)])
def test_at_full_resolution_where_no_coarser_output_is(deep: bool, stages: int) -> None:
    """Without deep supervision, and with two stages."""
    net = network(config("mean"), deep_supervision=deep, stages=stages)
    x = batch((16, 16, 16))
    whole, half = net(x, VIEW, Needs("target")), net(x, VIEW, HALF._replace(complete="target"))
    assert len(half.complete) == len(half.student) == 1
    assert torch.equal(half.complete[0], whole.complete[0])


def test_the_finer_wish_counts() -> None:
    """Of those who want a prediction from all modalities at all."""
    half, whole = HALF, Needs("target")
    assert half.union(Needs(modality=True)) == Needs("learns", modality=True, teacher_scale=1)
    assert half.union(half) == half
    assert half.union(whole) == whole.union(half) == Needs("learns")
    half = {"teacher_scale": 1}
    assert needs_of(options_with(**half)).teacher_scale == 1
    assert needs_of(options_with(**half, complete_view_weight=0.0)).teacher_scale == 1
    assert needs_of(options_with(**half, rebalancing="passion")).teacher_scale == 0
    for losses in (PAPER_LOSSES, REFERENCE_LOSSES):
        assert needs_of(options_with(**{**losses, **half})).teacher_scale == 0
        assert needs_of(options_with(**{**losses, **half, "complete_view_weight": 1.0})).teacher_scale == 0


@pytest.mark.parametrize("teaching", ["everywhere", "better"])
@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("regions", [True, False])
def test_losses_are_those_of_that_scale(regions: bool, ignore: bool, teaching: str) -> None:
    """Consistency by the slow reference on the second outputs; nnU-Net's loss with its first weights."""
    torch.manual_seed(0)
    options = config("mean", teacher_scale=1, soft_label="none", consistency_weight=0.5, teaching=teaching)
    heads = 3 if regions else 4
    net = network(options, deep_supervision=True, patch=(8, 8, 8), heads=heads)
    labels = labels_of(2, 8, 8, 8, classes=4 + ignore)
    full = torch.stack([(labels >= k) & (labels < 4) for k in (1, 2, 3)] + [labels == 4] * ignore, 1)
    target = [own.float() for t in [full if regions else labels[:, None]] for own in (t, t[:, :, ::2, ::2, ::2])]
    stock = nnunet_loss(regions, 4 if ignore else None)
    loss = DeepSupervisionWrapper(stock, [0.7, 0.3])
    objective = objective_of(options, regions=regions, ignore_label=4 if ignore else None, segmentation_loss=loss)
    output = net(batch((8, 8, 8)), VIEW, objective.needs)
    found = objective(output, target, VIEW).parts
    coarse = labels[:, ::2, ::2, ::2]
    truth = None
    if teaching == "better":
        truth = full[:, :3, ::2, ::2, ::2] if regions else torch.where(coarse < 4, coarse, 0)
    expected = slow_consistency_loss(
        output.student[1].detach(),
        output.complete[0].detach(),
        MASK,
        torch.ones_like(MASK),
        6.0,
        regions,
        coarse < 4 if ignore else None,
        truth,
    )
    assert found["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert found["complete"].item() == pytest.approx(0.7 * stock(output.complete[0], target[1]).item(), rel=1e-5)


def test_the_teacher_of_single_modalities_is_whole() -> None:
    """Whatever the objective's other terms want: its students end at full resolution."""
    net = network(config("mean"), deep_supervision=True)
    x = batch((16, 16, 16))
    both, alone = (net(x, VIEW, Needs("target", single=True, teacher_scale=s)).single for s in (1, 0))
    for one, other in zip(both.teacher, alone.teacher, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert both.teacher_features.shape[2:] == both.features.shape[3:]
    assert torch.allclose(both.teacher_features, alone.teacher_features, atol=1e-5)


def test_checkpointing_changes_nothing() -> None:
    net = network(config("region_aware"), deep_supervision=True)
    x = batch((16, 16, 16))

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        net.gradient_checkpointing = checkpointing
        net.zero_grad(set_to_none=True)
        sum(output.square().mean() for output in net(x, VIEW, HALF).complete).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_plans_of_before_keep_full_resolution() -> None:
    block = {"version": "0.2.0", "config": {"fusion": "mean"}}
    assert Options.from_plans({PLANS_KEY: block}).value("teacher_scale") == 0
    assert (
        Options.from_plans({PLANS_KEY: {"version": "0.2.0", "config": {"teacher_scale": 1}}}).value("teacher_scale")
        == 1
    )
