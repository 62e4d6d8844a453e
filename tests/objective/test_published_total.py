"""The published code's total, as the preset ``reference-losses`` sets it, against numbers its script computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import options_with
from loss_cases import nnunet_loss
from oracle_cases import Oracle

from nnunetv2_mgml.network.interface import Needs, TrainingOutput
from nnunetv2_mgml.objective import Objective, Progress, TermSpec
from nnunetv2_mgml.objective.meta_network import MetaNetwork
from nnunetv2_mgml.objective.published import reference
from nnunetv2_mgml.objective.published.criteria import (
    at_full_size,
    dice_loss,
    label_criterion,
    one_hot,
    weighted_cross_entropy,
)
from nnunetv2_mgml.objective.published.fusion import class_weights
from nnunetv2_mgml.objective.terms.soft_label import SoftLabel
from nnunetv2_mgml.plans.presets import PAPER_LOSSES, REFERENCE_LOSSES, presets

EVERYONE = torch.ones(1, 4, dtype=torch.bool)
STUDENT_SEES = torch.tensor([[True, False, True, True]])


def objective_of(options: dict[str, Any], regions: bool = False) -> Objective:
    spec = TermSpec(options_with(**options), ("flair", "t1ce", "t1", "t2"), 4, regions, nnunet_loss(regions, None))
    return Objective(spec).double()


def meta_network(objective: Objective) -> MetaNetwork:
    [term] = [term for term in objective.each() if isinstance(term, SoftLabel)]
    assert isinstance(term.meta_network, MetaNetwork)
    return term.meta_network


@pytest.mark.parametrize("masked", [False, True])
def test_total_and_gradients_of_the_published_code(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, prefix = Oracle("mgml_total"), "r_" if masked else ""
    objective = objective_of({**REFERENCE_LOSSES, **({} if masked else {"mask_ratio": 0.0})})
    meta = meta_network(objective)
    oracle.load(
        meta, layers__0__weight="f1_w", layers__0__bias="f1_b", layers__2__weight="f2_w", layers__2__bias="f2_b"
    )
    if masked:
        keep = ~oracle["r_zero"].flatten(1)[None]
        monkeypatch.setattr(reference, "published_keep_map", lambda logits, ratio: keep)
    fuse, sep, prm = (oracle.leaf(f"{name}_x") for name in ("fuse", "sep", "prm"))
    lower = torch.zeros(1, 4, 2, 2, 3, dtype=torch.float64, requires_grad=True)  # deep supervision's, not published
    output = TrainingOutput(
        [fuse, lower],
        list(prm[:, None]),
        torch.zeros((), dtype=torch.float64),
        sep,
        [oracle["teacher_x"]],
    )
    target = oracle["lab"].long()[:, None]
    view = objective.draw_view(STUDENT_SEES, EVERYONE)
    value = objective(output, [target, target[..., ::2, ::2, ::2]], view, objective.ramp(Progress(0, 500)))
    for name, key in (
        ("segmentation", "fuse"),
        ("modality", "sep"),
        ("auxiliary", "prm"),
        ("soft_label", "lsl"),
        ("consistency", "lcr"),
    ):
        oracle.check(prefix + key, value.parts[name])
    assert objective_of({**REFERENCE_LOSSES}).spec.options.value("consistency_weight") == oracle["lam"].item()
    oracle.check(f"{prefix}total", value.total)
    value.total.backward()
    for key, leaf in (("fuse", fuse), ("sep", sep), ("prm", prm)):
        assert leaf.grad is not None
        oracle.check(f"{prefix}g_{key}", leaf.grad)
    assert lower.grad is not None
    assert not lower.grad.any()
    for key, parameter in zip(("f1_w", "f1_b", "f2_w", "f2_b"), meta.parameters(), strict=True):
        assert parameter.grad is not None
        oracle.check(f"{prefix}g_{key}", parameter.grad)


@pytest.mark.parametrize("case", ["a", "b"])
def test_criteria_of_the_published_code(case: str) -> None:
    """Weighted and plain cross-entropy, and Dice over a batch in which one sample lacks a class."""
    oracle = Oracle("mgml_criteria")
    truth = one_hot(oracle["lab"].long(), 4).double()
    losses = {
        "wce": lambda p: weighted_cross_entropy(p, truth, class_weights(truth)),
        "ce": lambda p: weighted_cross_entropy(p, truth, torch.ones(2, 4, dtype=torch.float64)),
        "dice": lambda p: dice_loss(p, truth),
    }
    for key, loss in losses.items():
        logits = oracle.leaf(f"{case}_x")
        value = loss(logits.softmax(1).flatten(2)[:, None])[0]
        oracle.check(f"{case}_{key}", value)
        value.backward()
        assert logits.grad is not None
        oracle.check(f"{case}_g_{key}", logits.grad)


def test_ignored_voxels_count_nowhere_in_the_published_criterion() -> None:
    """As if they were not there; heads do not influence each other."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 6, generator=generator)
    labels = torch.randint(4, (2, 6), generator=generator)
    valid = torch.tensor([True, True, True, True, False, False]).expand(2, -1)
    found = label_criterion(logits, labels, valid)
    torch.testing.assert_close(found, label_criterion(logits[..., :4], labels[:, :4]))
    torch.testing.assert_close(found[1:2], label_criterion(logits[:, 1:2], labels, valid))


def test_heads_are_brought_to_full_size_as_probabilities() -> None:
    head = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    full = at_full_size(head, (3, 3))
    torch.testing.assert_close(full.sum(1), torch.ones(1, 3, 3))
    torch.testing.assert_close(full[..., 1, 1], head.softmax(1).mean((2, 3)))


