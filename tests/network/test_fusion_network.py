"""Every fusion design inside the network it is made for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import network, options_with
from fusion_cases import QUICK, VARIANTS

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet

designs = pytest.mark.parametrize("name", [*fusion_designs(), *VARIANTS])
LAYOUTS = {
    "3d": dict(
        patch=(8, 12, 12),
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        residual=True,
    ),
    "2d": dict(patch=(16, 12)),
}


def make_network(name: str, layout: str = "3d", seed: int = 0) -> MultiEncoderUNet:
    """Three modalities, three stages, biases away from zero so that an all-zero channel has features."""
    fusion, options = VARIANTS.get(name, (name, QUICK.get(name, {})))
    torch.manual_seed(seed)
    net = network(
        options_with(fusion=fusion, fusion_options=options, width_factor=1.0),
        modalities=3,
        deep_supervision=True,
        **LAYOUTS[layout],
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net


def image(layout: str = "3d", batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *LAYOUTS[layout]["patch"], generator=torch.Generator().manual_seed(1))


@designs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_is_exact(name: str, layout: str) -> None:
    """Whatever an absent channel holds, no bit of the output changes, for every subset."""
    net = make_network(name, layout).eval()
    x = image(layout)
    for subset in all_subsets(3):
        mask = torch.tensor([subset])
        with torch.no_grad():
            reference = net(x, modality_mask=mask)
            for content in (math.nan, 1e6 * torch.randn(x[:, ~mask[0]].shape)):
                changed = x.clone()
                changed[:, ~mask[0]] = content
                for one, two in zip(reference, net(changed, modality_mask=mask), strict=True):
                    assert one.isfinite().all()
                    assert torch.equal(one, two)


@designs
def test_skipped_encoders_give_the_masked_result(name: str) -> None:
    net = make_network(name).eval()
    x = image()
    for subset in all_subsets(3):
        with torch.no_grad():
            masked = net(x, modality_mask=torch.tensor([subset]))
            net.set_visible(subset)
            skipped = net(x)
            net.set_visible(None)
        torch.testing.assert_close(masked[0], skipped[0], atol=1e-5, rtol=1e-5)


@designs
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    net, other = make_network(name, seed=0).eval(), make_network(name, seed=1).eval()
    torch.save({"network_weights": net.state_dict()}, tmp_path / "checkpoint_final.pth")
    stored = torch.load(tmp_path / "checkpoint_final.pth", weights_only=True)
    other.load_state_dict(stored["network_weights"], strict=True)
    x, mask = image(), torch.tensor([[True, False, True]])
    with torch.no_grad():
        assert torch.equal(net(x, modality_mask=mask)[0], other(x, modality_mask=mask)[0])


@designs
@pytest.mark.parametrize("learns", [False, True])
def test_training_step(name: str, learns: bool) -> None:
    """Student and teacher in one pass: every parameter gets a finite gradient, the teacher has no noise."""
    net = make_network(name).train()
    x, mask = image(batch=2), torch.tensor([[True, False, False], [False, True, True]])
    view = View(mask, torch.ones(2, 3).bool())
    needs = Needs(complete="learns" if learns else "target", modality=True)
    output, again = net(x, view, needs), net(x, view, needs)
    assert all(torch.equal(a, b) for a, b in zip(output.complete, again.complete, strict=True))
    assert all(scale.requires_grad == learns for scale in output.complete)
    parts = [*output.student, output.modality, *output.auxiliary, output.fusion_loss, *output.complete]
    sum(part.square().mean() for part in parts).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["region_aware", "uhved", "mmformer", "imfuse", "m2ftrans", "sfusion"])
def test_a_learning_teacher_compiles_and_stays_silent(name: str) -> None:
    """Its pass is part of the one graph, and the student after it is as noisy as before.

    The designs that draw numbers, and the default; that every design compiles is shown in test_fusion_compile.py.
    """
    net = make_network(name, "2d").train()
    x, mask = image("2d"), torch.tensor([[True, False, True]])
    arguments = (View(mask, torch.ones(1, 3).bool()), Needs(complete="learns", modality=True))
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(
            compiled(x, *arguments).complete[0], net(x, *arguments).complete[0], atol=1e-4, rtol=1e-4
        )
    noisy = not torch.equal(net(x, *arguments).student[0], net(x, *arguments).student[0])
    assert noisy == (not torch.equal(compiled(x, *arguments).student[0], compiled(x, *arguments).student[0]))


def discs(generator: torch.Generator, batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Discs of random place and size that modality 0 shows; modality 1 is noise. Images and labels."""
    grid = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")).float()
    centre = torch.rand(batch, 2, 1, 1, generator=generator) * 8 + 4
    radius = torch.rand(batch, 1, 1, generator=generator) * 2 + 2
    label = ((grid - centre).norm(dim=1) < radius).long()
    x = 0.5 * torch.randn(batch, 2, 16, 16, generator=generator)
    x[:, 0] += 2 * label
    return x, label


@pytest.mark.slow
@designs
def test_learns_from_the_modality_that_shows_the_label(name: str) -> None:
    """After 200 steps Dice is above 0.8 wherever the telling modality is present, and chance where it is not."""
    fusion, options = VARIANTS.get(name, (name, QUICK.get(name, {})))
    torch.manual_seed(0)
    net = network(
        options_with(fusion=fusion, fusion_options=options, width_factor=1.0),
        heads=2,
        classes=2,
        modalities=2,
        patch=(16, 16),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    subsets = torch.tensor(list(all_subsets(2)))
    for _ in range(200):
        x, label = discs(generator)
        output = net(x, View(subsets[torch.randint(3, (4,), generator=generator)]), Needs())
        auxiliary = sum(F.cross_entropy(F.interpolate(logits, size=(16, 16)), label) for logits in output.auxiliary)
        loss = F.cross_entropy(output.student[0], label) + auxiliary + output.fusion_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12)
        optimizer.step()
    x, label = discs(generator, batch=32)
    scores = {}
    with torch.no_grad():
        for subset in all_subsets(2):
            predicted = net.eval()(x, modality_mask=torch.tensor([subset] * 32)).argmax(1)
            scores[subset] = (2 * (predicted * label).sum() / (predicted.sum() + label.sum())).item()
    assert scores[True, False] > 0.8
    assert scores[True, True] > 0.8
    assert scores[False, True] < 0.5


@designs
@pytest.mark.parametrize(
    ("layout", "voxels"),
    [("3d", 1), ("3d", 400), ("3d", 10**9), ("2d", 400)],
    ids=["one at a time", "mixed", "all together", "2d"],
)
def test_many_subsets_equal_one_by_one(name: str, layout: str, voxels: int) -> None:
    """However many subsets go through a scale together."""
    net = make_network(name, layout).eval()
    net.decoder.deep_supervision = False
    subsets = torch.tensor(all_subsets(3))
    with torch.no_grad():
        features = net.encode(image(layout, batch=2))
        together = net.decode_subsets(features, subsets, voxels)
        for subset, logits in zip(subsets, together.unbind(1), strict=True):
            alone = net.fuse_decode(features, subset.expand(2, -1))
            torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
