"""`distributed`: joining the processes of torchrun, and what is relied on in nnU-Net's trainer."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import pytest
import torch
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as upstream
from torch import distributed as torch_distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mgml.upstream import distributed


def launch(patch: pytest.MonkeyPatch, world: int = 2) -> None:
    """Pretend that torchrun started this process, the second of its node."""
    for name, value in (("RANK", 5), ("LOCAL_RANK", 1), ("WORLD_SIZE", world), ("MASTER_PORT", 1)):
        patch.setenv(name, str(value))
    patch.setenv("MASTER_ADDR", "localhost")


def test_what_nnunet_does_is_what_is_bent() -> None:
    assert upstream.DDP is DistributedDataParallel
    source = inspect.getsource(upstream.nnUNetTrainer)
    assert "self.network = DDP(self.network, device_ids=[self.local_rank])" in source
    assert "self.is_ddp = dist.is_available() and dist.is_initialized()" in source
    assert "self.device = torch.device(type='cuda', index=self.local_rank)" in source
    assert "if num_gpus > 1:" in inspect.getsource(run_training.run_training)


def test_without_torchrun_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not distributed.launched()
    launch(monkeypatch, world=1)
    assert not distributed.launched()
    with distributed.process_group(["-num_gpus", "2"]):
        assert upstream.DDP is DistributedDataParallel
        assert not torch_distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "backend"), [(["137", "-device", "cpu"], "gloo"), (["137", "-device=cpu"], "gloo"), (["137"], "nccl")]
)
def test_the_group_and_the_device(monkeypatch: pytest.MonkeyPatch, arguments: list[str], backend: str) -> None:
    launch(monkeypatch)
    calls: list[Any] = []
    monkeypatch.setattr(torch_distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch_distributed, "destroy_process_group", lambda: calls.append("left"))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    with contextlib.suppress(RuntimeError), distributed.process_group(arguments):
        assert upstream.DDP is distributed.on_own_device
        raise RuntimeError("in a training")
    assert upstream.DDP is DistributedDataParallel
    own = [] if backend == "gloo" else [torch.device("cuda", 1)]  # not 5, which is its rank
    assert calls == [*own, backend, "left"]


def test_num_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch)
    with pytest.raises(ValueError, match="leave -num_gpus out"), distributed.process_group(["-num_gpus", "2"]):
        pass


def test_a_trainer_is_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        is_ddp = True
        device = torch.device("cuda", 5)
        grad_scaler: Any = "scaler"

    launch(monkeypatch)
    trainer = Trainer()
    distributed.place(trainer, torch.device("cuda"))
    assert (trainer.device, trainer.grad_scaler) == (torch.device("cuda", 1), "scaler")
    distributed.place(trainer, torch.device("cpu"))
    assert (trainer.device, trainer.grad_scaler) == (torch.device("cpu"), None)
    monkeypatch.delenv("RANK")
    other = Trainer()
    distributed.place(other, torch.device("cpu"))
    assert other.device == torch.device("cuda", 5)  # nnU-Net's own processes, which number GPUs as it does


def test_wrapping_goes_by_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        distributed, "DistributedDataParallel", lambda module, device_ids: asked.append((module, device_ids))
    )
    distributed.on_own_device(module := nn.Linear(1, 1), device_ids=[5])
    assert asked == [(module, None)]