def test_masks_of_the_published_code() -> None:
    """Loss under its masks, and the statistics of what we draw."""
    oracle = Oracle("mgml_mask")
    logits, soft, ratio = oracle["x"], oracle["soft"], oracle["ratio"].item()
    # the published soft label is given, rounded to float32; any parameters do
    fixed = soft.clamp_min(1e-300).log()
    p = reference.MetaParameters.fixed(1, 0.5, 100.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "raw_fusion", lambda *_: fixed)
        for run, zero in enumerate(oracle["zero"]):
            loss = reference.reference_soft_label_loss(logits, p, 1.0, ratio, keep=~zero.flatten(1)[None])
            assert loss.item() == pytest.approx(oracle["zero_loss"][run].item(), rel=1e-7)
        whole = reference.reference_soft_label_loss(logits, p, 1.0, 0.0, keep=torch.ones(1, 4, 336).bool())
        assert whole.item() == pytest.approx(oracle["unmasked_loss"].item(), rel=1e-7)
    torch.manual_seed(0)
    runs = int(oracle["runs"])
    drawn = 1 - reference.published_keep_map(logits.expand(runs, -1, -1, -1, -1, -1), ratio).double().mean(2)
    mean, std = oracle["share_mean"].item(), oracle["share_std"].item()
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * std / runs**0.5)
    assert drawn.std(0).mean().item() == pytest.approx(std, rel=0.1)
    assert abs(torch.corrcoef(drawn.T)[0, 1].item()) < 5 / runs**0.5
    assert (drawn * 336).round().max() <= int(oracle["draws"])


def test_presets_of_losses() -> None:
    reference_options, paper = options_with(**REFERENCE_LOSSES), options_with(**PAPER_LOSSES)
    assert set(PAPER_LOSSES) == set(REFERENCE_LOSSES)
    for options, tau, weight in ((paper, 6, 1.08), (paper, 10, 3.0), (reference_options, 8, 1.92)):
        spec = TermSpec(options.updated({"temperature": tau}), ("a", "b"), 3, False, nnunet_loss(False, None))
        [term] = [term for term in Objective(spec).each() if isinstance(term, SoftLabel)]
        assert term.weight == pytest.approx(weight)
        assert Objective(spec).ramp(Progress(0, 100)) == 1
    assert Objective(TermSpec(paper, ("a", "b"), 3, True, nnunet_loss(True, None))).needs == Needs(
        complete="target", modality=True, own_view=True
    )
    assert Objective(TermSpec(reference_options, ("a", "b"), 3, True, nnunet_loss(True, None))).needs == Needs(
        complete="target", modality=True, noisy=True
    )
    both = presets(["paper", "paper-losses"])
    assert (both["num_epochs"], both["reading"]) == (900, "paper")
    with pytest.raises(ValueError, match="Choose one of the presets paper-losses and reference-losses"):
        presets(["paper-losses", "reference-losses"])


@pytest.mark.parametrize("name", ["criterion", "mask_mode"])
def test_what_only_the_published_code_has(name: str) -> None:
    for reading in ("ours", "paper"):
        with pytest.raises(ValueError, match=f"{name}=published needs reading=reference; got reading={reading}"):
            options_with(reading=reading, **{name: "published"})


def test_published_meta_network() -> None:
    """PyTorch's own spread, T1 and T2 in [0.05, 0.95], the published start on average, Adam with a constant rate."""
    objective = objective_of(REFERENCE_LOSSES)
    meta = meta_network(objective)
    assert meta.layers[2].weight.std().item() == pytest.approx(1 / 64**0.5 / 3**0.5, rel=0.15)  # U(-1/8, 1/8)
    biases = torch.tensor([1.2528, 2.0794, 0, 3.89, 3.89], dtype=torch.float64)
    torch.testing.assert_close(meta.layers[2].bias.detach(), biases, atol=2e-3, rtol=0)
    extreme = torch.full((1, 4, 4), 1e6, dtype=torch.float64)
    with torch.no_grad():
        meta.layers[0].weight.fill_(1.0)
        for sign, edge in ((1.0, 0.95), (-1.0, 0.05)):
            meta.layers[2].weight.fill_(sign)
            found = meta(extreme, EVERYONE)
            assert found.t1.item() == pytest.approx(edge)
            assert found.t2.item() == pytest.approx(edge)
    [optimizer] = objective.optimizers
    assert optimizer.defaults["amsgrad"]
    objective.begin_epoch(Progress(400, 500))
    assert optimizer.param_groups[0]["lr"] == 2e-4
    resumed = objective_of({**REFERENCE_LOSSES, "meta_lr": 1e-3})
    resumed.load_training_state(objective.training_state(), objective.spec.options)
    assert resumed.optimizers[0].param_groups[0]["lr"] == 1e-3, "that of the plans as they are now"
    [ours] = objective_of({"reading": "reference"}).optimizers
    assert not ours.defaults["amsgrad"]


def test_regions_keep_nnunets_loss() -> None:
    objective = objective_of(REFERENCE_LOSSES, regions=True)
    logits = torch.randn(1, 3, 4, 4, 4, dtype=torch.float64)
    target = torch.rand(1, 3, 4, 4, 4) > 0.5
    output = TrainingOutput([logits], [], torch.zeros(()), torch.randn(1, 4, 4, 4, 4, 4).double(), [logits])
    value = objective(output, target, objective.draw_view(EVERYONE, EVERYONE))
    torch.testing.assert_close(value.parts["segmentation"].double(), nnunet_loss(True, None)(logits, target).double())
