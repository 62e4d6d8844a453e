from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import bools, labels_of, nnunet_loss, randn, slow_segmentation_loss

from nnunetv2_mgml.objective.segmentation import (
    auxiliary_loss,
    class_mass,
    label_target,
    modality_segmentation_loss,
)

K = 4


def region_target(labels: torch.Tensor, classes: int = K) -> torch.Tensor:
    """Nested regions, largest first, as nnU-Net's transform makes them (bool)."""
    return torch.stack([labels >= k for k in range(1, classes)], 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_label_target_rebuilds_labels_from_nested_regions(dtype: torch.dtype) -> None:
    labels = labels_of(2, 3, 4, 5, classes=K)
    rebuilt, valid = label_target(region_target(labels).to(dtype), regions=True, ignore_label=None)
    assert valid is None
    assert rebuilt.dtype == torch.int64
    assert torch.equal(rebuilt, labels)


def test_later_regions_overwrite_earlier_ones() -> None:
    """nnU-Net's regions_class_order: a voxel of regions 0 and 2 only is class 3, even where 1 does not hold it."""
    target = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[1, 0, 0, 0]]])[None].bool()
    labels, _ = label_target(target, regions=True, ignore_label=None)
    assert labels.tolist() == [[[3, 2, 2, 0]]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_ignore_channel_of_regions_comes_last(dtype: torch.dtype) -> None:
    labels = labels_of(2, 4, 5, classes=K)
    ignored = bools(2, 4, 5, seed=3)
    target = torch.cat((region_target(labels), ignored[:, None]), 1).to(dtype)
    rebuilt, valid = label_target(target, regions=True, ignore_label=K)
    assert torch.equal(valid, ~ignored)
    assert torch.equal(rebuilt, torch.where(ignored, 0, labels))


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_label_targets_with_and_without_ignore(dtype: torch.dtype) -> None:
    labels = labels_of(2, 4, 5, classes=K + 1)
    rebuilt, valid = label_target(labels[:, None].to(dtype), regions=False, ignore_label=K)
    assert torch.equal(valid, labels < K)
    assert torch.equal(rebuilt, torch.where(labels < K, labels, 0))
    rebuilt, valid = label_target(labels[:, None].to(dtype), regions=False, ignore_label=None)
    assert valid is None
    assert torch.equal(rebuilt, labels)


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
@pytest.mark.parametrize("spatial", [(4, 5), (3, 4, 2)])
def test_against_slow_reference(modalities: int, spatial: tuple[int, ...]) -> None:
    logits, labels = randn(2, modalities, K, *spatial), labels_of(2, *spatial, classes=K)
    valid, present = bools(2, *spatial, chance=0.7), bools(2, modalities, seed=2)
    expected = slow_segmentation_loss(logits, labels, valid, present)
    assert modality_segmentation_loss(logits, labels, valid, present).item() == pytest.approx(expected, abs=1e-5)


def test_equals_nnunets_loss_for_one_modality() -> None:
    logits, labels = randn(1, 1, K, 6, 5, 4), labels_of(1, 6, 5, 4, classes=K)
    stock = nnunet_loss(regions=False)(logits[:, 0], labels[:, None])
    assert modality_segmentation_loss(logits, labels, None, torch.ones(1, 1).bool()).item() == pytest.approx(
        stock.item(), abs=1e-6
    )
    ignoring = labels.clone()
    ignoring[0, :2] = K
    stock = nnunet_loss(regions=False, ignore_label=K)(logits[:, 0], ignoring[:, None])
    found, valid = label_target(ignoring[:, None], regions=False, ignore_label=K)
    assert modality_segmentation_loss(logits, found, valid, torch.ones(1, 1).bool()).item() == pytest.approx(
        stock.item(), abs=1e-6
    )


def test_batch_dice_pools_the_samples_a_modality_is_in() -> None:
    logits, labels = randn(3, 2, K, 4, 5), labels_of(3, 4, 5, classes=K)
    present = torch.tensor([[True, False], [True, False], [False, False]])
    together = torch.cat(list(logits[:2, 0]), -1)[None, None]
    joined = torch.cat(list(labels[:2]), -1)[None]
    expected = modality_segmentation_loss(together, joined, None, torch.ones(1, 1).bool())
    assert modality_segmentation_loss(logits, labels, None, present, batch_dice=True).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


@pytest.mark.parametrize("batch_dice", [False, True])
def test_absent_pairs_and_ignored_voxels_have_exactly_no_influence(batch_dice: bool) -> None:
    logits, labels = randn(2, 3, K, 4, 5).requires_grad_(), labels_of(2, 4, 5, classes=K)
    present, valid = torch.tensor([[True, False, True], [False, False, True]]), bools(2, 4, 5)
    modality_segmentation_loss(logits, labels, valid, present, batch_dice).backward()
    assert not logits.grad[~present].any()
    assert not logits.grad.movedim(2, -1)[~valid[:, None].expand(2, 3, 4, 5)].any()
    assert logits.grad[present].abs().amax((1, 2, 3)).gt(0).all()


def test_nothing_present_and_nothing_valid_stay_finite() -> None:
    logits, labels = randn(1, 2, K, 4, 5).requires_grad_(), labels_of(1, 4, 5, classes=K)
    absent, present = torch.zeros(1, 2).bool(), torch.ones(1, 2).bool()
    assert modality_segmentation_loss(logits, labels, None, absent).item() == 0
    loss = modality_segmentation_loss(logits, labels, torch.zeros(1, 4, 5).bool(), present)
    loss.backward()
    assert loss.isfinite()
    assert not logits.grad.any()


@settings(max_examples=20, deadline=None)
@given(
    scale=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_finite_for_extreme_logits(scale: float, dtype: torch.dtype, seed: int) -> None:
    logits = randn(2, 2, K, 3, 4, seed=seed, scale=1).clamp(-1, 1).mul(scale).to(dtype).requires_grad_()
    loss = modality_segmentation_loss(logits, labels_of(2, 3, 4, classes=K), None, bools(2, 2, seed=seed))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss >= -1.0001
    assert logits.grad.isfinite().all()


def test_autocast_changes_nothing() -> None:
    logits, labels, present = randn(1, 2, K, 4, 5), labels_of(1, 4, 5, classes=K), torch.ones(1, 2).bool()
    plain = modality_segmentation_loss(logits, labels, None, present)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(modality_segmentation_loss(logits, labels, None, present), plain)


def test_two_samples_are_the_mean_of_their_pairs() -> None:
    logits, labels = randn(2, 3, K, 4, 5), labels_of(2, 4, 5, classes=K)
    present = torch.tensor([[True, False, True], [False, False, True]])
    single = [
        modality_segmentation_loss(logits[b : b + 1], labels[b : b + 1], None, present[b : b + 1]) for b in (0, 1)
    ]
    assert modality_segmentation_loss(logits, labels, None, present).item() == pytest.approx(
        ((2 * single[0] + single[1]) / 3).item(), abs=1e-6
    )


@pytest.mark.parametrize("batch_dice", [False, True])
def test_gradcheck(batch_dice: bool) -> None:
    logits = randn(2, 2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    labels, valid, present = labels_of(2, 2, 3, classes=3), bools(2, 2, 3), torch.tensor([[True, True], [False, True]])
    assert torch.autograd.gradcheck(lambda x: modality_segmentation_loss(x, labels, valid, present, batch_dice), logits)


def test_auxiliary_loss_is_the_mean_over_outputs_at_their_resolution() -> None:
    labels, valid = labels_of(2, 8, 8, 8, classes=K), bools(2, 8, 8, 8, chance=0.8)
    outputs = [randn(2, K, 8, 8, 8), randn(2, K, 4, 4, 4), randn(2, K, 8, 4, 2)]
    everyone = torch.ones(2, 1).bool()
    expected = []
    for output in outputs:
        # nearest-exact: the voxel at whose centre the coarse voxel's centre lies, rounded towards the next one
        where = [torch.tensor([int((i + 0.5) * 8 / n) for i in range(n)]) for n in output.shape[2:]]
        small, small_valid = (x[:, where[0]][:, :, where[1]][:, :, :, where[2]] for x in (labels, valid))
        expected.append(slow_segmentation_loss(output[:, None], small, small_valid, everyone))
    assert auxiliary_loss(outputs, labels, valid).item() == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert auxiliary_loss([], labels, valid).item() == 0


@pytest.mark.parametrize("masked", [False, True])
def test_class_mass_and_its_gradient(masked: bool) -> None:
    """The probabilities are found again on the way back instead of being kept."""
    log_probabilities = randn(2, 3, 4, 5, 2).double().log_softmax(2)
    valid = bools(2, 5, 2, chance=0.6) if masked else None
    weights = randn(2, 3, 4, seed=1).double()
    mine, plain = log_probabilities.clone().requires_grad_(), log_probabilities.clone().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        mass = class_mass(mine, valid)
    assert all(tensor.data_ptr() == mine.data_ptr() for tensor in kept if tensor.is_floating_point())
    counted = torch.ones(2, 5, 2) if valid is None else valid
    expected = (plain.exp() * counted[:, None, None]).flatten(3).sum(-1)
    torch.testing.assert_close(mass, expected)
    (mass * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad)
