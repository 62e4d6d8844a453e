"""The early-fusion form: what the multi-encoder form guarantees, with stems and one trunk."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from builders import network, options_with
from network_cases import LAYOUTS, batch

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.early_fusion import EarlyFusionUNet
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.training import TRAINERS

FUSIONS = [
    ("demoseg", {}),
    ("demoseg", {"stand_in": "none"}),
    ("demoseg", {"gating": "learned"}),
    ("mean", {}),
    ("uhved", {}),
]


def early(fusion: str = "demoseg", options: dict[str, object] | None = None, **kwargs: object) -> EarlyFusionUNet:
    config = options_with(fusion=fusion, fusion_options=options or {}, network_form="early_fusion", width_factor=1.0)
    torch.manual_seed(0)
    return network(config, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
def test_shapes(fusion: str, options: dict[str, object], layout: str) -> None:
    net = early(fusion, options, deep_supervision=True, **LAYOUTS[layout])
    x = batch(LAYOUTS[layout]["patch"])
    outputs = net(x, torch.tensor([[True, False, True, False], [False, False, False, True]]))
    assert len(outputs) == 2
    assert outputs[0].shape == (2, 3, *LAYOUTS[layout]["patch"])
    net.decoder.deep_supervision = False
    assert torch.equal(net(x, torch.ones(2, 4).bool()).isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
def test_missing_is_exact(fusion: str, options: dict[str, object]) -> None:
    """Noise, or NaN, in an absent channel changes no bit, for all subsets, in one batch and from shared features."""
    net = early(fusion, options).eval()
    subsets = torch.tensor(all_subsets(4))
    clean = batch((16, 16, 16), size=1)
    with torch.no_grad():
        for subset in subsets:
            absent = ~subset[None, :, None, None, None]
            results = [net(torch.where(absent, value, clean), subset[None]) for value in (0.0, 1e3, float("nan"))]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
def test_subsets_from_shared_stems(fusion: str, options: dict[str, object]) -> None:
    net = early(fusion, options).eval()
    subsets = torch.tensor(all_subsets(4))
    x = batch((16, 16, 16), size=2)
    with torch.no_grad():
        features = net.encode(x)
        together = net.decode_subsets(features, subsets)
        assert together.shape == (2, 15, 3, 16, 16, 16)
        for s, subset in enumerate(subsets):
            torch.testing.assert_close(together[:, s], net(x, subset.expand(2, -1)), atol=1e-4, rtol=1e-4)


def test_each_modality_alone_through_the_trunk() -> None:
    """Label logits of every modality come from the trunk fed with that modality's subset, without looking at others."""
    net = early().eval()
    x = batch((16, 16, 16))
    with torch.no_grad():
        alone = net.decode_modalities(net.encode(x))
        assert alone.shape == (2, 4, 4, 16, 16, 16)
        other = x.clone()
        other[:, 1:] = 7
        assert torch.equal(alone[:, 0], net.decode_modalities(net.encode(other))[:, 0])


