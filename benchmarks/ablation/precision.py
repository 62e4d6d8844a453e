"""Which numbers a device trains in."""

from __future__ import annotations

from typing import Literal

import torch


def precision_on(device: torch.device) -> Literal["bfloat16", "float32"]:
    """Return "bfloat16", or "float32" on a processor without bfloat16 instructions, where it would be far slower."""
    return "float32" if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else "bfloat16"
