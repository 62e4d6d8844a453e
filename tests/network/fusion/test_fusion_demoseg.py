"""DeMoSeg's slots, its divergence and its channel-shuffle block."""

from __future__ import annotations

import itertools

import pytest
import torch
from fusion_cases import make_design, make_pass, make_spec, run
from torch.distributions import Categorical, kl_divergence

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.channel_shuffle import ChannelShuffle, sorted_order
from nnunetv2_mgml.network.fusion.demoseg import partner_order, slot_sizes, stand_in_divergence

T1, T1CE, T2, FLAIR = range(4)


def test_partners_of_four_are_the_published_ones() -> None:
    """T1-T1ce and T2-FLAIR first, then T1-T2 and T1ce-FLAIR, then the one left."""
    assert partner_order(4).tolist() == [
        [T1, T1CE, T2, FLAIR],
        [T1CE, T1, FLAIR, T2],
        [T2, FLAIR, T1, T1CE],
        [FLAIR, T2, T1CE, T1],
    ]


@pytest.mark.parametrize("modalities", range(2, 10))
def test_everybody_can_stand_in_for_everybody(modalities: int) -> None:
    order = partner_order(modalities)
    assert order[:, 0].tolist() == list(range(modalities))
    assert all(sorted(row) == list(range(modalities)) for row in order.tolist())


def test_slots_share_the_width() -> None:
    assert slot_sizes(32, 4) == [8] * 4
    assert slot_sizes(32, 3) == [11, 11, 10]


@pytest.mark.parametrize("modalities", [2, 3, 4, 5])
def test_every_slot_comes_from_whom_the_rule_says(modalities: int) -> None:
    """Features that hold the number of their modality, for every subset."""
    spec = make_spec(modalities=modalities, channels=(9, 12, 16), norm_op=None)
    design = build_fusion("demoseg", spec).eval()
    subsets = torch.tensor(all_subsets(modalities))
    values = torch.arange(modalities).float().reshape(1, -1, 1, 1, 1, 1)
    prepared = values.expand(len(subsets), modalities, 9, 2, 2, 2)
    filled = design._fill(prepared, subsets, design.get_buffer("slot_0"))[..., 0, 0, 0]
    for row, subset in zip(filled, subsets.tolist(), strict=True):
        expected = []
        for slot, size in enumerate(slot_sizes(9, modalities)):
            source = next(m for m in (slot ^ step for step in range(8)) if m < modalities and subset[m])
            expected += [source] * size
        assert row.tolist() == expected


def test_the_control_fills_own_slots_only() -> None:
    """No blocks, no divergence, nothing to train: own channels where present, else zeros."""
    design = build_fusion("demoseg", make_spec(options={"stand_in": "none"})).train()
    assert list(design.parameters()) == []
    inputs = make_pass(design.spec, [[1, 0, 1]])
    for scale, result in enumerate(run(design, inputs)):
        first, second, third = inputs.features[scale][0].unbind(0)
        a, b, _ = slot_sizes(len(first), 3)
        assert result.loss is None
        assert torch.equal(result.fused[0], torch.cat((first[:a], torch.zeros_like(second[a : a + b]), third[a + b :])))


def test_divergence_against_torch_distributions() -> None:
    """Sum over ordered pairs of present modalities of KL(own || kept), mean over channels, voxels and samples."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(all_subsets(3)), 3, 7, 4, generator=generator, dtype=torch.float64)
    mask, sizes = torch.tensor(all_subsets(3)), slot_sizes(7, 3)
    total = 0.0
    for sample, present in zip(features, mask, strict=True):
        for a, b in itertools.permutations(range(3), 2):
            if present[a] and present[b]:
                own, kept = (sample[m].split(sizes)[b].T for m in (b, a))
                between = kl_divergence(Categorical(logits=own), Categorical(logits=kept))
                total += between.mean().item() / sizes[b]
    assert stand_in_divergence(features, mask, sizes).item() == pytest.approx(total / len(mask), rel=1e-10)


def test_divergence_is_of_the_features_before_their_blocks_and_weighted() -> None:
    design = make_design("demoseg", make_spec()).train()
    inputs = make_pass(design.spec, [[1, 1, 1], [1, 0, 1]])
    for scale, result in enumerate(run(design, inputs)):
        expected = stand_in_divergence(inputs.features[scale].flatten(3), inputs.mask, design.sizes[scale])
        assert result.loss.item() == pytest.approx(0.5 / 3 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("gating", ["published", "learned"])
def test_channel_shuffle_against_the_formula(gating: str, descending: bool) -> None:
    torch.manual_seed(0)
    block = ChannelShuffle(8, torch.nn.InstanceNorm2d, {"affine": True}, gating, descending).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    lrelu = torch.nn.functional.leaky_relu
    gate = block.gate
    hidden = lrelu(x.mean((2, 3)) @ gate.first_weight.T + gate.first_bias, 0.01)
    gates = torch.sigmoid(hidden @ gate.second_weight.T + gate.second_bias)
    added = torch.empty_like(x)
    for b in range(2):
        order = sorted(range(8), key=lambda c, b=b: gates[b, c].item(), reverse=descending)
        for c, source in enumerate(order):
            added[b, c] = x[b, source] * (gates[b, source] if gating == "learned" else 1)
    y = x + added
    normed = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(block(x), lrelu(normed, 0.01), atol=1e-10, rtol=0)
    trained = {name for name, _ in block.gate.named_parameters()}
    assert bool(trained) == (gating == "learned")
    assert {"first_weight", "second_bias"} <= set(block.gate.state_dict()), "in the checkpoint either way"


def test_order_by_pairs_is_the_stable_one() -> None:
    """Ties included, which gates of a saturated sigmoid can be."""
    torch.manual_seed(0)
    values = torch.rand(4, 40)
    values[1] = values[1].mul(3).round()
    values[2] = 0.5
    for sign in (1, -1):
        assert torch.equal(sorted_order(sign * values), (sign * values).argsort(dim=1, stable=True))
    assert torch.equal(sorted_order(-values), values.argsort(dim=1, descending=True, stable=True))


def test_too_few_channels() -> None:
    with pytest.raises(ValueError, match="at least one channel per modality, got 2 channels for 3"):
        build_fusion("demoseg", make_spec(channels=(2, 8, 8)))
