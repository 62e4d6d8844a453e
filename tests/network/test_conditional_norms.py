"""``conditional_norms``: fusion and decoder whose instance norms depend on what is visible."""

from __future__ import annotations

import copy
from typing import Any

import builders
import pytest
import torch
from builders import options_with
from network_cases import LAYOUTS, batch, config
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.conditional_norms import ConditionalNorm, make_conditional
from nnunetv2_mgml.network.fusion import FusionDesign, fusion_designs
from nnunetv2_mgml.network.fusion.base import find_design
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet

M = 4
SUBSETS = torch.tensor(all_subsets(M))
VIEW = View(torch.tensor([[True, False, True, True], [False, True, False, False]]), torch.ones(2, M, dtype=torch.bool))
LEARNS = Needs("learns", modality=True)
designs = pytest.mark.parametrize("fusion", fusion_designs())


def conditional(fusion: str = "region_aware", taught: bool = True, **layout: Any) -> MultiEncoderUNet:
    """A network with the option; `taught`: its norms do depend on what is visible."""
    torch.manual_seed(0)
    net = builders.network(config(fusion, conditional_norms=True), **layout)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if taught and name.endswith("of_modalities"):
            with torch.no_grad():
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return net


@designs
def test_starts_as_the_network_without(fusion: str) -> None:
    """Its tensors are those of the network without, and one more for each of these norms; no encoder has one."""
    torch.manual_seed(0)
    plain, net = builders.network(config(fusion)), conditional(fusion, taught=False)
    more = {*net.state_dict()} - {*plain.state_dict()}
    every = net.named_modules(remove_duplicate=False)  # nnU-Net's blocks hold each layer twice
    norms = {name for name, module in every if isinstance(module, ConditionalNorm)}
    assert {key.removesuffix(".of_modalities") for key in more} == norms
    assert all(name.startswith(("fusion.", "decoder.")) for name in norms)
    assert any(name.startswith("decoder.") for name in norms)
    net.load_state_dict(plain.state_dict(), strict=False)
    x = batch((16, 16, 16))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x, VIEW.visible), plain.eval()(x, VIEW.visible))


@designs
def test_missing_is_exact(fusion: str) -> None:
    net, clean = conditional(fusion).eval(), batch((16, 16, 16), size=1)
    with torch.no_grad():
        for subset in SUBSETS:
            absent = ~subset.reshape(1, M, 1, 1, 1)
            results = [net(torch.where(absent, value, clean), subset[None]) for value in (0.0, 1e3, float("nan"))]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@designs
@pytest.mark.parametrize("voxels", [1, 2**19])
def test_all_subsets_at_once_are_each_alone(fusion: str, voxels: int) -> None:
    """With what they share, and a few at a time: every subset meets its own scales and shifts."""
    net, x = conditional(fusion).eval(), batch((16, 16, 16), size=1)
    with torch.no_grad():
        together = net.decode_subsets(net.encode(x), SUBSETS, voxels)[0]
        assert (together[0] - together[-1]).abs().max() > 0.1
        for subset, logits in zip(SUBSETS, together, strict=True):
            torch.testing.assert_close(net(x, subset[None])[0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_per_sample(layout: str) -> None:
    sizes = LAYOUTS[layout]
    net, x = conditional(**sizes).double().eval(), batch(sizes["patch"]).double()
    with torch.no_grad():
        both = net(x, VIEW.visible)
        for b in range(2):
            torch.testing.assert_close(net(x[b : b + 1], VIEW.visible[b : b + 1])[0], both[b])


@designs
def test_a_training_step(fusion: str) -> None:
    """Every pass meets the mask of its own, whether passes are one batch or computed again; every part learns."""
    x = batch((16, 16, 16)).double()
    steps = []
    for joined, recompute in ((True, False), (False, False), (False, True)):
        net = conditional(fusion, deep_supervision=True).double().train()
        net._joins_passes &= joined
        net.gradient_checkpointing = recompute
        torch.manual_seed(2)
        out = net(x, VIEW, LEARNS)
        learned = [*out.student, *out.complete, *out.auxiliary]
        sum(k * output.square().mean() for k, output in enumerate(learned, 1)).backward()
        parts = {name: p.grad for name, p in net.named_parameters() if name.endswith("of_modalities")}
        assert all(grad is not None and grad.any() for grad in parts.values())
        steps.append([*(output.detach() for output in learned), *parts.values()])
    for other in steps[1:]:
        for one, two in zip(steps[0], other, strict=True):
            torch.testing.assert_close(one, two)


def test_what_is_shared_cannot_depend_on_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A design of another package that does not say so is refused, not given the mask of the pass before."""
    monkeypatch.setattr(find_design("demoseg"), "modules_of_fused", FusionDesign.modules_of_fused)
    net, x = conditional("demoseg"), batch((16, 16, 16), size=1)
    with torch.no_grad():
        net(x, SUBSETS[:1])
        with pytest.raises(RuntimeError, match="which tells it what is visible"):
            net.decode_subsets(net.encode(x), SUBSETS)


def test_norms_with_and_without_weights_of_their_own() -> None:
    """A design may have norms that the plan's arguments do not describe."""
    layers = [torch.nn.InstanceNorm3d(2, affine=True), torch.nn.InstanceNorm3d(3)]
    told = make_conditional(layers, M)
    torch.nn.init.normal_(layers[0].weight)
    for layer in layers:
        torch.nn.init.normal_(layer.of_modalities)
    inputs = [torch.randn(2, width, 3, 4, 5) for width in (2, 3)]
    with told.tell(VIEW.visible):
        results = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    for layer, x, result in zip(layers, inputs, results, strict=True):
        own = torch.einsum("bm,mkc->kbc", VIEW.visible.float() - 0.5, layer.of_modalities)
        scale, shift = own[..., None, None, None]
        plain = torch.nn.functional.instance_norm(x, weight=layer.weight, bias=layer.bias)
        torch.testing.assert_close(result, plain * (1 + scale) + shift)


def test_a_copy_knows_its_own_masks() -> None:
    """As nnU-Net, a test of a model and an average of weights copy networks."""
    net = conditional().eval()
    other = copy.deepcopy(net)
    x = batch((16, 16, 16), size=1)
    with torch.no_grad():
        expected = net(x, SUBSETS[:1])
        net(x, SUBSETS[-1:])
        assert torch.equal(other(x, SUBSETS[:1]), expected)


def test_refused_where_there_are_no_such_norms() -> None:
    with pytest.raises(ValueError, match="conditional_norms=true needs network_form=multi_encoder; this is early_fus"):
        builders.network(options_with(fusion="concat", network_form="early_fusion", conditional_norms=True))
    plan = builders.configuration((16, 16, 16))
    plan["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.BatchNorm3d"
    options = config("mean", conditional_norms=True).network
    with pytest.raises(ValueError, match=r"have no instance norms.*Set conditional_norms to false"):
        build_network(ConfigurationManager(plan), options, M, 3, 4, True, LEARNS)
