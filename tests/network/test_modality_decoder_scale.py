"""`modality_decoder_scale`: the decoder shared by all modalities, and what it is taught, end before full resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from builders import network
from inference_cases import CHANNELS, image, write_image, write_model
from loss_cases import objective_of
from network_cases import batch, config

from nnunetv2_mgml.inference.inputs import Case
from nnunetv2_mgml.io.files import read_json, write_json
from nnunetv2_mgml.network.build import modality_scale
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.plans.options import PLANS_KEY, NetworkOptions
from nnunetv2_mgml.plans.presets import PAPER_LOSSES, REFERENCE_LOSSES
from nnunetv2_mgml.presentation.internals import compute_internals, load_model
from nnunetv2_mgml.workflows.plan import make_plans

MASK = torch.tensor([[True, False, True, True], [False, True, False, False]])
VIEW = View(MASK, torch.ones_like(MASK))


@pytest.mark.parametrize("scale", [0, 1])
def test_ends_where_it_is_told(scale: int) -> None:
    """It has a stage fewer, reads no finer features, and the prediction does not know of it."""
    net, whole = (network(config("mean", modality_decoder_scale=each), deep_supervision=True) for each in (scale, 0))
    assert len(net.modality_decoder.stages) == len(net.decoder.stages) - scale
    x = batch((16, 16, 16))
    out = net(x, VIEW, Needs(modality=True))
    assert out.modality.shape == (2, 4, 4, *(16 // 2**scale,) * 3)
    finest = net.encode(x)[0].detach().requires_grad_()
    others = net.encode(x)[1:]
    gradient = torch.autograd.grad(net.decode_modalities([finest, *others]).sum(), finest, allow_unused=True)[0]
    assert (gradient is None) == bool(scale)
    whole.load_state_dict({**whole.state_dict(), **{k: v for k, v in net.state_dict().items() if "modality" not in k}})
    assert torch.equal(whole(x, MASK)[0], net(x, MASK)[0])


@pytest.mark.parametrize("fusion", ["mean", "region_aware"])
def test_every_parameter_learns(fusion: str) -> None:
    net = network(config(fusion, modality_decoder_scale=1), deep_supervision=True)
    net(batch((16, 16, 16)), VIEW, Needs(modality=True)).modality.sum().backward()
    assert all(p.grad is not None for p in net.modality_decoder.parameters())


def test_by_default_it_ends_one_stage_earlier_where_it_can() -> None:
    def default(stages: int, form: str = "multi_encoder") -> int:
        return modality_scale(NetworkOptions(network_form=form), stages)

    assert [default(stages) for stages in (2, 3, 4, 6)] == [0, 1, 1, 1]
    assert default(4, "early_fusion") == 0
    net = network(config("mean"), deep_supervision=True)
    assert net.modality_scale == 1
    assert len(net.modality_decoder.stages) == len(net.decoder.stages) - 1


def test_models_of_before_end_at_full_resolution(tmp_path: Path) -> None:
    """Their plans say nothing of it; neither does what `mgml plan` makes of them change that."""
    block = {"version": "0.2.0", "config": {"fusion": "mean", "fusion_revision": 2}}
    assert Options.from_plans({PLANS_KEY: block}).network.modality_decoder_scale == 0
    assert Options.from_plans({PLANS_KEY: {"version": "0.2.0"}}).network.modality_decoder_scale == 0
    assert Options.from_plans({}).network.modality_decoder_scale is None
    stock = {**builders.plans(stages=3), PLANS_KEY: block}
    planned = make_plans(stock, {"num_epochs": 3}, ["3d_fullres"], "Later", CHANNELS)
    assert planned[PLANS_KEY]["config"]["modality_decoder_scale"] == 0
    now = {**block, "config": {**block["config"], "modality_decoder_scale": None}}
    assert Options.from_plans({PLANS_KEY: now}).network.modality_decoder_scale is None
    options = {"modality_decoder_scale": 0, "conditional_norms": False, "network_form": "multi_encoder"}
    folder = write_model(tmp_path / "before", options=options, stages=3)
    plans = read_json(folder / "plans.json")
    plans[PLANS_KEY]["version"] = "0.2.0"  # as in every model
    del plans[PLANS_KEY]["config"]["modality_decoder_scale"]
    write_json(folder / "plans.json", plans)
    assert load_model(folder, 0, "checkpoint_final.pth", "cpu").network.modality_scale == 0


def test_scales_without_a_decoder_are_refused() -> None:
    for weight in (0.7, 0.0):
        with pytest.raises(ValueError, match="modality_decoder_scale is 2; with 3 stages it can be 0 to 1"):
            network(config("mean", modality_decoder_scale=2, modality_decoder_weight=weight, soft_label="none"))
    with pytest.raises(ValueError, match="early_fusion has no decoder"):
        network(config("mean", network_form="early_fusion", modality_decoder_scale=1))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("regions", [True, False])
def test_targets_are_nnunets_at_that_scale(regions: bool, ignore: bool, deep: bool) -> None:
    """With deep supervision those that come with it, else what its transform would make."""
    torch.manual_seed(0)
    heads = 3 + ignore if regions else 1
    full = torch.rand(2, heads, 8, 8, 8) > 0.6 if regions else torch.randint(0, 4 + ignore, (2, 1, 8, 8, 8))
    transform = DownsampleSegForDSTransform([1, 0.5])
    scales = [
        torch.stack(each)
        for each in zip(*(transform(segmentation=sample)["segmentation"] for sample in full), strict=True)
    ]
    net = network(config("mean", modality_decoder_scale=1), deep_supervision=True, patch=(8, 8, 8))
    out = net(batch((8, 8, 8)), VIEW, Needs(modality=True))
    objective = objective_of(config("mean"), regions=regions, ignore_label=4 if ignore else None)
    step = Step(objective.spec, out, VIEW, scales if deep else full)
    coarse = Step(objective.spec, out, VIEW, scales[1])
    assert torch.equal(step.modality_labels, coarse.labels)
    assert (step.modality_valid is None) == (not ignore)
    if ignore:
        assert torch.equal(step.modality_valid, coarse.valid)
    assert step.labels.shape == (2, 8, 8, 8)


@pytest.mark.parametrize("losses", [{}, PAPER_LOSSES, REFERENCE_LOSSES], ids=("own", "text", "code"))
def test_every_objective_trains_with_it(losses: dict[str, Any]) -> None:
    """Each term, the published readings included: a finite loss, and the encoders learn."""
    options = config("mean").updated({**losses, "fusion": "mean", "modality_decoder_scale": 1})
    objective, net = objective_of(options), network(options)
    x, target = batch((16, 16, 16)), torch.rand(2, 3, 16, 16, 16) > 0.7
    total = objective(net(x, VIEW, objective.needs), target, VIEW, 1.0).total
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.encoders.parameters())
    assert any(p.grad.abs().max() > 0 for p in net.modality_decoder.parameters())


def test_the_report_shows_modalities_at_full_size(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "nnUNetTrainerMGML__nnUNetPlans__3d_fullres", options={"modality_decoder_scale": 1}, stages=3
    )
    files = {c: str(write_image(tmp_path / f"a_{c:04d}.nii.gz", image(c, 1, (16, 16, 16), margin=0))) for c in range(4)}
    labels = write_image(tmp_path / "labels.nii.gz", np.ones((16, 16, 16), np.uint8))
    inside = compute_internals(load_model(folder, 0, "checkpoint_final.pth", "cpu"), Case("a", files), labels, [])
    assert set(inside.single) == set(CHANNELS)
    assert {np.shape(each) for each in inside.single.values()} == {np.shape(inside.fused)}
