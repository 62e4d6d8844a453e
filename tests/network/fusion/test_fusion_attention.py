from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.network.fusion.attention import (
    SelfAttention,
    StudentDropout,
    TransformerLayer,
    heads_for,
    to_grid,
    to_tokens,
)
from nnunetv2_mgml.network.fusion.positions import PositionCode, TokenTable


@given(width=st.integers(1, 700), wanted=st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_heads_divide_any_width(width: int, wanted: int) -> None:
    heads = heads_for(width, wanted)
    assert width % heads == 0
    assert heads <= wanted
    wide = [h for h in range(1, wanted + 1) if width % (8 * h) == 0]
    assert heads == (max(wide) if wide else max(h for h in range(1, wanted + 1) if width % h == 0))


@pytest.mark.parametrize(
    ("width", "expected"), [(8, 1), (16, 2), (32, 4), (80, 5), (160, 5), (320, 8), (512, 8), (12, 6)]
)
def test_heads_of_the_plans_widths(width: int, expected: int) -> None:
    """Whole multiples of 8 channels a head, which GPUs' fused kernels ask for; the published 512 keeps 8 heads."""
    assert heads_for(width) == expected


def test_number_of_parameters() -> None:
    """4 d^2 + d + 4 d + 2 d h + h + d; mmFormer's published layer (d 512, h 4096) has 5,250,048."""
    for width, ratio, published in ((512, 8, 5_250_048), (320, 4, None)):
        count = sum(p.numel() for p in TransformerLayer(width, SelfAttention(width, 8), ratio).parameters())
        hidden = ratio * width
        assert count == 4 * width**2 + width + 4 * width + 2 * width * hidden + hidden + width
        assert published in (None, count)


def test_padding_equals_removal() -> None:
    """Tokens nobody may attend to change nothing for the others, bit for bit, and leaving them out is the same."""
    torch.manual_seed(0)
    layer = TransformerLayer(16, SelfAttention(16, 4)).eval()
    tokens = torch.randn(2, 6, 16)
    keep = torch.tensor([[1, 0, 1, 1, 0, 1]] * 2).bool()
    out = layer(tokens, keep)
    torch.testing.assert_close(out[:, keep[0]], layer(tokens[:, keep[0]]), atol=1e-6, rtol=1e-5)
    noisy = torch.where(keep[..., None], tokens, 1e3 * torch.randn_like(tokens))
    assert torch.equal(layer(noisy, keep)[:, keep[0]], out[:, keep[0]])


def test_attention_against_the_formula() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(12, 3)
    tokens = torch.randn(1, 5, 12)
    query, key, value = attention.query_key_value(tokens).chunk(3, 2)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = (query[..., part] @ key[..., part].transpose(1, 2) / 2).softmax(2)
        heads.append(weights @ value[..., part])
    torch.testing.assert_close(attention(tokens), attention.out(torch.cat(heads, 2)))


def test_dropout_spares_teacher_and_evaluation() -> None:
    dropout, ones = StudentDropout(0.5), torch.ones(1000)
    assert (dropout(ones) == 0).any()
    with torch.no_grad():
        assert torch.equal(dropout(ones), ones)
    assert torch.equal(dropout.eval()(ones), ones)
    with pytest.raises(ValueError, match=r"dropout is 1\.5, allowed is a number in \[0, 1\)"):
        StudentDropout(1.5)


def test_tokens_and_grid_are_inverse() -> None:
    features = torch.randn(2, 3, 4, 5, 6, 7)
    tokens = to_tokens(features)
    assert torch.equal(tokens[1, 2, (2 * 6 + 3) * 7 + 4], features[1, 2, :, 2, 3, 4])
    assert torch.equal(to_grid(tokens, (5, 6, 7)), features)


def test_position_code() -> None:
    """Zero at first; a sum over axes, row-major; interpolated on another grid, where linear codes stay linear."""
    code = PositionCode((4, 3), 2)
    assert (code((4, 3)) == 0).all()
    with torch.no_grad():
        code.axes[0].copy_(torch.arange(4.0).expand(1, 2, 4))
        code.axes[1].copy_(10 * torch.arange(3.0).expand(1, 2, 3))
    expected = (torch.arange(4.0)[:, None] + 10 * torch.arange(3.0)).flatten()
    torch.testing.assert_close(code((4, 3)), expected[:, None].expand(-1, 2))
    halved = (torch.tensor([0.5, 2.5])[:, None] + 10 * torch.arange(3.0)).flatten()
    torch.testing.assert_close(code((2, 3))[:, 0], halved)
    assert code((9, 1)).shape == (9, 2)


def test_token_table() -> None:
    torch.manual_seed(0)
    table = TokenTable((8, 8, 8), 16)
    assert table((8, 8, 8)).std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(table((8, 8, 8))[(2 * 8 + 3) * 8 + 4], table.table[0, :, 2, 3, 4])
    assert table((3, 9, 8)).shape == (3 * 9 * 8, 16)
