from __future__ import annotations

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.network.fusion import selective_scan as scan_module
from nnunetv2_mgml.network.fusion.mamba import Mamba, MambaBlock
from nnunetv2_mgml.network.fusion.selective_scan import kernel_scan, mamba_kernel, selective_scan


def slow_scan(
    u: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """The recurrence, one step at a time."""
    state = u.new_zeros(u.shape[0], u.shape[2], a.shape[1])
    out = []
    for t in range(u.shape[1]):
        state = torch.exp(delta[:, t, :, None] * a) * state + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        out.append((state * c[:, t, None]).sum(2) + d * u[:, t])
    return torch.stack(out, 1)


def inputs(
    length: int, batch: int = 2, channels: int = 5, states: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = [
        normal(batch, length, channels),
        normal(batch, length, channels).abs() / 2,
        -4 * normal(channels, states).abs(),
        normal(batch, length, states),
        normal(batch, length, states),
        normal(channels),
    ]
    return [value.to(dtype).requires_grad_() for value in values]


@given(length=st.integers(1, 50), seed=st.integers(0, 1000), block=st.sampled_from([1, 300, 2**23]))
@settings(max_examples=25, deadline=None)
def test_against_the_slow_reference(length: int, seed: int, block: int) -> None:
    """Values and all gradients in float64, any length, channels in one block or several."""
    arguments = inputs(length, seed=seed)
    weight = torch.randn(arguments[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_BLOCK_ELEMENTS", block)
        fast = selective_scan(*arguments)
        fast_gradients = torch.autograd.grad((fast * weight).sum(), arguments)
    slow = slow_scan(*arguments)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-12)
    for one, two in zip(fast_gradients, torch.autograd.grad((slow * weight).sum(), arguments), strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=1e-10)


def test_float32_over_4096_steps() -> None:
    arguments = inputs(4096, batch=1, channels=3, states=4, dtype=torch.float32)
    with torch.no_grad():
        reference = slow_scan(*(value.double() for value in arguments))
        error = (selective_scan(*arguments) - reference).abs().max()
    assert error < 1e-4 * reference.abs().max()


def test_extreme_steps_stay_finite() -> None:
    """Decay to exactly zero, no decay at all, and both in turn."""
    u, _, _, b, c, d = inputs(40, dtype=torch.float32)
    a = torch.full((5, 3), -16.0, requires_grad=True)
    steps = (
        torch.stack(
            [
                torch.zeros(40),
                torch.full((40,), 1e4),
                torch.arange(40) % 2 * 1e4,
                torch.full((40,), 1e-30),
                torch.ones(40),
            ],
            1,
        )
        .expand(2, -1, -1)
        .clone()
        .requires_grad_()
    )
    out = selective_scan(u, steps, a, b, c, d)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(value.grad.isfinite().all() for value in (u, steps, a, b, c, d))


def test_zero_step_passes_the_state_through() -> None:
    """A token with step 0 equals no token, for the scan itself."""
    u, delta, a, b, c, d = (value.detach() for value in inputs(9))
    keep = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1, 0]).bool()
    held = selective_scan(u, delta * keep[None, :, None], a, b, c, d)
    removed = selective_scan(u[:, keep], delta[:, keep], a, b[:, keep], c[:, keep], d)
    torch.testing.assert_close(held[:, keep], removed, atol=1e-12, rtol=1e-12)


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="torch.library.opcheck needs torch 2.5")
def test_operators_are_registered_correctly() -> None:
    arguments = inputs(7)
    values = [value.detach() for value in arguments]
    torch.library.opcheck(
        torch.ops.nnunetv2_mgml.selective_scan, tuple(values), test_utils=("test_schema", "test_faketensor")
    )
    torch.library.opcheck(
        torch.ops.nnunetv2_mgml.selective_scan_backward,
        (values[0], *values),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("width", "states", "published"),
    [(8, 8, 1_016), (16, 16, 3_696), (32, 32, 14_176), (64, 64, 55_488), (512, 256, 2_696_704), (320, 16, None)],
)
def test_number_of_parameters(width: int, states: int, published: int | None) -> None:
    e, r = 2 * width, math.ceil(width / 16)
    expected = 6 * width**2 + 5 * e + e * (r + 2 * states) + r * e + e + e * states + e + 4 * width + width**2 + width
    assert sum(p.numel() for p in MambaBlock(width, states).parameters()) == expected
    assert published in (None, expected)


