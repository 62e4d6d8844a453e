"""nnU-Net's network with conditional norms: a stock network at the start, and one that knows what is visible."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from builders import configuration
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from network_cases import batch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.conditional_norms import Told
from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet
from nnunetv2_mgml.network.interface import SubsetNetwork, View, seeing
from nnunetv2_mgml.network.subset_module import zero_absent
from nnunetv2_mgml.upstream.cpu_layers import make_fast, normed

M = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "3d": {},
    "2d": {"patch": (16, 16)},
    "residual": {"residual": True},
}
MIXED = torch.tensor([[True, False, True, False], [False, False, False, True]])


def stock(
    deep_supervision: bool = False, previous: int = 0, architecture: dict[str, Any] | None = None, **layout: Any
) -> nn.Module:
    own = configuration(**layout)
    own["architecture"]["arch_kwargs"].update(architecture or {})
    plan = ConfigurationManager(own)
    torch.manual_seed(0)
    unet: nn.Module = get_network_from_plans(
        plan.network_arch_class_name,
        plan.network_arch_init_kwargs,
        plan.network_arch_init_kwargs_req_import,
        M + previous,
        3,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
    return unet


def conditioned(unet: nn.Module, taught: bool = True, fast: bool = False) -> ConditionedUNet:
    """A conditioned copy; `taught`: its norms do depend on what is visible."""
    net = ConditionedUNet(copy.deepcopy(unet), M)
    if fast:
        make_fast(net.modules())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in net.named_parameters():
        if taught and name.endswith("of_modalities"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return net.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_starts_as_the_stock_network(layout: str) -> None:
    """For every subset, and with the keys of its state dict and one more per norm."""
    unet = stock(**LAYOUTS[layout]).double().eval()
    net = conditioned(unet, taught=False)
    x = batch(LAYOUTS[layout].get("patch", (16, 16, 16))).double()
    with torch.no_grad():
        for subset in torch.tensor(all_subsets(M)):
            visible = subset.expand(2, -1)
            torch.testing.assert_close(net(x, visible), unet(zero_absent(x, visible)), rtol=1e-12, atol=1e-12)
    more = set(net.state_dict()) - set(unet.state_dict())
    assert set(unet.state_dict()) < set(net.state_dict())
    assert {key.rpartition(".")[2] for key in more} == {"of_modalities"}
    norms = [m for m in net.modules() if hasattr(m, "of_modalities")]
    assert len(norms) == len([m for m in unet.modules() if isinstance(m, (nn.InstanceNorm2d, nn.InstanceNorm3d))])
    assert convert_conv_op_to_dim(net.encoder.conv_op) == x.ndim - 2


ONE_OF_ITS_NORMS = ConditionedUNet(stock(), M).double().encoder.stages[0][0].convs[0].norm


@given(st.data())
def test_a_norm_does_what_its_formula_says(data: st.DataObject) -> None:
    """Against a loop over samples and channels in float64; scale and shift of each sample follow its own mask."""
    b, c = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    size = data.draw(st.tuples(*[st.integers(1, 4)] * 3).filter(lambda s: np.prod(s) > 1))
    numbers = st.floats(-3, 3, width=32)
    x = data.draw(npst.arrays(np.float64, (b, c, *size), elements=numbers))
    visible = data.draw(npst.arrays(np.bool_, (b, M)))
    own = data.draw(npst.arrays(np.float64, (M, 2, c), elements=numbers))
    weight, bias = (data.draw(npst.arrays(np.float64, c, elements=numbers)) for _ in range(2))
    norm = copy.deepcopy(ONE_OF_ITS_NORMS)
    norm.of_modalities = nn.Parameter(torch.from_numpy(own))
    norm.weight, norm.bias = nn.Parameter(torch.from_numpy(weight)), nn.Parameter(torch.from_numpy(bias))
    norm.num_features, norm.told, norm.place = c, Told([norm]), 0
    with norm.told.tell(torch.from_numpy(visible)):
        got = norm(torch.from_numpy(x)).detach().numpy()
    for sample in range(b):
        for channel in range(c):
            values = x[sample, channel]
            plain = (values - values.mean()) / np.sqrt(values.var() + norm.eps) * weight[channel] + bias[channel]
            scale, shift = ((visible[sample] - 0.5) @ own[:, k, channel] for k in range(2))
            np.testing.assert_allclose(got[sample, channel], plain * (1 + scale) + shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_is_exact(layout: str) -> None:
    net = conditioned(stock(**LAYOUTS[layout]), fast=True)
    clean = batch(LAYOUTS[layout].get("patch", (16, 16, 16)), size=1)
    with torch.no_grad():
        for subset in torch.tensor(all_subsets(M)):
            absent = ~subset.reshape(1, M, *[1] * (clean.ndim - 2))
            results = [net(torch.where(absent, value, clean), subset[None]) for value in (0.0, 1e3, float("nan"))]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


def test_knows_an_empty_channel_from_an_absent_one() -> None:
    net = conditioned(stock())
    x = batch((16, 16, 16), size=1)
    x[:, 1] = 0
    everything = torch.ones(1, M, dtype=torch.bool)
    without = torch.tensor([[True, False, True, True]])
    with torch.no_grad():
        assert not torch.allclose(net(x, everything), net(x, without), atol=1e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_samples_and_subsets_do_not_disturb_each_other(fast: bool) -> None:
    """A batch of different masks is what its samples are alone, and `decode_subsets` what every subset is."""
    net = conditioned(stock(deep_supervision=True), fast=fast).double()
    x = batch((16, 16, 16)).double()
    subsets = torch.tensor(all_subsets(M))
    with torch.no_grad():
        together = net(x, MIXED)
        alone = [net(x[s : s + 1], MIXED[s : s + 1]) for s in range(2)]
        for scale, logits in enumerate(together):
            torch.testing.assert_close(logits, torch.cat([a[scale] for a in alone]), rtol=1e-10, atol=1e-10)
        every = net.decode_subsets(net.encode(x), subsets)
        assert every.shape == (2, 15, 3, 16, 16, 16)
        for s, subset in enumerate(subsets):
            torch.testing.assert_close(every[:, s], net(x, subset.expand(2, -1))[0], rtol=1e-10, atol=1e-10)


def test_what_is_visible_can_be_set_before() -> None:
    net = conditioned(stock())
    assert isinstance(net, SubsetNetwork)
    x = batch((16, 16, 16))
    with torch.no_grad():
        wanted = net(x, MIXED)
        with seeing(net, MIXED):
            assert torch.equal(net(x), wanted)
        assert torch.equal(net(x, View(MIXED)), wanted)
        assert torch.equal(net(x, modality_mask=MIXED), wanted)
        assert torch.equal(net(zero_absent(x, MIXED)), wanted), "read off the empty channels"
    with pytest.raises(ValueError, match="given 2 channels; it has 4 modalities"):
        net(x[:, :2])


def test_gradients() -> None:
    """Of every kind of parameter, in float64, by finite differences."""
    net = conditioned(stock(stages=2, patch=(4, 4, 4), widths=[8, 8])).double()
    x = torch.randn(2, M, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norm = net.encoder.stages[0][0].convs[0].norm
    own = (norm.of_modalities, norm.weight, norm.bias)

    def loss(*_: torch.Tensor) -> torch.Tensor:
        return net(x, MIXED).square().mean()

    assert torch.autograd.gradcheck(loss, own, atol=1e-6)


def test_compiled_it_is_one_graph_for_all_masks() -> None:
    """And computes the same, in training as well."""
    net = conditioned(stock(deep_supervision=True)).double().train()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = batch((16, 16, 16)).double()
    torch._dynamo.utils.counters.clear()
    for visible in (MIXED, ~MIXED, torch.ones_like(MIXED)):
        found = []
        for network in (net, compiled):
            net.zero_grad()
            outputs = network(x, visible)
            sum(logits.square().mean() for logits in outputs).backward()
            found.append([*outputs, *(parameter.grad for parameter in net.parameters())])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_cascades_channels_stay() -> None:
    net = conditioned(stock(previous=2))
    x = torch.randn(2, M + 2, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[:, M:] += 1
    with torch.no_grad():
        assert not torch.allclose(net(x, MIXED), net(changed, MIXED))


@pytest.mark.parametrize("affine", [True, False])
def test_half_precision_and_networks_without_affine_norms(affine: bool) -> None:
    unet = stock(architecture={"norm_op_kwargs": {"eps": 1e-5, "affine": affine}})
    net = conditioned(unet)
    x = batch((16, 16, 16))
    with torch.no_grad():
        exact = net(x, MIXED)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x, MIXED)
    assert rounded.isfinite().all()
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_per_sample_norms_by_either_kernel() -> None:
    """Group norm, where that is faster, and instance norm, elsewhere, are the same sums."""
    x = torch.randn(2, 5, 6, 7, 8, generator=torch.Generator().manual_seed(4))
    scale, shift = torch.rand(2, 5) + 0.5, torch.randn(2, 5)
    exact = normed(x.double(), scale.double(), shift.double(), 1e-5)
    torch.testing.assert_close(normed(x, scale, shift, 1e-5).double(), exact, rtol=1e-5, atol=1e-5)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(normed(last, scale, shift, 1e-5).double(), exact, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="has no encoder and decoder"):
        ConditionedUNet(nn.Linear(2, 2), M)
    unet = stock(architecture={"norm_op": None})
    with pytest.raises(ValueError, match=r"no instance norms.*nnUNetTrainerModalityDropout"):
        ConditionedUNet(unet, M)
    net = conditioned(stock())
    with pytest.raises(RuntimeError, match="inside its network only"):
        net.encoder(batch((16, 16, 16)))
