"""Two processes over gloo give the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import network, options_with
from loss_cases import objective_of
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_mgml.network.interface import View
from nnunetv2_mgml.objective.balance import ModalityBalance

WORLD = 2
CONFIG = options_with(fusion="region_aware", width_factor=1.0, mask_ratio=0.0)  # no random keep-map, so runs compare


def gradients(samples: slice, distributed: bool) -> dict[str, torch.Tensor]:
    """Gradients of the network and the MetaNetwork on some samples of one fixed batch of two."""
    torch.manual_seed(0)
    net: nn.Module = network(CONFIG, deep_supervision=True)
    own = DC_and_BCE_loss(
        {}, {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}, dice_class=MemoryEfficientSoftDiceLoss
    )
    # as nnU-Net sets it under DDP: a weight of 0 would leave a head without gradient, and DDP waits for it
    objective = objective_of(CONFIG, segmentation_loss=DeepSupervisionWrapper(own, [1.0, 1e-6]))
    if distributed:
        net = DistributedDataParallel(net)
        objective.distribute(DistributedDataParallel)
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(WORLD, 4, 16, 16, 16, generator=gen)
    labels = torch.randint(0, 4, (WORLD, 1, 16, 16, 16), generator=gen)
    target = torch.cat([labels >= region for region in (1, 2, 3)], 1)[samples]
    mask = torch.tensor([[True, False, True, False], [False, True, False, True]])[samples]
    view = View(mask, torch.ones_like(mask))
    output = net(x[samples], view, objective.needs)
    objective(output, [target, target[..., ::2, ::2, ::2]], view).total.backward()
    modules = {"network": net, "meta": objective}
    return {
        f"{kind}.{name.replace('module.', '')}": p.grad.clone()
        for kind, module in modules.items()
        for name, p in module.named_parameters()
        if p.grad is not None
    }


def balance(samples: slice) -> dict[str, float]:
    """What rebalancing logs and keeps after an epoch of one step on some samples of one fixed batch of two."""
    state = ModalityBalance(("t1", "t1ce", "t2", "flair"), 0.1)
    available = torch.tensor([[True, True, False, True], [True, False, False, True]])
    distance = torch.tensor([[0.5, 1.0, 0.0, 2.0], [1.5, 0.0, 0.0, 1.0]])
    state.observe(distance[samples], available[samples])
    return state.end_epoch(0, 3)


def run_rank(rank: int, folder: str) -> None:
    """One process of the group; rank 0 stores the reduced gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    result = gradients(slice(rank, rank + 1), distributed=True)
    torch.save(balance(slice(rank, rank + 1)), f"{folder}/balance_{rank}.pt")
    if rank == 0:
        torch.save(result, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes stored."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(run_rank, args=(str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.slow
def test_both_ranks_balance_modalities_as_one_process_would(ranks: Path) -> None:
    stored = [torch.load(ranks / f"balance_{rank}.pt") for rank in range(WORLD)]
    assert stored[0] == stored[1] == balance(slice(0, WORLD))
    assert stored[0]["distance_t1"] == 1.0
    assert "distance_t2" not in stored[0]
    assert stored[0]["balance_flair"] > stored[0]["balance_t1"]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(ranks: Path) -> None:
    reduced = torch.load(ranks / "gradients.pt")
    single = gradients(slice(0, WORLD), distributed=False)
    assert set(reduced) == set(single)
    assert any(name.startswith("meta.") for name in single)
    for name, gradient in single.items():
        assert torch.allclose(reduced[name], gradient, rtol=1e-3, atol=1e-6), name
