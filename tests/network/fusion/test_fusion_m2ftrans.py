from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fusion_cases import make_design, make_pass, make_spec, run
from torch import nn

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.channel_attention import ChannelAttention, ChannelAttentionLayer, FeedForward
from nnunetv2_mgml.network.fusion.m2ftrans import BlockAttention, M2FTransFusion

VOXELS, WIDTH, HEADS = 5, 16, 4


def dense_mask(present: tuple[bool, ...]) -> torch.Tensor:
    """The published rule token by token, ``(N, N)`` bool, True = may attend."""
    groups = len(present) + 1
    allowed = torch.zeros(groups * VOXELS, groups * VOXELS, dtype=torch.bool)
    for row in range(groups * VOXELS):
        for column in range(groups * VOXELS):
            own, other = row // VOXELS, column // VOXELS
            if own < len(present):
                allowed[row, column] = own == other
            else:
                allowed[row, column] = other == len(present) or present[other]
    return allowed


def test_block_attention_against_the_dense_mask() -> None:
    torch.manual_seed(0)
    attention = BlockAttention(WIDTH, HEADS)
    tokens = torch.randn(1, 4 * VOXELS, WIDTH)
    for subset in all_subsets(3):
        query, key, value = attention.split(tokens)
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH / HEADS)
        weights = scores.masked_fill(~dense_mask(subset), -torch.inf).softmax(3)
        mask = torch.tensor([subset])
        torch.testing.assert_close(attention(tokens, mask), attention.join(weights @ value))
        received = weights[:, :, 3 * VOXELS :].mean(1).sum(1)[:, : 3 * VOXELS].reshape(1, 3, VOXELS)
        torch.testing.assert_close(attention.received(tokens, mask), received)


def test_mean_attention_received() -> None:
    """Uniform attention: 1 / (n + 1) per open key (published: 8 / (n + 1), summed over 8 heads), 0 where absent."""
    attention = BlockAttention(WIDTH, HEADS)
    nn.init.zeros_(attention.query_key_value.weight)
    for subset in all_subsets(3):
        received = attention.received(torch.randn(1, 4 * VOXELS, WIDTH), torch.tensor([subset]))
        expected = torch.tensor(subset).float() / (sum(subset) + 1)
        torch.testing.assert_close(received[0], expected[:, None].expand(-1, VOXELS))


def test_weights_travel_from_the_bottleneck_to_the_skips() -> None:
    """Nearest upsampling, multiplied onto each modality before the skip fusion; detached; one state per pass."""
    spec = make_spec()
    design = make_design("m2ftrans", spec).eval()
    inputs = make_pass(spec, [[1, 0, 1]])
    state = design.begin()
    assert state == {}
    design.fuse_scale(2, inputs.features[2], inputs.mask, None, state)
    weights = state["weights"]
    assert weights.shape == (1, 3, 3, 3, 3)
    assert not weights.requires_grad
    assert (weights[0, 1] == 0).all()
    assert (weights[0, [0, 2]] > 0).all()
    assert design.begin() is not state
    fused = design.fuse_scale(0, inputs.features[0], inputs.mask, inputs.contexts[0], state).fused
    upsampled = weights.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    expected = design.scales[0]((inputs.features[0] * upsampled[:, :, None]).flatten(1, 2))
    torch.testing.assert_close(fused, expected)


