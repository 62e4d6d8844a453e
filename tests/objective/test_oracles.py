"""Losses against numbers that the published training scripts computed, in float64."""

from __future__ import annotations

import pytest
import torch
from oracle_cases import Oracle

from nnunetv2_mgml.network.interface import SingleModalities
from nnunetv2_mgml.objective.balance import ModalityBalance
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


@pytest.mark.parametrize("case", ["a", "b"])
def test_distillation_of_passion(case: str) -> None:
    """Published: the mean over four classes, where ours is the sum, and the lower head's maps brought to full size."""
    oracle = Oracle("passion_losses")
    tau, mask = oracle["tau"].item(), oracle["mask"]

    def whole(logits: torch.Tensor) -> torch.Tensor:
        maps = (logits / tau).softmax(1)
        return torch.nn.functional.interpolate(maps, scale_factor=2, mode="trilinear", align_corners=True)

    full = divergence_of_passion(oracle, case) / 4
    low = [
        published_divergence(whole(oracle[f"{case}_st_low"][:, m]), whole(oracle[f"{case}_te_low"]), tau)
        for m in range(4)
    ]
    oracle.check(f"{case}_kl", (full + 0.5 * torch.stack(low, 1)) * mask)


def divergence_of_passion(oracle: Oracle, case: str) -> torch.Tensor:
    """Ours, at full resolution, ``(B, M)``."""
    nothing = torch.zeros(2, 4, 1, 1, 1, 1, dtype=torch.float64)
    single = SingleModalities([oracle[f"{case}_st"]], nothing, [oracle[f"{case}_te"]], nothing[:, 0])
    return modality_divergence(single, [None], oracle["tau"].item(), regions=False)


def test_distillation_of_passion_is_not_clipped_here() -> None:
    """Logits 30 times larger: published probabilities are clipped at 0.005, which bounds the term; ours go on."""
    oracle = Oracle("passion_losses")
    mask = oracle["mask"]
    assert (divergence_of_passion(oracle, "c") / 4)[mask].min() > oracle["c_kl"][mask].max()


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_prototypes_of_passion(case: str) -> None:
    """Squared and absolute distances of the similarity maps, the preference and its switch.

    In case b a class is missing in the second sample. Published, it then counts in no sample; here in the first.
    """
    oracle = Oracle("passion_losses")
    mask, labels = oracle["mask"], oracle[f"{case}_lab"].long()
    students = oracle.leaf(f"{case}_fs")
    single = SingleModalities([], students, [], oracle[f"{case}_ft"])
    squared, distance = prototype_distances(single, labels, None, 4)
    if case == "b":
        assert not (labels[1] == 3).any()
        oracle.check("b_proto", squared * mask, tolerance=3e-2)
        alike = (squared * mask)[1], oracle["b_proto"][1]
        torch.testing.assert_close(*alike, atol=1e-12, rtol=0)
        return
    oracle.check(f"{case}_proto", squared * mask)
    oracle.check(f"{case}_dist", distance * mask)
    preference = relative_preference(distance * mask, mask).sum(0)
    torch.testing.assert_close(preference, oracle[f"{case}_pref"], atol=1e-10, rtol=0)
    assert torch.equal(preference > 0, oracle[f"{case}_switch"])
    switch, weights = oracle[f"{case}_switch"].double(), oracle["wm"]
    (0.1 * (squared * mask * switch * weights).sum()).backward()
    assert students.grad is not None
    oracle.check(f"{case}_g_fs", students.grad)


@pytest.mark.parametrize("case", ["const", "vary"])
def test_balance_weights_of_passion(case: str) -> None:
    """300 epochs of ``beta``, its rate growing before the step at the start of every third."""
    oracle = Oracle("passion_beta")
    balance = ModalityBalance(("flair", "t1ce", "t1", "t2"), rate=0.01)
    everyone = torch.ones(1, 4, dtype=torch.bool)
    found = [balance.beta]
    for epoch, distance in enumerate(oracle[f"{case}_dist"]):
        balance._sums = torch.zeros(2, 4, dtype=torch.float64)
        balance.observe(distance[None], everyone)
        balance.end_epoch(epoch, 300)
        found.append(balance.beta)
    oracle.check(f"{case}_beta", torch.stack(found), tolerance=1e-11)
