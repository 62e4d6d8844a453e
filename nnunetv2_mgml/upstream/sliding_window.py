"""nnU-Net's sliding window for a network with more output channels than the model has heads.

Bends: ``nnUNetPredictor.network`` and ``nnUNetPredictor.label_manager``, while a window runs.
Why: the window allocates ``label_manager.num_segmentation_heads`` channels, whatever the network returns.
Guarded by: tests/upstream/test_inference_drift.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn


@contextmanager
def network_with_heads(predictor: nnUNetPredictor, network: nn.Module, heads: int) -> Iterator[None]:
    """Let a predictor's sliding window run another network.

    Args:
        predictor: its network and label manager are exchanged, and put back at the end.
        network: maps ``(B, C, *spatial)`` to ``(B, heads, *spatial)``.
        heads: number of its output channels.
    """
    own = predictor.network, predictor.label_manager
    predictor.network = network
    # all the sliding window asks of it is how many channels to allocate
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=heads)
    try:
        yield
    finally:
        predictor.network, predictor.label_manager = own