@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_reaches_every_parameter(fusion: str, options: dict[str, object], dtype: torch.dtype) -> None:
    """Under every single mask, as DDP needs it; finite, in half precision too."""
    net = early(fusion, options, deep_supervision=True).train()
    x = batch((16, 16, 16))
    available = torch.tensor([[True, True, True, True], [True, True, False, True]])
    for m in range(2):
        net.zero_grad()
        mask = (torch.arange(4) == m).expand(2, -1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = net(x, View(mask, available), Needs(complete="learns", modality=True))
        parts = (*output.student, output.modality, output.fusion_loss, *output.complete)
        sum(part.float().square().mean() for part in parts).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_one_graph() -> None:
    net = early().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = batch((16, 16, 16))
    with torch.no_grad():
        for mask in ([[True, False, True, False]] * 2, [[False, True, True, True]] * 2):
            mask = torch.tensor(mask)
            torch.testing.assert_close(compiled(x, mask), net(x, mask), atol=1e-4, rtol=1e-4)


def test_the_trunk_costs_the_same_for_every_number_of_modalities() -> None:
    sizes = [sum(p.numel() for p in early(modalities=m).decoder.parameters()) for m in (2, 4)]
    assert sizes[0] == sizes[1]


def test_two_forms_are_two_networks() -> None:
    from nnunetv2_mgml.training.compatibility import network_differences

    plans = [
        {"configurations": {}, "mgml": {"config": options_with(fusion="mean", network_form=form).as_dict()}}
        for form in ("multi_encoder", "early_fusion")
    ]
    assert network_differences(*plans, "3d_fullres") == ["network_form was 'multi_encoder', is now 'early_fusion'"]


LENDERS = {0: (0, 1, 2, 3), 1: (1, 0, 3, 2), 2: (2, 3, 0, 1), 3: (3, 2, 1, 0)}
"""DeMoSeg, channels T1, T1ce, T2, FLAIR: who fills a slot, T1-T1ce and T2-FLAIR first, then T1-T2 and T1ce-FLAIR."""


class SlowDeMoSeg:
    """DeMoSeg from its description, one sample, channel and modality at a time, with the weights of a state dict."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def activated(self, x: torch.Tensor, norm: str) -> torch.Tensor:
        """Instance norm and leaky ReLU."""
        mean, variance = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), unbiased=False, keepdim=True)
        scale, shift = (self.weights[f"{norm}.{kind}"].reshape(1, -1, 1, 1, 1) for kind in ("weight", "bias"))
        return F.leaky_relu((x - mean) / (variance + 1e-5).sqrt() * scale + shift, 0.01)

    def convolved(self, x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        convolution = self.weights[f"{name}.0.weight"], self.weights[f"{name}.0.bias"]
        return self.activated(F.conv3d(x, *convolution, stride, 1), f"{name}.1")

    def shuffled(self, x: torch.Tensor, name: str, descending: bool = False) -> torch.Tensor:
        """A channel-shuffle block."""
        y = self.convolved(x, f"{name}.0")
        gate = {key: self.weights[f"{name}.1.gate.{key}"] for key in ("first_weight", "first_bias")}
        hidden = F.leaky_relu(F.linear(y.mean((2, 3, 4)), *gate.values()), 0.01)
        gates = F.linear(hidden, *(self.weights[f"{name}.1.gate.second_{kind}"] for kind in ("weight", "bias")))
        added = torch.empty_like(y)
        for b in range(len(y)):
            order = sorted(range(y.shape[1]), key=lambda c, b=b: gates[b, c].item(), reverse=descending)
            for c, source in enumerate(order):
                added[b, c] = y[b, c] + y[b, source]
        return self.activated(added, f"{name}.1.norm")

    def __call__(self, x: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and the published divergence: half the sum over the batch."""
        stems = [self.convolved(x[:, m : m + 1], f"encoders.{m}.convolution") for m in range(4)]
        filled = [self.shuffled(stem, f"fusion.blocks.0.{m}", descending=m > 0) for m, stem in enumerate(stems)]
        slots = [slice(j * x.shape[1] // 2, (j + 1) * x.shape[1] // 2) for j in range(4)]  # 8 channels, 2 each
        fused, divergence = torch.empty_like(filled[0]), torch.zeros((), dtype=x.dtype)
        for b, present in enumerate(visible.tolist()):
            for j, slot in enumerate(slots):
                fused[b, slot] = filled[next(m for m in LENDERS[j] if present[m])][b, slot]
            for lender, own in itertools.permutations([m for m in range(4) if present[m]], 2):
                pair = (stems[m][b, slots[own]] for m in (lender, own))
                kept, said = (channels.log_softmax(0) for channels in pair)
                divergence = divergence + (said.exp() * (said - kept)).mean() / 2
        skips = [fused]
        for stage in range(2):
            skips.append(
                self.shuffled(self.convolved(skips[-1], f"decoder.down.{stage}.0", 2), f"decoder.down.{stage}.1")
            )
        y = skips.pop()
        for stage in (1, 0):
            up = F.conv_transpose3d(y, *(self.weights[f"decoder.up.{stage}.{kind}"] for kind in ("weight", "bias")), 2)
            merged = self.convolved(torch.cat((up, skips.pop()), 1), f"decoder.merge.{stage}.0")
            y = self.shuffled(merged, f"decoder.merge.{stage}.1")
        return F.conv3d(y, *(self.weights[f"decoder.heads.0.{kind}"] for kind in ("weight", "bias"))), divergence


def test_the_network_of_demosegs_trainer_against_the_formulas() -> None:
    """The whole of it in float64 for all subsets, two samples a batch as published, and its divergence in training."""
    net = network(TRAINERS["nnUNetTrainerDeMoSeg"].resolve_options({})).double().train()
    torch.manual_seed(0)
    for name, tensor in net.state_dict().items():
        tensor.add_(0.1 * torch.randn_like(tensor)) if "gate" not in name else tensor.normal_()
    slow = SlowDeMoSeg(net.state_dict())
    subsets = torch.tensor(all_subsets(4))
    x = torch.randn(2, 4, 16, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for visible in (subsets[[0, 14]], subsets[[5, 9]], subsets[[10, 3]]):
            logits, divergence = slow(torch.where(visible[:, :, None, None, None], x, 0), visible)
            with torch.enable_grad():  # the divergence is a training step's
                output = net(x, View(visible, torch.ones_like(visible)), Needs())
            torch.testing.assert_close(output.student[0].detach(), logits, atol=1e-10, rtol=0)
            torch.testing.assert_close(output.fusion_loss.detach(), divergence, atol=0, rtol=1e-9)
