from __future__ import annotations

import copy
import pickle

import pytest
import torch
from builders import configuration, network, options_with
from hypothesis import given, settings
from hypothesis import strategies as st
from network_cases import DESIGNS, batch, config
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunetv2_mgml.network import encoders
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.encoders import plan_unet, silence_dropout_of_the_teacher
from nnunetv2_mgml.network.interface import Needs, TrainingOutput, View, seeing, subset_network
from nnunetv2_mgml.plans.topology import scaled_widths


@pytest.mark.parametrize("modalities", [2, 3, 5])
def test_any_number_of_modalities(modalities: int) -> None:
    net = network(config("region_aware"), modalities=modalities, heads=2, classes=2).eval()
    with torch.no_grad():
        assert net(batch((16, 16, 16), modalities)).shape == (2, 2, 16, 16, 16)


def test_cascade_channels_reach_every_encoder() -> None:
    net = network(extra_channels=3).eval()
    x = batch((16, 16, 16), extra=3, size=1)
    other = x.clone()
    other[:, 4:] += 1
    with torch.no_grad():
        for m in range(4):
            mask = torch.zeros(1, 4, dtype=torch.bool)
            mask[0, m] = True
            assert not torch.allclose(net(x, modality_mask=mask), net(other, modality_mask=mask))


def test_deep_supervision_is_switched_as_nnunet_does() -> None:
    net = network(deep_supervision=True).eval()
    with torch.no_grad():
        outputs = net(batch((16, 16, 16)))
        assert [tuple(o.shape[2:]) for o in outputs] == [(16, 16, 16), (8, 8, 8)]
        net.decoder.deep_supervision = False
        assert torch.equal(net(batch((16, 16, 16))), outputs[0])


@pytest.mark.parametrize("fusion", DESIGNS)
def test_training_output(fusion: str) -> None:
    net = network(config(fusion), deep_supervision=True)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    out = net(batch((16, 16, 16)), View(mask, torch.ones_like(mask)), Needs(complete="target", modality=True))
    assert isinstance(out, TrainingOutput)
    assert len(out.student) == 2
    assert out.modality.shape == (2, 4, 4, 8, 8, 8)  # at half the resolution
    assert [scale.shape for scale in out.complete] == [scale.shape for scale in out.student]
    assert not any(scale.requires_grad for scale in out.complete)
    assert out.single is out.subsets is None
    assert out.fusion_loss.shape == ()
    assert len(out.auxiliary) == (2 if fusion == "region_aware" else 0)  # full resolution has none


def test_teacher_is_the_complete_pass_and_student_the_incomplete_one() -> None:
    net = network(deep_supervision=True).double()  # in float32 a CPU adds in another order without gradients
    x, mask = batch((16, 16, 16)).double(), torch.tensor([[True, False, True, True], [False, True, False, False]])
    available = torch.tensor([[True, True, True, True], [True, True, False, True]])
    out = net(x, View(mask, available), Needs(complete="target"))
    assert torch.allclose(out.complete[0], net(x, modality_mask=available)[0], atol=1e-6)
    assert torch.allclose(out.student[0], net(x, modality_mask=mask)[0], atol=1e-6)


def test_gradients_reach_every_parameter_and_none_comes_from_the_teacher() -> None:
    net = network(config("region_aware"), deep_supervision=True)
    mask = torch.tensor([[True, False, False, False], [False, True, True, True]])
    out = net(batch((16, 16, 16)), View(mask, torch.ones_like(mask)), Needs(modality=True))
    total = sum(o.square().mean() for o in [*out.student, out.modality, *out.auxiliary])
    total.backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a bias in front of an instance norm has a zero gradient by construction
    assert [name for name in dead if not name.endswith("bias")] == []


def test_no_decoder_that_no_loss_needs() -> None:
    net = network(options_with(fusion="mean", width_factor=1.0, modality_decoder_weight=0.0, soft_label="none"))
    assert net.modality_decoder is None
    out = net(batch((16, 16, 16)), None, Needs())
    assert out.modality is None
    with pytest.raises(RuntimeError, match="no modality decoder"):
        net.decode_modalities(net.encode(batch((16, 16, 16))))


