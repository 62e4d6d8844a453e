"""The form with one encoder for all modalities: nnU-Net's encoder on each alone, told which it is."""

from __future__ import annotations

import itertools
from typing import Any

import builders
import pytest
import torch
from builders import BRATS_JSON, network, options_with
from network_cases import LAYOUTS, batch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network import shared_encoder
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.conditional_norms import ConditionalNorm
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.network.shared_encoder import SharedEncoderUNet
from nnunetv2_mgml.network.transfer import Donor, labels_of, transfer
from nnunetv2_mgml.objective.memory import step_memory

CHANNELS = ("t1", "t1ce", "t2", "flair")
LABELS = labels_of(BRATS_JSON)
VISIBLE = torch.tensor([[True, False, True, True], [False, True, False, False]])
PATCH = (16, 16, 16)


def shared(fusion: str = "region_aware", taught: bool = True, seed: int = 0, **kwargs: Any) -> SharedEncoderUNet:
    """A network; `taught`: what its norms know is away from the start, where all modalities are alike."""
    options = {key: kwargs.pop(key) for key in ("conditional_norms", "width_factor") if key in kwargs}
    torch.manual_seed(seed)
    net: SharedEncoderUNet = network(options_with(fusion=fusion, network_form="shared_encoder", **options), **kwargs)
    for module in net.modules() if taught else ():
        if isinstance(module, ConditionalNorm):
            module.of_modalities.data.normal_(std=0.5)
    return net


