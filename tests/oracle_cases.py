"""Numbers that published code computed (tests/oracles), and what the tests of designs and losses need to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunetv2_mgml.network.fusion import FusionSpec

FOLDER = Path(__file__).parent / "oracles"


class Oracle:
    """One file: ``oracle["key"]`` is a tensor, float64 where it holds numbers."""

    def __init__(self, name: str) -> None:
        self._arrays = dict(np.load(FOLDER / f"{name}.npz"))

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor = torch.from_numpy(self._arrays[key])
        return tensor.double() if tensor.is_floating_point() else tensor

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def keys(self) -> list[str]:
        """All arrays of the file."""
        return list(self._arrays)

    def leaf(self, key: str) -> torch.Tensor:
        """An input to differentiate by."""
        return self[key].clone().requires_grad_()

    def check(self, key: str, found: torch.Tensor, tolerance: float = 1e-12) -> None:
        """Compare up to ``tolerance`` times the largest number; what was stored as float32 is rounded."""
        wanted = self[key]
        assert found.shape == wanted.shape
        assert found.dtype == torch.float64, "the comparison is one in float64"
        scale = wanted.abs().max().item()
        if self._arrays[key].dtype == np.float32:
            tolerance, scale = max(tolerance, 2e-7), max(scale, 1.0)
        torch.testing.assert_close(found.detach(), wanted, atol=tolerance * scale, rtol=0)

    def load(self, module: nn.Module, **parameters: str | torch.Tensor) -> None:
        """Fill parameters by dotted name (``__`` for the dot) with arrays; 1x1 kernels are stored as matrices."""
        for name, value in parameters.items():
            target = module.get_parameter(name.replace("__", "."))
            value = self[value] if isinstance(value, str) else value
            assert target.numel() == value.numel(), name
            with torch.no_grad():
                target.copy_(value.reshape(target.shape))


class Table(nn.Module):
    """Stands for a learned position code or token table: one row per voxel, as published."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, size: Any) -> torch.Tensor:
        """Args: size, which is the stored grid's."""
        return self.rows


def published_spec(channels: tuple[int, ...], **changes: Any) -> FusionSpec:
    """Convolution with bias, instance norm without scale and shift, leaky ReLU of slope 0.2; four modalities, 3D."""
    scales = len(channels)
    values: dict[str, Any] = dict(
        num_modalities=4,
        num_classes=4,
        channels=channels,
        kernel_sizes=((3, 3, 3),) * scales,
        strides=((1, 1, 1), *((2, 2, 2),) * (scales - 1)),
        patch_size=(4, 4, 4),
        conv_op=nn.Conv3d,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": False},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"negative_slope": 0.2},
    )
    return FusionSpec(**{**values, **changes})


def mirrored(module: nn.Module) -> nn.Module:
    """Let all convolutions pad by mirroring, as most published code does; ours pad with zeros."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv3d) and set(conv.kernel_size) != {1}:
            conv.padding_mode = "reflect"
    return module


def load_blocks(oracle: Oracle, blocks: Any, names: list[str]) -> None:
    """Fill a row of `conv_block`s from ``NAME_w``, ``NAME_b``."""
    for block, name in zip(blocks, names, strict=True):
        oracle.load(block[0], weight=f"{name}_w", bias=f"{name}_b")


def load_pre_norm(oracle: Oracle, layers: Any, prefix: str) -> None:
    """Fill pre-norm transformer layers, which the files stack along the first axis."""
    for i, layer in enumerate(layers):
        rows = {
            "attention_norm__weight": "n1_g",
            "attention_norm__bias": "n1_b",
            "attention__query_key_value__weight": "qkv",
            "attention__out__weight": "o_w",
            "attention__out__bias": "o_b",
            "mlp_norm__weight": "n2_g",
            "mlp_norm__bias": "n2_b",
            "mlp__0__weight": "f1_w",
            "mlp__0__bias": "f1_b",
            "mlp__3__weight": "f2_w",
            "mlp__3__bias": "f2_b",
        }
        oracle.load(layer, **{name: oracle[f"{prefix}_{key}"][i] for name, key in rows.items()})
