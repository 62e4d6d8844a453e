"""``conditional_norms``: fusion and decoder whose instance norms depend on what is visible."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import options_with
from inference_cases import CHANNELS, write_model
from network_cases import LAYOUTS, batch, config
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.conditional_norms import ConditionalNorm, make_conditional
from nnunetv2_mgml.network.fusion import FusionDesign, fusion_designs
from nnunetv2_mgml.network.fusion.base import find_design
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.plans.options import PLANS_KEY
from nnunetv2_mgml.presentation.internals import load_model
from nnunetv2_mgml.workflows.plan import make_plans

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
    plain = builders.network(config(fusion, conditional_norms=False))
    net = conditional(fusion, taught=False)
    more = {*net.state_dict()} - {*plain.state_dict()}
    every = net.named_modules(remove_duplicate=False)  # nnU-Net's blocks hold each layer twice
    norms = {name for name, module in every if isinstance(module, ConditionalNorm)}
    norms = {name for name in norms if not name.startswith("encoders.of_all.")}  # told which modality it sees
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


def test_a_design_has_to_say_that_its_norms_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another package keeps plain norms; one that says so wrongly is refused, not given the mask of before."""

    class Shares(find_design("concat")):
        def share(self, features: list[torch.Tensor]) -> Any:
            return super().share(features)

    class Renamed(find_design("concat")):
        pass

    assert (FusionDesign.conditions_norms, Shares.conditions_norms, Renamed.conditions_norms) == (False, False, True)
    assert not any(isinstance(module, ConditionalNorm) for module in conditional("demoseg").fusion.modules())
    monkeypatch.setattr(find_design("demoseg"), "conditions_norms", True)
    net, x = conditional("demoseg"), batch((16, 16, 16), size=1)
    with torch.no_grad():
        net(x, SUBSETS[:1])
        with pytest.raises(RuntimeError, match=r"tells it what is visible.*must not say `conditions_norms`"):
            net.decode_subsets(net.encode(x), SUBSETS)


def test_every_thread_has_a_mask_of_its_own() -> None:
    """As a service does that predicts several cases at once by one network."""
    net, x = conditional().eval(), batch((16, 16, 16), size=1)
    with torch.inference_mode():
        expected = [net(x, SUBSETS[i : i + 1]) for i in range(len(SUBSETS))]

    def predict(i: int) -> bool:
        with torch.inference_mode():
            return torch.equal(net(x, SUBSETS[i : i + 1]), expected[i])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(predict, [i for _ in range(4) for i in range(len(SUBSETS))]))


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


def test_by_default_where_form_and_norms_allow_it() -> None:
    def norms(norm_op: str = "torch.nn.InstanceNorm3d", **options: Any) -> int:
        plan = builders.configuration((16, 16, 16))
        plan["architecture"]["arch_kwargs"]["norm_op"] = norm_op
        network = config("mean", **options).network
        net = build_network(ConfigurationManager(plan), network, M, 3, 4, True, LEARNS)
        parts = (net.fusion, net.decoder)
        return sum(isinstance(module, ConditionalNorm) for part in parts for module in part.modules())

    assert norms() == norms(conditional_norms=True) > 0
    assert norms(conditional_norms=False) == 0
    assert norms("torch.nn.BatchNorm3d") == 0
    assert norms(network_form="early_fusion") == 0


def test_plans_and_models_of_before_have_none(tmp_path: Path) -> None:
    """What was written before there was the option says nothing of it; what `mgml plan` makes of it has none either."""
    block = {"version": "0.2.0", "config": {"fusion": "mean", "fusion_revision": 2}}
    assert Options.from_plans({PLANS_KEY: block}).network.conditional_norms is False
    assert Options.from_plans({}).network.conditional_norms is None
    planned = make_plans({**builders.plans(), PLANS_KEY: block}, {"num_epochs": 3}, ["3d_fullres"], "Later", CHANNELS)
    assert planned[PLANS_KEY]["config"]["conditional_norms"] is False
    folder = write_model(tmp_path / "before", options={"conditional_norms": False, "network_form": "multi_encoder"})
    plans = read_json(folder / "plans.json")
    plans[PLANS_KEY]["version"] = "0.2.0"  # as in every model
    for name in ("conditional_norms", "network_form"):
        del plans[PLANS_KEY]["config"][name]
    write_json(folder / "plans.json", plans)
    model = load_model(folder, 0, "checkpoint_final.pth", "cpu")
    assert not any(isinstance(module, ConditionalNorm) for module in model.network.modules())


class FastNorm(torch.nn.InstanceNorm3d):
    """An instance norm of another package."""


@pytest.mark.parametrize(
    ("norm_op", "more"),
    [
        ("torch.nn.BatchNorm3d", {}),
        (f"{__name__}.FastNorm", {}),
        ("torch.nn.InstanceNorm3d", {"track_running_stats": True}),
    ],
)
def test_norms_that_cannot(norm_op: str, more: dict[str, Any], stock_plans: dict[str, Any]) -> None:
    """By default there are none, and wherever they are asked for they are refused: `mgml plan` and training."""
    for content in (plan := builders.configuration((16, 16, 16)), stock_plans["configurations"]["3d_fullres"]):
        arguments = content["architecture"]["arch_kwargs"]
        arguments["norm_op"] = norm_op
        arguments["norm_op_kwargs"] = {**arguments["norm_op_kwargs"], **more}
    manager = ConfigurationManager(plan)
    net = build_network(manager, config("concat").network, M, 3, 4, True, LEARNS)
    assert not any(isinstance(module, ConditionalNorm) for module in net.modules())
    message = rf"norm_op is {norm_op} with .*Allowed are InstanceNorm2d .*Set conditional_norms to null or false"
    with pytest.raises(ValueError, match=message):
        build_network(manager, config("concat", conditional_norms=True).network, M, 3, 4, True, LEARNS)
    with pytest.raises(ValueError, match=f"Configuration 3d_fullres: .*{message}"):
        make_plans(stock_plans, {"conditional_norms": True}, ["3d_fullres"], "P", CHANNELS)


@pytest.fixture
def stock_plans() -> dict[str, Any]:
    return copy.deepcopy(builders.plans())


def test_early_fusion_is_refused(stock_plans: dict[str, Any]) -> None:
    message = "conditional_norms=true needs network_form=multi_encoder or shared_encoder; this is early_fusion. Set"
    with pytest.raises(ValueError, match=message):
        builders.network(options_with(fusion="concat", network_form="early_fusion", conditional_norms=True))
    changes = {"fusion": "concat", "network_form": "early_fusion", "conditional_norms": True}
    with pytest.raises(ValueError, match=f"Configuration 3d_fullres: {message}"):
        make_plans(stock_plans, changes, ["3d_fullres"], "P", CHANNELS)


def test_made_conditional_once() -> None:
    """A second time would not find the norms of the first, and must not lose them."""
    net = conditional()
    before = net(batch((16, 16, 16)), SUBSETS[:2])
    with pytest.raises(ValueError, match="replaced already"):
        net.condition_norms()
    assert torch.equal(net(batch((16, 16, 16)), SUBSETS[:2]), before)
