"""A batch for the training step, and a run that is killed."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def synthetic_batch(trainer: Any, spatial: tuple[int, ...] | None = None) -> dict[str, Any]:
    """A batch as our loader yields it, targets at the resolutions of deep supervision."""
    gen = torch.Generator().manual_seed(0)
    spatial = spatial or tuple(trainer.configuration_manager.patch_size)
    labels = torch.randint(0, 4, (2, 1, *spatial), generator=gen)
    if trainer.label_manager.has_ignore_label:
        labels[:, :, :2] = trainer.label_manager.ignore_label
    target = labels
    if trainer.label_manager.has_regions:
        regions = list(trainer.label_manager.foreground_regions)
        if trainer.label_manager.has_ignore_label:
            regions.append(trainer.label_manager.ignore_label)
        target = torch.cat([torch.isin(labels, torch.tensor(r)) for r in regions], 1)
    scales = trainer._get_deep_supervision_scales()
    targets = [target[(..., *[slice(None, None, round(1 / f)) for f in scale])] for scale in scales]
    count = trainer.num_input_channels
    return {
        "data": torch.randn(2, count, *spatial, generator=gen),
        "target": targets,
        "available": torch.ones(2, len(trainer.channels), dtype=torch.bool),
        "visible": torch.tensor([[True, False, True, True], [False, True, False, False]]),
        "keys": ["a", "b"],
    }


class InterruptedRunError(RuntimeError):
    """Stands for the kill."""


def run_until_epoch(trainer: Any, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and break off when ``epoch`` epochs are done and saved."""
    epoch_end = trainer.on_epoch_end

    def interrupt() -> None:
        epoch_end()
        if trainer.current_epoch == epoch:
            raise InterruptedRunError

    monkeypatch.setattr(trainer, "on_epoch_end", interrupt)
    with pytest.raises(InterruptedRunError):
        trainer.run_training()
