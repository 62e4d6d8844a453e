"""Selective scan of Mamba (Gu and Dao, 2023) in pure PyTorch, for CPU and GPU.

``h_t = exp(d_t A) h_{t-1} + d_t u_t B_t`` and ``y_t = C_t . h_t + D u_t``. The sequence is cut into about sqrt(L)
chunks that advance together, and every factor is at most 1, so nothing can overflow. Channels are treated in blocks of
limited memory: Python loops over about 2 sqrt(L) steps per block, and the number of blocks grows with L too. Only the
inputs are kept for the gradient: states are recomputed, a block at a time, so the backward pass takes twice the steps.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

_log = logging.getLogger(__name__)
_BLOCK_ELEMENTS = 2**23
"""Largest (L, B, E, N) temporary, in elements (32 MB of float32; about five exist at a time)."""


def _recur(decay: torch.Tensor, state: torch.Tensor, chunks: int, reverse: bool = False) -> torch.Tensor:
    """``state_t += decay_t * state_{t-1}`` along dim 0, in place (``t+1`` for ``t-1`` if reverse), in equal chunks."""
    result = state
    state, decay = (tensor.unflatten(0, (chunks, -1)) for tensor in (state, decay))
    total = decay.clone()
    steps, step = state.shape[1], -1 if reverse else 1
    order = range(steps)[::step]
    for t in order[1:]:
        state[:, t].addcmul_(decay[:, t], state[:, t - step])
        total[:, t].mul_(total[:, t - step])
    last = order[-1]
    for k in range(chunks)[::step][1:]:
        state[k, last].addcmul_(total[k, last], state[k - step, last])
    if reverse:
        state[:-1, 1:].addcmul_(total[:-1, 1:], state[1:, :1])
    else:
        state[1:, :-1].addcmul_(total[1:, :-1], state[:-1, -1:])
    return result


def _prepare(tensors: tuple[torch.Tensor, ...]) -> tuple[int, list[torch.Tensor]]:
    """Return the number of chunks and the tensors ``(B, L, ...)`` as ``(L', B, ...)``, padded to whole chunks."""
    length = tensors[0].shape[1]
    chunks = max(1, math.isqrt(length))
    pad = -length % chunks
    return chunks, [F.pad(tensor.transpose(0, 1), (0, 0, 0, 0, 0, pad)) for tensor in tensors]


def _blocks(delta: torch.Tensor, states: int) -> Iterator[slice]:
    """Yield channel slices of ``(L, B, E)`` whose ``(L, B, e, N)`` stays below the memory limit."""
    length, batch, channels = delta.shape
    width = max(1, _BLOCK_ELEMENTS // max(1, length * batch * states))
    for start in range(0, channels, width):
        yield slice(start, min(channels, start + width))


def _states(
    delta: torch.Tensor, signal: torch.Tensor, a: torch.Tensor, b: torch.Tensor, chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return decay and state, both ``(L, B, e, N)``."""
    decay = (delta[..., None] * a).exp_()
    return decay, _recur(decay, (delta * signal)[..., None] * b[:, :, None], chunks)


def _scan_forward(
    u: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    length = u.shape[1]
    chunks, (signal, step, b, c) = _prepare((u, delta, b, c))
    out = torch.empty_like(signal)
    for block in _blocks(step, a.shape[1]):
        _, state = _states(step[..., block], signal[..., block], a[block], b, chunks)
        out[..., block] = torch.einsum("lben,lbn->lbe", state, c)
    return torch.addcmul(out[:length].transpose(0, 1), u, d).contiguous()


def _scan_backward(
    grad: torch.Tensor,
    u: torch.Tensor,
    delta: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
) -> list[torch.Tensor]:
    length = u.shape[1]
    chunks, (signal, step, b, c, grad_out) = _prepare((u, delta, b, c, grad))
    grad_u, grad_delta, grad_a = grad_out * d, torch.empty_like(step), torch.empty_like(a)
    grad_b, grad_c = torch.zeros_like(b), torch.zeros_like(c)
    for block in _blocks(step, a.shape[1]):
        s, x, g = step[..., block], signal[..., block], grad_out[..., block]
        decay, state = _states(s, x, a[block], b, chunks)
        grad_c += torch.einsum("lben,lbe->lbn", state, g)
        grad_state = _recur(decay.roll(-1, 0), g[..., None] * c[:, :, None], chunks, reverse=True)
        grad_b += torch.einsum("lben,lbe->lbn", grad_state, s * x)
        grad_input = torch.einsum("lben,lbn->lbe", grad_state, b)
        grad_u[..., block] += grad_input * s
        grad_exponent = grad_state.mul_(decay)
        grad_exponent[1:] *= state[:-1]
        grad_exponent[0] = 0
        grad_delta[..., block] = grad_input * x + torch.einsum("lben,en->lbe", grad_exponent, a[block])
        grad_a[block] = torch.einsum("lben,lbe->en", grad_exponent, s)
    trimmed = [tensor[:length].transpose(0, 1).contiguous() for tensor in (grad_u, grad_delta, grad_b, grad_c)]
    return [trimmed[0], trimmed[1], grad_a, trimmed[2], trimmed[3], (grad * u).sum((0, 1))]


_SCAN_SCHEMA = "(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor d) -> Tensor"
_GRAD_SCHEMA = "(Tensor grad, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor d) -> Tensor[]"
_forward: Callable[..., torch.Tensor] = _scan_forward
_backward: Callable[..., list[torch.Tensor]] = _scan_backward
if hasattr(torch.library, "custom_op"):  # from torch 2.4: torch.compile sees one node instead of the unrolled loops
    _forward = torch.library.custom_op(
        "nnunetv2_mgml::selective_scan", _scan_forward, mutates_args=(), schema=_SCAN_SCHEMA
    )
    _backward = torch.library.custom_op(
        "nnunetv2_mgml::selective_scan_backward", _scan_backward, mutates_args=(), schema=_GRAD_SCHEMA
    )
    _forward.register_fake(lambda u, *_: torch.empty_like(u, memory_format=torch.contiguous_format))
    _backward.register_fake(
        lambda _, *inputs: [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    )


class _SelectiveScan(torch.autograd.Function):
    """Ties `_forward` and `_backward` together."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_backward(grad, *ctx.saved_tensors))


def selective_scan(
    u: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """Run the scan; differentiable in every argument.

    Args:
        u: signal ``(B, L, E)`` float32 or float64, as all others.
        delta: step ``(B, L, E)``, >= 0; where it is 0 the state passes through unchanged.
        a: ``(E, N)``, <= 0.
        b: ``(B, L, N)``.
        c: ``(B, L, N)``.
        d: ``(E,)``.

    Returns:
        ``(B, L, E)``, contiguous.
    """
    out: torch.Tensor = _SelectiveScan.apply(u, delta, a, b, c, d)
    return out


@functools.cache
def mamba_kernel() -> Callable[..., torch.Tensor] | None:
    """Return the CUDA scan of the package ``mamba_ssm``, or None where that is not installed."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    _log.info("Using the selective scan of mamba_ssm on CUDA devices.")
    scan: Callable[..., torch.Tensor] = selective_scan_fn
    return scan


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch gives it no types
def kernel_scan(
    u: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """Same as `selective_scan`, by `mamba_kernel` (channels before length there); breaks the graph of torch.compile.

    Without CUDA this is tested against a stand-in with the kernel's interface only.
    """
    inputs = [tensor.transpose(1, 2).contiguous() for tensor in (u, delta, b, c)]
    scan = mamba_kernel()
    if scan is None:
        raise RuntimeError("The package mamba_ssm is not installed; use selective_scan.")
    return scan(inputs[0], inputs[1], a, inputs[2], inputs[3], d).transpose(1, 2)