def test_parameter_layout_is_that_of_mamba_ssm() -> None:
    layout = {name: tuple(p.shape) for name, p in Mamba(24, 16).named_parameters()}
    assert layout == {
        "A_log": (48, 16),
        "D": (48,),
        "in_proj.weight": (96, 24),
        "conv1d.weight": (48, 1, 4),
        "conv1d.bias": (48,),
        "x_proj.weight": (34, 48),
        "dt_proj.weight": (48, 2),
        "dt_proj.bias": (48,),
        "out_proj.weight": (24, 48),
    }


def test_layer_against_a_reference_in_float64() -> None:
    """Mamba-1 as published, step by step, with its start values (steps log-uniform in 1e-3 .. 1e-1, A = -1 .. -N)."""
    torch.manual_seed(0)
    layer, tokens = Mamba(8, 4), torch.randn(2, 11, 8)
    steps = F.softplus(layer.dt_proj.bias)
    assert ((steps > 0.99e-3) & (steps < 1.01e-1)).all()
    torch.testing.assert_close(-layer.A_log.exp(), -torch.arange(1.0, 5.0).expand(16, 4))
    w = {name: p.detach().double() for name, p in layer.named_parameters()}
    x, z = (tokens.double() @ w["in_proj.weight"].T).chunk(2, 2)
    padded = torch.cat((x.new_zeros(2, 3, 16), x), 1)
    x = torch.stack(
        [(padded[:, t : t + 4] * w["conv1d.weight"][:, 0].T).sum(1) + w["conv1d.bias"] for t in range(11)], 1
    )
    x = x * torch.sigmoid(x)
    dt, b, c = (x @ w["x_proj.weight"].T).split((1, 4, 4), 2)
    dt = torch.log1p(torch.exp(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    y = slow_scan(x, dt, -torch.exp(w["A_log"]), b, c, w["D"]) * z * torch.sigmoid(z)
    torch.testing.assert_close(layer(tokens).double(), y @ w["out_proj.weight"].T, atol=1e-6, rtol=1e-5)


def test_layer_is_causal() -> None:
    torch.manual_seed(0)
    layer, tokens = Mamba(8, 4), torch.randn(1, 20, 8)
    changed = tokens.clone()
    changed[:, 12:] += 1
    with torch.no_grad():
        one, two = layer(tokens), layer(changed)
    torch.testing.assert_close(one[:, :12], two[:, :12])
    assert not torch.allclose(one[:, 12], two[:, 12])


def test_kernel_of_mamba_ssm_is_called_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with mamba_ssm's signature: channels before length, no gate, step already positive."""

    def selective_scan_fn(u, delta, a, b, c, d=None, z=None, delta_bias=None, delta_softplus=False):
        assert z is None
        assert delta_bias is None
        assert not delta_softplus
        assert u.is_contiguous()
        return slow_scan(
            *(x.transpose(1, 2) for x in (u, delta)), a, *(x.transpose(1, 2) for x in (b, c)), d
        ).transpose(1, 2)

    name = "mamba_ssm.ops.selective_scan_interface"
    stand_in = types.ModuleType(name)
    stand_in.selective_scan_fn = selective_scan_fn
    for parent in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, stand_in)
    mamba_kernel.cache_clear()
    try:
        assert mamba_kernel() is selective_scan_fn
        arguments = inputs(6)
        torch.testing.assert_close(kernel_scan(*arguments), selective_scan(*arguments), atol=1e-12, rtol=1e-12)
    finally:
        mamba_kernel.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available() or mamba_kernel() is None, reason="needs CUDA and mamba_ssm")
def test_kernel_of_mamba_ssm_gives_the_same() -> None:
    arguments = [value.detach().cuda() for value in inputs(300, channels=16, states=16, dtype=torch.float32)]
    torch.testing.assert_close(kernel_scan(*arguments), selective_scan(*arguments), atol=1e-4, rtol=1e-3)
