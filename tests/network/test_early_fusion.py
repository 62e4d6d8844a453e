"""The early-fusion form: what the multi-encoder form guarantees, with stems and one trunk."""

from __future__ import annotations

import pytest
import torch
from builders import network, options_with
from network_cases import LAYOUTS, batch

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.early_fusion import EarlyFusionUNet
from nnunetv2_mgml.network.interface import Needs, View

FUSIONS = [
    ("demoseg", {}),
    ("demoseg", {"stand_in": "none"}),
    ("demoseg", {"gating": "learned"}),
    ("mean", {}),
    ("uhved", {}),
]


def early(fusion: str = "demoseg", options: dict[str, object] | None = None, **kwargs: object) -> EarlyFusionUNet:
    config = options_with(fusion=fusion, fusion_options=options or {}, network_form="early_fusion", width_factor=1.0)
    torch.manual_seed(0)
    return network(config, **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
def test_shapes(fusion: str, options: dict[str, object], layout: str) -> None:
    net = early(fusion, options, deep_supervision=True, **LAYOUTS[layout])
    x = batch(LAYOUTS[layout]["patch"])
    outputs = net(x, torch.tensor([[True, False, True, False], [False, False, False, True]]))
    assert len(outputs) == 2
    assert outputs[0].shape == (2, 3, *LAYOUTS[layout]["patch"])
    net.decoder.deep_supervision = False
    assert torch.equal(net(x, torch.ones(2, 4).bool()).isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
def test_missing_is_exact(fusion: str, options: dict[str, object]) -> None:
    """Noise, or NaN, in an absent channel changes no bit, for all subsets, in one batch and from shared features."""
    net = early(fusion, options).eval()
    subsets = torch.tensor(all_subsets(4))
    clean = batch((16, 16, 16), size=1)
    with torch.no_grad():
        for subset in subsets:
            absent = ~subset[None, :, None, None, None]
            results = [net(torch.where(absent, value, clean), subset[None]) for value in (0.0, 1e3, float("nan"))]
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
def test_subsets_from_shared_stems(fusion: str, options: dict[str, object]) -> None:
    net = early(fusion, options).eval()
    subsets = torch.tensor(all_subsets(4))
    x = batch((16, 16, 16), size=2)
    with torch.no_grad():
        features = net.encode(x)
        together = net.decode_subsets(features, subsets)
        assert together.shape == (2, 15, 3, 16, 16, 16)
        for s, subset in enumerate(subsets):
            torch.testing.assert_close(together[:, s], net(x, subset.expand(2, -1)), atol=1e-4, rtol=1e-4)


def test_each_modality_alone_through_the_trunk() -> None:
    """Label logits of every modality come from the trunk fed with that modality's subset, without looking at others."""
    net = early().eval()
    x = batch((16, 16, 16))
    with torch.no_grad():
        alone = net.decode_modalities(net.encode(x))
        assert alone.shape == (2, 4, 4, 16, 16, 16)
        other = x.clone()
        other[:, 1:] = 7
        assert torch.equal(alone[:, 0], net.decode_modalities(net.encode(other))[:, 0])


@pytest.mark.parametrize(("fusion", "options"), FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_reaches_every_parameter(fusion: str, options: dict[str, object], dtype: torch.dtype) -> None:
    """Under every single mask, as DDP needs it; finite, in half precision too."""
    net = early(fusion, options, deep_supervision=True).train()
    x = batch((16, 16, 16))
    available = torch.tensor([[True, True, True, True], [True, True, False, True]])
    for m in range(2):
        net.zero_grad()
        mask = (torch.arange(4) == m).expand(2, -1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = net(x, View(mask, available), Needs(complete="learns", modality=True))
        parts = (*output.student, output.modality, output.fusion_loss, *output.complete)
        sum(part.float().square().mean() for part in parts).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in net.parameters())


def test_one_graph() -> None:
    net = early().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = batch((16, 16, 16))
    with torch.no_grad():
        for mask in ([[True, False, True, False]] * 2, [[False, True, True, True]] * 2):
            mask = torch.tensor(mask)
            torch.testing.assert_close(compiled(x, mask), net(x, mask), atol=1e-4, rtol=1e-4)


def test_the_trunk_costs_the_same_for_every_number_of_modalities() -> None:
    sizes = [sum(p.numel() for p in early(modalities=m).decoder.parameters()) for m in (2, 4)]
    assert sizes[0] == sizes[1]


def test_two_forms_are_two_networks() -> None:
    from nnunetv2_mgml.training.compatibility import network_differences

    plans = [
        {"configurations": {}, "mgml": {"config": options_with(fusion="mean", network_form=form).as_dict()}}
        for form in ("multi_encoder", "early_fusion")
    ]
    assert network_differences(*plans, "3d_fullres") == ["network_form was 'multi_encoder', is now 'early_fusion'"]
