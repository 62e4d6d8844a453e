"""Losses against numbers that the published training scripts computed, in float64."""

from __future__ import annotations

import pytest
import torch
from oracle_cases import Oracle

from nnunetv2_mgml.network.interface import SingleModalities
from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters
from nnunetv2_mgml.objective.published.fusion import REFERENCE_SHARPNESS, REFERENCE_START, raw_fusion
from nnunetv2_mgml.objective.published.reference import reference_consistency_loss, reference_soft_label_loss
from nnunetv2_mgml.objective.rebalancing import modality_divergence, prototype_distances, relative_preference

EVERYONE = torch.ones(1, 4, dtype=torch.bool)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_meta_amf_of_the_published_code(case: str) -> None:
    """MetaNetwork, fusion of raw logits and L_SL without masking, gradients into both; logits of scale 0.3, 3, 20."""
    oracle = Oracle("mgml_amf")
    meta = MetaNetwork(4, 4, 64, REFERENCE_SHARPNESS, REFERENCE_START, availability_bits=False).double()
    oracle.load(
        meta, layers__0__weight="f1_w", layers__0__bias="f1_b", layers__2__weight="f2_w", layers__2__bias="f2_b"
    )
    x = oracle.leaf(f"{case}_x")
    means = x.softmax(2).flatten(3).mean(3)
    oracle.check(f"{case}_z", means.flatten(1))
    parameters = meta(means, EVERYONE)
    wanted = oracle[f"{case}_par"][0, 2:]
    found = torch.stack((parameters.w_f, parameters.beta, parameters.alpha))[:, 0]
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
    fused = raw_fusion(x, EVERYONE, parameters)
    oracle.check(f"{case}_s", fused)
    tau = oracle["tau"].item()
    oracle.check(f"{case}_soft", (fused / tau).softmax(1))
    for key, w_f in (("hi", 1.0), ("lo", 0.0)):
        alone = MetaParameters(*parameters[:2], torch.full_like(parameters.w_f, w_f), *parameters[3:])
        oracle.check(f"{case}_{key}", raw_fusion(x, EVERYONE, alone))
    loss = reference_soft_label_loss(x, parameters, tau, ratio=0.0)
    oracle.check(f"{case}_lsl", loss)
    loss.backward()
    oracle.check(f"{case}_gx", x.grad)
    for key, parameter in (("f1_w", meta.layers[0].weight), ("f2_w", meta.layers[2].weight)):
        oracle.check(f"{case}_g_{key}", parameter.grad)


def test_consistency_of_the_published_code() -> None:
    """Softmax of a softmax, summed over voxels."""
    oracle = Oracle("mgml_criteria")
    student = oracle.leaf("cr_s")
    loss = reference_consistency_loss(student, oracle["cr_t"], oracle["tau"].item(), regions=False)
    oracle.check("cr", loss)
    loss.backward()
    oracle.check("g_cr_s", student.grad)


def test_share_of_voxels_the_published_code_masks() -> None:
    """It draws with replacement; a chance of exp(-ratio) per voxel to be kept has the same mean."""
    oracle = Oracle("mgml_mask")
    dropped = 1 - torch.exp(-oracle["ratio"]).item()
    assert dropped == pytest.approx(oracle["share_mean"].item(), abs=1e-3)


def published_divergence(student: torch.Tensor, teacher: torch.Tensor, tau: float) -> torch.Tensor:
    """``tau^2`` times the mean over classes and voxels, ``(B,)``, of probabilities ``(B, K, *spatial)``."""
    return tau**2 * (teacher * (teacher.log() - student.log())).flatten(1).mean(1)


def test_distillation_of_passion() -> None:
    """Published: the mean over four classes, where ours is the sum, and the lower head's maps brought to full size."""
    oracle = Oracle("passion_losses")
    tau, mask = oracle["tau"].item(), oracle["mask"]
    students, teacher = oracle["a_st"], oracle["a_te"]
    nothing = torch.zeros(2, 4, 1, 1, 1, 1, dtype=torch.float64)
    single = SingleModalities([students], nothing, [teacher], nothing[:, 0])
    full = modality_divergence(single, [None], tau, regions=False) / 4

    def whole(logits: torch.Tensor) -> torch.Tensor:
        maps = (logits / tau).softmax(1)
        return torch.nn.functional.interpolate(maps, scale_factor=2, mode="trilinear", align_corners=True)

    low = [published_divergence(whole(oracle["a_st_low"][:, m]), whole(oracle["a_te_low"]), tau) for m in range(4)]
    oracle.check("a_kl", (full + 0.5 * torch.stack(low, 1)) * mask)


def test_prototypes_of_passion() -> None:
    """Squared and absolute distances of the similarity maps, the preference and its switch."""
    oracle = Oracle("passion_losses")
    mask = oracle["mask"]
    students = oracle.leaf("a_fs")
    single = SingleModalities([], students, [], oracle["a_ft"])
    squared, distance = prototype_distances(single, oracle["a_lab"].long(), None, 4)
    oracle.check("a_proto", squared * mask)
    oracle.check("a_dist", distance * mask)
    preference = relative_preference(distance * mask, mask).sum(0)
    torch.testing.assert_close(preference, oracle["a_pref"], atol=1e-10, rtol=0)
    assert torch.equal(preference > 0, oracle["a_switch"])
    switch, weights = oracle["a_switch"].double(), oracle["wm"]
    (0.1 * (squared * mask * switch * weights).sum()).backward()
    oracle.check("a_g_fs", students.grad)