@pytest.mark.parametrize("fusion", DESIGNS)
def test_compiles_without_graph_breaks(fusion: str) -> None:
    net = network(config(fusion), deep_supervision=True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    view, needs = View(mask, torch.ones_like(mask)), Needs(complete="learns", modality=True)
    x = batch((16, 16, 16))
    assert torch.allclose(compiled(x, view, needs).student[0], net(x, view, needs).student[0], atol=1e-5)


def test_state_dict_round_trip_is_strict_and_holds_no_training_state() -> None:
    net = network(config("region_aware"))
    other = network(config("region_aware"))
    other.load_state_dict(net.state_dict(), strict=True)
    x = batch((16, 16, 16))
    with torch.no_grad():
        assert torch.equal(net.eval()(x), other.eval()(x))
    assert not [name for name in net.state_dict() if "meta" in name]


def test_encoders_start_different() -> None:
    first, second, *_ = network(config("concat", network_form="multi_encoder")).encoders
    weight = next(name for name, p in first.named_parameters() if p.ndim > 1)
    assert not torch.equal(dict(first.named_parameters())[weight], dict(second.named_parameters())[weight])


@given(st.lists(st.integers(1, 640), min_size=1, max_size=8), st.floats(0.05, 4))
@settings(deadline=None, max_examples=50)
def test_scaled_widths(widths: list[int], factor: float) -> None:
    scaled = scaled_widths(widths, factor)
    assert all(
        w % 8 == 0 and w >= 8 and abs(w - width * factor) <= max(4, 8 - width * factor)
        for w, width in zip(scaled, widths, strict=True)
    )


def test_plan_dropout_is_silent_in_the_teacher_pass() -> None:
    layers = nn.Sequential(nn.Conv3d(64, 64, 1), nn.Dropout3d(0.5)).train()
    silence_dropout_of_the_teacher(layers)
    x = torch.ones(1, 64, 2, 2, 2)
    with torch.no_grad():
        assert torch.equal(layers(x), layers[0](x))
    assert not torch.equal(layers(x), layers[0](x))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(layers)(x), layers(x))
        assert torch.equal(pickle.loads(pickle.dumps(layers))(x), layers(x))
    with pytest.raises(ValueError, match="is AlphaDropout; MGML can use Dropout, Dropout2d, Dropout3d"):
        silence_dropout_of_the_teacher(nn.Sequential(nn.AlphaDropout()))


def test_architectures_without_encoder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"some\.Transformer has no features_per_stage.*plan with nnUNetPlanner"):
        plan_unet("some.Transformer", {"depth": 3}, (), 1, 2, 1.0)
    monkeypatch.setattr(encoders, "get_network_from_plans", lambda *_, **__: nn.Identity())
    with pytest.raises(ValueError, match=r"some\.Net has no encoder that MGML can use; supported are PlainConvUNet"):
        plan_unet("some.Net", {"features_per_stage": [8, 16]}, (), 1, 2, 1.0)


def test_one_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two modalities"):
        network(modalities=1)


def test_unknown_fusion_lists_the_designs() -> None:
    with pytest.raises(ValueError, match="region_aware"):
        network(options_with(fusion="nope"))


def test_decoders_work_at_a_share_of_the_encoders_width() -> None:
    """Features leave the encoders projected; with ratio 1 there is no projection, with None the plan's convolutions."""
    layout = {"patch": (16, 16, 16), "widths": [16, 32, 64]}
    narrow = network(config("concat"), **layout)
    assert [f.shape[2] for f in narrow.encode(batch((16, 16, 16)))] == [8, 16, 32]
    assert narrow.decoder.stages[-1].convs[0].conv.out_channels == 8
    wide = network(config("concat", decoder_width_ratio=1.0), **layout)
    assert [f.shape[2] for f in wide.encode(batch((16, 16, 16)))] == [16, 32, 64]
    assert not list(wide.encoders.of_all.projections.parameters())
    each = network(config("concat", decoder_width_ratio=1.0, network_form="multi_encoder"), **layout)
    assert [f.shape[2] for f in each.encode(batch((16, 16, 16)))] == [16, 32, 64]
    assert not list(each.encoders[0].projections.parameters())


