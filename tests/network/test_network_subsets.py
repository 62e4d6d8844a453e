"""The network under masks: absent modalities leave no trace, cost nothing, and are told in three ways."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from builders import configuration, network
from network_cases import DESIGNS, LAYOUTS, batch, config
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_mgml.inference.subsets.predictor import ManySubsets
from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.interface import Needs, TrainingOutput, View
from nnunetv2_mgml.network.subset_module import in_band_mask
from nnunetv2_mgml.plans.options import NetworkOptions


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", DESIGNS)
def test_missing_is_exact(fusion: str, layout: str) -> None:
    """Whatever an absent channel holds, the output does not change by one bit, for every subset."""
    settings_ = LAYOUTS[layout]
    net = network(config(fusion), **settings_).eval()
    x = batch(settings_["patch"], size=1)
    with torch.no_grad():
        for subset in all_subsets(4):
            mask = torch.tensor([subset])
            absent = ~mask[0]
            reference = net(x, modality_mask=mask)
            assert reference.isfinite().all()
            for content in (math.nan, math.inf, 1e6 * torch.randn(1, int(absent.sum()), *settings_["patch"])):
                changed = x.clone()
                changed[:, absent] = content
                assert torch.equal(net(changed, modality_mask=mask), reference)


@pytest.mark.parametrize("fusion", DESIGNS)
def test_stored_subset_equals_mask(fusion: str) -> None:
    """Not running the absent encoders gives what masking them gives."""
    net = network(config(fusion)).eval()
    x = batch((16, 16, 16), size=1)
    with torch.no_grad():
        for subset in all_subsets(4):
            by_mask = net(x, modality_mask=torch.tensor([subset]))
            net.set_visible(subset)
            by_subset = net(x)
            net.set_visible(None)
            assert torch.allclose(by_mask, by_subset, atol=1e-6)


def test_absent_encoders_do_not_run_at_inference() -> None:
    net = network(config("concat", network_form="multi_encoder")).eval()
    calls: list[int] = []
    for m, encoder in enumerate(net.encoders):
        encoder.register_forward_hook(lambda *_, m=m: calls.append(m))
    net.set_visible((False, True, False, True))
    with torch.no_grad():
        net(batch((16, 16, 16)))
    assert calls == [1, 3]


@pytest.mark.parametrize("fusion", ["region_aware", "imfuse", "sfusion"])
def test_a_view_of_another_shape_is_refused(fusion: str) -> None:
    """Some designs would answer for one sample only, others for any."""
    net = network(config(fusion)).eval()
    for shape in ((1, 4), (2, 3), (4,)):
        with torch.no_grad(), pytest.raises(ValueError, match=r"must be a bool tensor .*, here \(2, 4\); got "):
            net(batch((16, 16, 16)), torch.ones(shape, dtype=torch.bool))


def test_the_name_of_version_0_1_still_works() -> None:
    net, x = network().eval(), batch((16, 16, 16))
    with torch.no_grad():
        net.set_visible((False, True, False, True))
        expected = net(x)
        net.set_visible(None)
        with pytest.warns(DeprecationWarning, match="set_visible"):
            net.set_availability((False, True, False, True))
        assert torch.equal(net(x), expected)


def test_compiled_once_for_all_subsets() -> None:
    """The stored subset reaches a compiled network as a tensor, not as bools to be compiled for one by one."""
    net = network().eval().double()  # compiled layers are PyTorch's own, which in float32 add in another order
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    x = batch((16, 16, 16), size=1).double()
    with torch.no_grad():
        for subset in all_subsets(4):
            net.set_visible(subset)
            torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_auxiliary_outputs_under_a_stored_subset() -> None:
    net = network(config("concat"))
    x = batch((16, 16, 16))
    net.set_visible((False, True, False, True))
    output = net(x, None, Needs())
    assert isinstance(output, TrainingOutput)
    mask = torch.tensor([[False, True, False, True]]).expand(2, -1)
    assert torch.equal(output.student[0], net(x, View(mask), Needs()).student[0])


@pytest.mark.parametrize("fusion", DESIGNS)
def test_masks_are_per_sample(fusion: str) -> None:
    net = network(config(fusion)).eval()
    x, mask = batch((16, 16, 16)), torch.tensor([[True, False, False, True], [False, True, True, True]])
    with torch.no_grad():
        both = net(x, modality_mask=mask)
        each = torch.cat([net(x[i : i + 1], modality_mask=mask[i : i + 1]) for i in range(2)])
    assert torch.allclose(both, each, atol=1e-5)


def test_subset_matters() -> None:
    net = network().eval()
    x = batch((16, 16, 16), size=1)
    with torch.no_grad():
        outputs = [net(x, modality_mask=torch.tensor([s])) for s in all_subsets(4)]
    for i, a in enumerate(outputs):
        assert all((a - b).abs().max() > 1e-4 for b in outputs[i + 1 :])


def test_in_band_mask() -> None:
    x = torch.ones(3, 3, 4, 4)
    x[0, 1] = 0
    x[1] = 0
    x[2, 0] = math.nan
    expected = [[True, False, True], [True, True, True], [True, True, True]]
    assert in_band_mask(x, 3).tolist() == expected
    assert in_band_mask(torch.cat((torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 4, 4)), 1), 2).tolist() == [[True, True]]


def test_in_band_mask_is_used_when_nobody_passes_one() -> None:
    net = network().eval()
    x = batch((16, 16, 16), size=1)
    x[:, 2] = 0
    with torch.no_grad():
        assert torch.equal(net(x), net(x, modality_mask=torch.tensor([[True, True, False, True]])))


@pytest.mark.parametrize(
    "bad",
    [
        (True, True),
        (False,) * 4,
        torch.ones(4, dtype=torch.bool),
        torch.ones(2, 4),
        torch.tensor([[True] * 4, [False] * 4]),
    ],
)
def test_bad_subset_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"Expected 4 bools with at least one True.*Leave samples without"):
        network().set_visible(bad)


@pytest.mark.parametrize("fusion", ["mean", "concat", "region_aware"])
def test_arithmetic_of_subsets_stays_low(fusion: str) -> None:
    """With stock widths: one of four modalities at most 0.45 of all four, 15 subsets at most 4 full predictions."""
    plan = configuration((32, 32, 32), stages=4, widths=[32, 64, 128, 256])
    plan["architecture"]["arch_kwargs"].update(n_conv_per_stage=[2] * 4, n_conv_per_stage_decoder=[2] * 3)
    net = build_network(ConfigurationManager(plan), NetworkOptions(fusion=fusion), 4, 3, 4, False, Needs()).eval()
    x = batch((32, 32, 32), size=1)

    def flops(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            function()
        return counter.get_total_flops()

    def predict(subset: tuple[bool, ...]) -> int:
        net.set_visible(subset)
        return flops(lambda: net(x))

    full = predict((True,) * 4)
    assert predict((True, False, False, False)) <= 0.45 * full
    assert flops(lambda: ManySubsets(net, all_subsets(4))(x)) <= 4 * full


def test_subsets_are_decoded_a_few_at_a_time_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16^3 and three scales: 4096, 512 and 64 voxels a subset."""
    net = network(config("concat")).eval()
    batches: dict[int, list[int]] = {0: [], 1: [], 2: []}
    original = net.fusion.fuse_scale
    monkeypatch.setattr(
        net.fusion,
        "fuse_scale",
        lambda scale, features, mask, context, state: (
            batches[scale].append(len(mask)) or original(scale, features, mask, context, state)
        ),
    )
    with torch.no_grad():
        net.decode_subsets(net.encode(batch((16, 16, 16), size=1)), torch.tensor(all_subsets(4)), voxels=8192)
    assert batches == {2: [15], 1: [15], 0: [2] * 7 + [1]}


def test_the_complete_prediction_is_noisy_only_where_asked() -> None:
    """The published code's teacher drops out; ours does not."""
    torch.manual_seed(0)
    net = network(config("mmformer"))
    x, view = batch((16, 16, 16)), View(torch.tensor([[True, False, True, False]] * 2), torch.ones(2, 4).bool())
    quiet, noisy = Needs(complete="target"), Needs(complete="target").union(Needs(complete="target", noisy=True))

    def predicted(needs: Needs) -> torch.Tensor:
        complete = net(x, view, needs).complete
        assert complete is not None
        assert not complete[0].requires_grad
        return complete[0]

    assert torch.equal(predicted(quiet), predicted(quiet))
    assert not torch.equal(predicted(noisy), predicted(noisy))
    net.eval()
    assert torch.equal(predicted(noisy), predicted(quiet))