def parts_of_encoder(net: SharedEncoderUNet) -> list[torch.Tensor]:
    return [p for name, p in net.encoders.named_parameters() if name.endswith("of_modalities")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_those_of_the_plain_encoder_with_each_modalitys_own_norms(layout: str) -> None:
    """Against float64: norms whose scale and shift are written out for a modality, and one channel that is not zero."""
    net = shared(**LAYOUTS[layout]).double()
    x = batch(LAYOUTS[layout]["patch"]).double()
    with torch.no_grad():
        found = net.encode(x)
        for m in range(4):
            alone = torch.zeros_like(x)
            alone[:, m] = x[:, m]
            signs = torch.tensor([0.5 if k == m else -0.5 for k in range(4)], dtype=torch.float64)
            plain = shared(taught=False, **LAYOUTS[layout]).double().encoders.of_all
            plain.load_state_dict(net.encoders.of_all.state_dict())
            for module in plain.modules():
                if isinstance(module, ConditionalNorm):
                    scale, shift = (signs[:, None, None] * module.of_modalities).sum(0)
                    own = module.__class__.__mro__[2]
                    weight = module.weight * (1 + scale)
                    bias = module.bias * (1 + scale) + shift
                    module.__class__ = own
                    module.weight.data, module.bias.data = weight, bias
            expected = plain(alone)
            for scale_of_all, own_scale in zip(found, expected, strict=True):
                torch.testing.assert_close(scale_of_all[:, m], own_scale, rtol=1e-9, atol=1e-9)


def test_at_the_start_norms_of_all_modalities_are_alike_and_first_convolutions_are_not() -> None:
    net = shared(taught=False)
    assert all(not part.any() for part in parts_of_encoder(net))
    first = next(p for p in net.encoders.parameters() if p.ndim == 5)
    assert first.shape[1] == 4
    assert len({tuple(first[:, m].flatten().tolist()) for m in range(4)}) == 4


@pytest.mark.parametrize("fusion", ["region_aware", "concat", "uhved", "mmformer"])
def test_missing_is_exact(fusion: str) -> None:
    """Noise, or NaN, in an absent channel changes no bit."""
    net = shared(fusion).eval()
    clean = batch(PATCH, size=1)
    with torch.no_grad():
        for subset in torch.tensor(all_subsets(4)):
            absent = ~subset[None, :, None, None, None]
            results = [net(torch.where(absent, value, clean), subset[None]) for value in (0.0, 1e3, float("nan"))]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("fusion", ["region_aware", "concat"])
@pytest.mark.parametrize("most", [2**17, 1])
def test_a_subset_alone_all_of_them_and_one_by_one(fusion: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many modalities go through the encoder at once, and whether absent ones do."""
    net = shared(fusion).eval()
    x = batch(PATCH, size=2)
    subsets = torch.tensor(all_subsets(4))
    with torch.no_grad():
        together = net.decode_subsets(net.encode(x), subsets)
        monkeypatch.setitem(shared_encoder._AT_ONCE, "cpu", most)
        calls = []
        net.encoders.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
        for s, subset in enumerate(subsets):
            calls.clear()
            net.set_visible(subset.tolist())
            torch.testing.assert_close(net(x), together[:, s], atol=1e-4, rtol=1e-4)
            assert sum(calls) == 2 * int(subset.sum())
            assert max(calls) == (2 if most == 1 else sum(calls))


def test_a_training_step_is_that_of_one_modality_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, kept or computed again, in one batch or four: as each other up to rounding."""
    found = []
    for most, again in itertools.product((2**17, 1), (False, True)):
        monkeypatch.setitem(shared_encoder._AT_ONCE, "cpu", most)
        net = shared().double()
        net.gradient_checkpointing = again
        out = net(batch(PATCH).double(), View(VISIBLE, torch.ones_like(VISIBLE)), Needs("learns", modality=True))
        sum(o.square().mean() for o in (*out.student, *out.complete, out.modality)).backward()
        found.append([out.student[0].detach(), *(p.grad for p in net.parameters())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


def test_every_weight_learns() -> None:
    net = shared(deep_supervision=True)
    out = net(batch(PATCH), View(VISIBLE, torch.ones_like(VISIBLE)), Needs("learns", modality=True))
    sum(o.square().mean() for o in (*out.student, *out.complete, out.modality)).backward()
    assert all(p.grad is not None for p in net.encoders.parameters())
    assert all(part.grad.abs().sum() > 0 for part in parts_of_encoder(net))


def test_a_part_of_the_weights_and_no_more_memory() -> None:
    peaks, weights = [], []
    for form in ("multi_encoder", "shared_encoder"):
        plans = builders.plans()
        plans["mgml"] = {"config": {**builders.TINY, "network_form": form, "width_factor": 1.0}}
        needed = step_memory(plans, "3d_fullres", builders.BRATS_JSON)
        peaks.append(needed.peak - needed.weights)
        weights.append(needed.weights)
    assert weights[1] < 0.6 * weights[0]
    assert peaks[1] < 1.3 * peaks[0]  # small volumes of all modalities go through it at once


def test_channels_of_a_previous_stage_reach_each_modality() -> None:
    net = shared(extra_channels=3).eval()
    x = torch.cat((batch(PATCH, size=1), torch.zeros(1, 3, *PATCH)), 1)
    other = x.clone()
    other[:, 5] = 1
    with torch.no_grad():
        for m in range(4):
            one, two = (net.encode(shown, tuple(k == m for k in range(4)))[0][:, m] for shown in (x, other))
            assert not torch.equal(one, two)


def with_batch_norms() -> SharedEncoderUNet:
    plan = builders.configuration(PATCH)
    plan["architecture"]["arch_kwargs"].update(norm_op="torch.nn.BatchNorm3d", norm_op_kwargs={"eps": 1e-5})
    options = options_with(network_form="shared_encoder").network
    return build_network(ConfigurationManager(plan), options, 4, 3, 4, True, Needs())


@pytest.mark.parametrize("places", [False, True])
def test_norms_that_keep_statistics_predict_by_those_they_were_trained_with(
    places: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modalities that go through the encoder one by one in training would each be normed by itself there alone."""
    monkeypatch.setitem(shared_encoder._AT_ONCE, "cpu", 1)
    torch.manual_seed(0)
    net, scale = with_batch_norms(), torch.tensor([0.3, 1, 2, 1.5])[None, :, None, None, None]
    shift = torch.tensor([-0.8, 0, 1.5, 0.4])[None, :, None, None, None]
    every = torch.arange(8) if places else None
    with torch.no_grad():
        for _ in range(60):
            x = torch.randn(2, 4, *PATCH) * scale + shift
            trained = net.train().encode_places(x, every)
        predicted = net.eval().encode(x)
    for of_training, of_prediction in zip(trained, predicted, strict=True):
        assert (of_training - of_prediction).norm() < 0.15 * of_training.norm()


def test_without_instance_norms_the_first_convolution_alone_tells_modalities_apart() -> None:
    net = with_batch_norms().eval()
    assert not parts_of_encoder(net)
    x = torch.ones(1, 4, *PATCH)
    with torch.no_grad():
        features = net.encode(x)[0]
    assert not torch.equal(features[:, 0], features[:, 1])


def test_compiles_without_graph_breaks() -> None:
    net = shared().eval()
    explanation = torch._dynamo.explain(net)(batch(PATCH), VISIBLE)
    assert explanation.graph_break_count == 0, explanation.break_reasons


# --- weights of others ------------------------------------------------------------------------------------------------
def start(net: torch.nn.Module, given: torch.nn.Module, channels: tuple[str, ...], offered: tuple[str, ...]) -> Any:
    fusion = getattr(getattr(given, "fusion", None), "name", None)
    taken = transfer(net, channels, LABELS, Donor(given.state_dict(), offered, LABELS, fusion))
    taken.apply(net)
    return taken


def test_another_modality_can_stand_in_without_a_change_to_the_others() -> None:
    """A hidden modality has a part in every norm too: one more of them is made up for."""
    given = shared().double().eval()
    net = shared(taught=False, seed=1, modalities=5).double().eval()
    donor = Donor(given.state_dict(), CHANNELS, LABELS, "region_aware")
    transfer(net, (*CHANNELS, "dwi"), LABELS, donor, {"dwi": "flair"}).apply(net)
    x = batch(PATCH).double()
    with torch.no_grad():
        wanted, found = given.encode(x), net.encode(torch.cat((x, x[:, 3:4]), 1))
    for of_donor, own in zip(wanted, found, strict=True):
        assert torch.allclose(own, of_donor[:, [0, 1, 2, 3, 3]], atol=1e-4 * of_donor.abs().max().item())


def test_a_modality_the_checkpoint_lacks_is_the_mean_of_the_others() -> None:
    """Of four that are alike: like them."""
    given = shared().double().eval()
    with torch.no_grad():
        for module in given.modules():
            if isinstance(module, ConditionalNorm):
                module.of_modalities.copy_(module.of_modalities[:1].expand_as(module.of_modalities))
        first = next(p for p in given.encoders.parameters() if p.ndim == 5)
        first.copy_(first[:, :1].expand_as(first))
    net = shared(taught=False, seed=1, modalities=5).double().eval()
    start(net, given, (*CHANNELS, "dwi"), CHANNELS)
    x = batch(PATCH).double()[:, :1]
    with torch.no_grad():
        wanted, found = given.encode(x.expand(-1, 4, -1, -1, -1)), net.encode(x.expand(-1, 5, -1, -1, -1))
    for of_donor, own in zip(wanted, found, strict=True):
        assert torch.allclose(own, of_donor[:, [0] * 5], atol=1e-4 * of_donor.abs().max().item())


def test_memory_is_counted_as_on_the_device_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU puts more voxels through the encoder at once, which all are there while a checkpoint is computed again."""
    plans = {**builders.plans(), "mgml": {"config": {"gradient_checkpointing": True}}}
    on_gpu = step_memory(plans, "3d_fullres", BRATS_JSON, mixed_precision=True).peak
    monkeypatch.setitem(shared_encoder._AT_ONCE, "other", 1)
    assert step_memory(plans, "3d_fullres", BRATS_JSON, mixed_precision=True).peak < on_gpu


@pytest.mark.parametrize("norms", [None, False])
def test_another_order_of_channels_is_the_same_network(norms: bool | None) -> None:
    given = shared(conditional_norms=norms).double().eval()
    order = [2, 0, 3, 1]
    net = shared(taught=False, seed=1, conditional_norms=norms).double().eval()
    start(net, given, tuple(CHANNELS[k] for k in order), CHANNELS)
    x = batch(PATCH).double()
    with torch.no_grad():
        for subset in torch.tensor(all_subsets(4)):
            mask = subset.expand(2, -1)
            torch.testing.assert_close(net(x[:, order], mask[:, order]), given(x, mask), rtol=1e-9, atol=1e-9)


def test_fewer_modalities_are_the_same_encoder() -> None:
    """What a network does not have is hidden: its part is in the norms' own scale and shift."""
    given = shared().double().eval()
    net = shared(taught=False, seed=1, modalities=3).double().eval()
    start(net, given, ("flair", "t1", "t2"), CHANNELS)
    x = batch(PATCH).double()
    with torch.no_grad():
        for one, two in zip(net.encode(x[:, [3, 0, 2]]), given.encode(x), strict=True):
            torch.testing.assert_close(one, two[:, [3, 0, 2]], rtol=1e-9, atol=1e-9)


def test_a_modality_more_starts_from_the_mean_of_the_others_and_says_so() -> None:
    given = shared(modalities=3)
    net = shared(taught=False, seed=1)
    taken = start(net, given, CHANNELS, ("t1", "t1ce", "t2"))
    first = next(p for p in net.encoders.parameters() if p.ndim == 5)
    torch.testing.assert_close(first[:, 3], first[:, :3].mean(1))
    for part in parts_of_encoder(net):
        torch.testing.assert_close(part[3], part[:3].mean(0))
    assert any("no flair" in line and "mean of the others" in line for line in taken.lines())


@pytest.mark.parametrize("conditional", [False, True])
def test_a_stock_network_is_the_encoder_itself(conditional: bool) -> None:
    """Also one whose norms know what is visible: here that is one modality."""
    from test_folded_norms import conditional as conditional_network
    from test_folded_norms import stock

    given = (conditional_network() if conditional else stock()).double().eval()
    net = shared(taught=False, seed=1, width_factor=1.0).double().eval()
    taken = start(net, given, CHANNELS, CHANNELS)
    part = next(part for part in taken.parts if part.name == "encoder of all modalities")
    parts = sum(p.numel() for p in parts_of_encoder(net))
    projections = sum(p.numel() for name, p in net.encoders.named_parameters() if "projections" in name)
    assert part.taken == part.total - projections - (0 if conditional else parts)
    x = batch(PATCH).double()
    with torch.no_grad():
        own = [net.encoders.of_all.encoder]
        for m in range(4):
            alone = torch.zeros_like(x)
            alone[:, m] = x[:, m]
            told = torch.zeros(2, 4, dtype=torch.bool)
            told[:, m] = True
            if conditional:
                with given._told.tell(told):
                    expected = given.encoder(alone)
            else:
                expected = given.encoder(alone)
            with net.encoders._told.tell(told):
                found = own[0](alone)
            for one, two in zip(found, expected, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_plain_norms_of_the_decoder_take_a_conditional_checkpoint_as_with_all_visible() -> None:
    given = shared().double().eval()
    net = shared(taught=False, seed=1, conditional_norms=False).double().eval()
    start(net, given, CHANNELS, CHANNELS)
    x, everything = batch(PATCH).double(), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(net(x, everything), given(x, everything), rtol=1e-9, atol=1e-9)


def test_an_encoder_per_modality_and_one_for_all_are_not_each_other() -> None:
    per_modality, of_all = network(options_with(fusion="mean", network_form="multi_encoder")), shared("mean")
    for net, given in ((per_modality, of_all), (of_all, per_modality)):
        with pytest.raises(ValueError, match="its own form or from a stock nnU-Net"):
            start(net, given, CHANNELS, CHANNELS)