@pytest.mark.parametrize(("convs", "expected"), [(None, 2), (1, 1), (3, 3)])
def test_decoder_convolutions_are_the_plans_or_ours(convs: int | None, expected: int) -> None:
    plan = configuration((16, 16, 16))
    plan["architecture"]["arch_kwargs"]["n_conv_per_stage_decoder"] = [2, 2]
    net = build_network(
        ConfigurationManager(plan), config("concat", decoder_convs=convs).network, 4, 3, 4, False, Needs(modality=True)
    )
    assert [len(stage.convs) for stage in net.decoder.stages] == [expected] * 2
    assert [len(stage.convs) for stage in net.modality_decoder.stages] == [expected]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("fusion", DESIGNS)
def test_a_learning_teacher_gives_the_same_prediction_with_gradient(fusion: str, joined: bool) -> None:
    """Bit for bit; as one batch with the student, which a target never is, up to the order of sums."""
    net = network(config(fusion), deep_supervision=True).double()  # float32 adds in another order without gradients
    net._joins_passes &= joined
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    view = View(mask, torch.ones_like(mask))
    plain, learning = (net(batch((16, 16, 16)).double(), view, Needs(complete=kind)) for kind in ("target", "learns"))
    for target, learns in zip(plain.complete, learning.complete, strict=True):
        assert torch.allclose(target, learns, rtol=1e-12, atol=1e-12) if joined else torch.equal(target, learns)
        assert not target.requires_grad
    sum(output.sum() for output in learning.complete).backward()
    assert all(p.grad is not None for p in net.encoders.parameters())


def test_further_subsets_are_decoded_as_one_batch() -> None:
    """Each is what a view of that subset alone gives; the other outputs keep their bits."""
    net = network(config("region_aware"), deep_supervision=True).eval().double()  # a batch of six adds in another order
    x, visible = batch((16, 16, 16)).double(), torch.tensor([[True, False, True, True], [False, True, False, False]])
    subsets = torch.tensor(
        [
            [[True, False, False, False], [True, True, False, True], [False, False, True, False]],
            [[False, True, False, False], [True, True, True, True], [False, False, False, True]],
        ]
    )
    available = torch.ones_like(visible)
    with torch.no_grad():
        plain = net(x, View(visible, available), Needs())
        more = net(x, View(visible, available, subsets=subsets), Needs(subsets=3))
        assert all(torch.equal(a, b) for a, b in zip(plain.student, more.student, strict=True))
        assert [tuple(scale.shape[:3]) for scale in more.subsets] == [(2, 3, 3)] * 2
        for index in range(3):
            alone = net(x, View(subsets[:, index], available))
            for scale, expected in zip(more.subsets, alone, strict=True):
                assert torch.allclose(scale[:, index], expected, atol=1e-5)


def test_needs_of_several_terms_join() -> None:
    joined = Needs(complete="target", subsets=2).union(Needs(complete="learns", modality=True, subsets=1))
    assert joined == Needs(complete="learns", modality=True, subsets=3)
    assert Needs(complete="target").union(Needs()) == Needs(complete="target")


def test_a_network_sees_a_subset_for_a_while() -> None:
    net, x = network().eval(), batch((16, 16, 16))
    with torch.no_grad():
        before = net(x)
        with seeing(torch.compile(net, backend="eager"), (True, False, False, True)):
            assert torch.equal(net(x), net(x, torch.tensor([[True, False, False, True]] * 2)))
        assert torch.equal(net(x), before)
    stock = torch.nn.Conv3d(4, 1, 1)
    assert subset_network(stock) is None
    with seeing(stock, (True, False, False, True)):
        stock(x)