def test_fusion_tokens_ignore_absent_modalities_as_if_removed() -> None:
    spec = make_spec()
    transformer = make_design("m2ftrans", spec).eval().transformer
    smaller = make_design("m2ftrans", make_spec(modalities=2)).eval().transformer
    keep = [0, 2]
    smaller.positions = nn.ModuleList(transformer.positions[m] for m in keep)
    smaller.fusion_tokens, smaller.layers = transformer.fusion_tokens, transformer.layers
    inputs = make_pass(spec, [[1, 0, 1]])
    with torch.no_grad():
        fused, modalities, received = transformer(inputs.features[-1], inputs.mask)
        alone = smaller(inputs.features[-1][:, keep], inputs.mask[:, keep])
    torch.testing.assert_close(fused, alone.fused, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(modalities[:, keep], alone.modalities, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received[:, keep], alone.received, atol=1e-5, rtol=1e-5)


def test_channel_attention_against_the_formula() -> None:
    """softmax over the channels of present modalities of Q K^T / sqrt(V), V of the actual patch."""
    torch.manual_seed(0)
    spec = make_spec()
    layer = ChannelAttentionLayer(spec, 2, refine=False)
    for block in (layer.query, layer.out, *layer.keys, *layer.values):
        for i in range(len(block)):
            block[i] = nn.Identity()
    nn.init.zeros_(layer.feed_forward.block[-1].weight)
    nn.init.zeros_(layer.feed_forward.block[-1].bias)
    inputs = make_pass(spec, [[1, 0, 1]], size=(20, 12, 16))
    query = torch.randn(inputs.features[2][:, 0].shape)
    present = inputs.features[2][:, [0, 2]].flatten(1, 2).flatten(2)
    scores = query.flatten(2) @ present.transpose(1, 2) / math.sqrt(5 * 3 * 4)
    expected = F.gelu(query + (scores.softmax(2) @ present).reshape(query.shape))
    attended, features = layer(query, inputs.features[2], inputs.mask)
    torch.testing.assert_close(attended, expected, atol=1e-4, rtol=1e-4)
    assert features is inputs.features[2]


def test_feed_forward_against_the_formula() -> None:
    """1x1 to 4C, C groups of 4 channels, 1x1 back, LayerNorm over channels after each; residual; GELU. In float64."""
    torch.manual_seed(0)
    spec = make_spec("2d")
    module = FeedForward(spec, 0).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)

    def normed(tensor: torch.Tensor) -> torch.Tensor:
        centred = tensor - tensor.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()

    first, middle, last = (module.block[i] for i in (0, 3, 6))
    wide = F.gelu(normed(torch.einsum("oc,bchw->bohw", first.weight[:, :, 0, 0], x) + first.bias[:, None, None]))
    padded = F.pad(wide, (1, 1, 1, 1))
    grouped = torch.zeros_like(wide)
    for out in range(32):
        group = slice(out // 4 * 4, out // 4 * 4 + 4)
        for i in range(3):
            for j in range(3):
                grouped[:, out] += (
                    middle.weight[out, :, i, j, None, None] * padded[:, group, i : i + 5, j : j + 6]
                ).sum(1)
    wide = F.gelu(normed(grouped + middle.bias[:, None, None]))
    back = normed(torch.einsum("oc,bchw->bohw", last.weight[:, :, 0, 0], wide) + last.bias[:, None, None])
    torch.testing.assert_close(module(x), F.gelu(x + back), atol=1e-10, rtol=1e-10)


def test_the_first_channel_layer_refines_what_the_second_reads() -> None:
    spec = make_spec()
    module = ChannelAttention(spec, 2)
    inputs = make_pass(spec, [[1, 0, 1]])
    query, features = inputs.contexts[1][:, :, :3, :3, :3].new_ones(1, 16, 3, 3, 3), inputs.features[2]
    first, second = module.layers
    assert second.refine is None
    middle, refined = first(query, features, inputs.mask)
    torch.testing.assert_close(refined[:, 2], first.refine(features[:, 2]))
    torch.testing.assert_close(module(query, features, inputs.mask), second(middle, refined, inputs.mask)[0])


@pytest.mark.parametrize("name", ["m2ftrans+channel", "m2ftrans+added"])
def test_channel_attention_is_optional_and_deep(name: str) -> None:
    """Off by default; when on, at the two deepest scales, where it reads the decoder."""
    spec = make_spec()
    assert len(make_design("m2ftrans", spec).channel) == 0
    design = make_design(name, spec).eval()
    assert set(design.channel) == {"1", "2"}
    inputs = make_pass(spec, [[1, 0, 1]])
    other = [None if c is None else c + torch.randn_like(c) for c in inputs.contexts]
    first, second = run(design, inputs), run(design, inputs._replace(contexts=other))
    assert torch.equal(first[0].fused, second[0].fused)
    assert not torch.equal(first[1].fused, second[1].fused)


@pytest.mark.parametrize("channel_attention", [False, True])
def test_number_of_parameters(channel_attention: bool) -> None:
    widths, d, h = (8, 16, 32), 32, 128
    spec = make_spec(modalities=4, channels=widths, norm_op=None, options={"channel_attention": channel_attention})
    design = build_fusion("m2ftrans", spec)
    assert isinstance(design, M2FTransFusion)
    layer = 4 * d**2 + d + 4 * d + 2 * d * h + h + d
    expected = sum((4 + 28) * c**2 + 3 * c for c in widths[:2]) + 3 * layer + 27 * d + 4 * (3 + 3 + 3) * d

    def channel(c: int) -> int:
        block = 2 * (c**2 + c) + 27 * c + c + 3 * 2 * c
        feed_forward = 4 * c**2 + 4 * c + 2 * 4 * c + 27 * 4 * 4 * c + 4 * c + 2 * 4 * c + 4 * c**2 + c + 2 * c
        return 2 * (2 + 2 * 4) * block + 3 * feed_forward

    if channel_attention:
        expected += channel(16) + channel(32) - (4 + 28) * 16**2 - 3 * 16  # instead of that scale's skip fusion
        expected += 27 * 2 * 32 * 32 + 32 + 32 * 32 + 32  # 3^3 and 1x1 after the bottleneck's
        assert sum(p.numel() for p in ChannelAttention(spec, 1).parameters()) == channel(16)
    assert sum(p.numel() for p in design.parameters()) == expected


@pytest.mark.parametrize(("width", "published"), [(128, 1_317_000), (64, 396_000)])
def test_channel_attention_has_the_published_size(width: int, published: int) -> None:
    """CT5 and CT4 of the published network, to the three digits known; the closed form is 64 C^2 + 2097 C."""
    spec = make_spec(modalities=4, channels=(width,) * 3, norm_op=None)
    count = sum(p.numel() for p in ChannelAttention(spec, 1).parameters())
    assert count == 64 * width**2 + 2097 * width
    assert round(count, -3) == published


def test_fusion_transformer_has_the_published_size() -> None:
    """Three layers of width 128 with an MLP of 4096: 3.357 M."""
    spec = make_spec(modalities=4, channels=(8, 16, 128), options={"mlp_ratio": 32})
    layers = make_design("m2ftrans", spec).transformer.layers
    assert round(sum(p.numel() for p in layers.parameters()), -3) == 3_357_000


def test_weights_upsample_to_odd_sizes() -> None:
    spec = make_spec("anisotropic")
    design = make_design("m2ftrans", spec).eval()
    inputs = make_pass(spec, [[1, 1, 0]])
    state = design.begin()
    design.fuse_scale(2, inputs.features[2], inputs.mask, None, state)
    assert design.fuse_scale(0, inputs.features[0], inputs.mask, None, state).fused.shape == (1, 8, 5, 7, 9)
