"""Every term, in every variant, gives the numbers it gave before the terms were files of their own.

``frozen.json`` was written by version 0.1: totals, parts, norms and projections of gradients, and the random number
that comes next. nnU-Net's own loss computes in float32, all else here in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import options_with
from loss_cases import nnunet_loss, randn
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from objective_cases import AVAILABLE, BETA, CASES, COUNT, LAYOUTS, RAMP, VARIANTS, VISIBLE, K, inputs

from nnunetv2_mgml.network.interface import SingleModalities, TrainingOutput
from nnunetv2_mgml.objective import Objective, TermSpec
from nnunetv2_mgml.objective.published import paper
from nnunetv2_mgml.objective.terms import soft_label
from nnunetv2_mgml.objective.terms.rebalancing import Rebalancing
from nnunetv2_mgml.objective.voxel_masking import keep_map

FROZEN: dict[str, Any] = json.loads((Path(__file__).parent / "frozen.json").read_text())


def close(expected: Any, single: bool = False) -> Any:
    """Equal, up to the order in which a sum is taken; ``single``: float32 has a part in it."""
    return pytest.approx(expected, rel=2e-6 if single else 1e-10, abs=1e-9 if single else 1e-13)


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_version_0_1(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, layout = case.split("/")
    for module in (soft_label, paper):  # version 0.1 took ignored voxels too for those whose chances have a given mean
        monkeypatch.setattr(module, "keep_map", lambda *given, valid=None: keep_map(*given))
    x, kind = inputs(**LAYOUTS[layout]), LAYOUTS[layout]
    options = options_with(**VARIANTS[variant])
    stock = nnunet_loss(kind["regions"], K if kind["ignore"] else None)
    torch.manual_seed(7)
    objective = Objective(
        TermSpec(
            options,
            channels=("a", "b", "c"),
            num_classes=K,
            regions=kind["regions"],
            segmentation_loss=DeepSupervisionWrapper(stock, [0.7, 0.3]) if kind["deep"] else stock,
            ignore_label=K if kind["ignore"] else None,
        )
    ).double()
    needs = objective.needs
    rebalancing = dict(objective.terms).get("rebalancing")
    if isinstance(rebalancing, Rebalancing):
        rebalancing.balance.beta, rebalancing.balance.count_weights = BETA, COUNT
    complete = x.complete if needs.complete == "learns" else [scale.detach() for scale in x.complete]
    teacher = x.student if needs.complete == "no" else x.complete
    single = SingleModalities(
        x.single_students, x.single_features, [scale.detach() for scale in teacher], x.teacher_features.detach()
    )
    output = TrainingOutput(
        x.student,
        [x.auxiliary],
        x.fusion_loss,
        x.modality if needs.modality else None,
        complete if needs.complete != "no" else None,
        single if needs.single else None,
    )
    visible = AVAILABLE if options.sampling.mask_sampling == "fixed" else VISIBLE
    torch.manual_seed(11)
    value = objective(output, x.target, objective.draw_view(visible, AVAILABLE), RAMP)
    value.total.backward()

    expected = FROZEN[case]
    found = {name: scalar.item() for name, scalar in (value.parts | value.noted).items()}
    assert set(found) == set(expected["parts"])
    for name, scalar in found.items():
        assert scalar == close(expected["parts"][name], name in ("segmentation", "complete")), name
    assert value.total.item() == close(expected["total"], single=True)
    assert torch.rand(1).item() == expected["rng"]
    for name, leaf in x.leaves().items():
        norm = expected["gradients"][name]
        assert (leaf.grad is None) == (norm is None), name
        if norm is not None:
            single = name.startswith(("student", "complete"))
            assert leaf.grad.norm().item() == close(norm, single), name
            projected = (leaf.grad.flatten() * randn(leaf.numel(), seed=99, dtype=torch.float64)).sum()
            assert projected.item() == close(expected["projected"][name], single), name
    assert [p.grad.norm().item() for p in objective.parameters()] == close(expected.get("meta_gradients", []))
    if isinstance(rebalancing, Rebalancing):
        distance = torch.tensor(expected["distance"], dtype=torch.float64).sum(0)
        assert rebalancing.balance._sums[0].tolist() == close(distance.tolist(), single=True)
