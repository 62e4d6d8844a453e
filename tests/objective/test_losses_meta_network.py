from __future__ import annotations

import pytest
import torch
from builders import options_with
from loss_cases import bools, meta_network_of, objective_of, randn

from nnunetv2_mgml.objective import Options
from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters


def count(network: MetaNetwork) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("reading", ["paper", "reference"])
def test_published_layers_and_start_values(reading: str) -> None:
    network = meta_network_of(objective_of(options_with(reading=reading)))
    assert count(network) == 1413
    start = network(torch.full((3, 4, 4), 0.25), torch.ones(3, 4).bool())
    for name, value, tolerance in (
        ("t1", 0.75, 0.01),
        ("t2", 0.85, 0.01),
        ("w_f", 0.5, 0.01),
        ("beta", 98.02, 0.1),
        ("alpha", 98.02, 0.1),
    ):
        assert getattr(start, name).tolist() == pytest.approx([value] * 3, abs=tolerance), name


def test_our_start_is_undecided_and_inside_the_useful_range() -> None:
    network = meta_network_of(objective_of(Options()))
    assert count(network) == 20 * 64 + 64 + 64 * 5 + 5
    start = network(torch.rand(2, 4, 4).softmax(2), torch.ones(2, 4).bool())
    assert start.w_f.tolist() == pytest.approx([0.5] * 2, abs=0.01)
    assert start.beta.tolist() == pytest.approx([10**0.5] * 2, abs=0.1)
    assert start.alpha.tolist() == pytest.approx([10**0.5] * 2, abs=0.1)


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_parameters_are_per_sample_and_bounded(modalities: int) -> None:
    network = MetaNetwork(modalities, 3, hidden=8, sharpness=(0.5, 20))
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1e4)
    found = network(randn(4, modalities, 3).softmax(2), bools(4, modalities))
    assert isinstance(found, MetaParameters)
    for value in found:
        assert value.shape == (4,)
        assert value.dtype == torch.float32
    for value in found[:3]:
        assert value.ge(0).all()
        assert value.le(1).all()
    for value in (found.beta, found.alpha):
        assert value.ge(0.5).all()
        assert value.le(20).all()


@pytest.mark.parametrize("bits", [True, False])
def test_absent_slots_have_exactly_no_influence(bits: bool) -> None:
    network = MetaNetwork(3, 4, availability_bits=bits)
    available = torch.tensor([[True, False, True]])
    means = randn(1, 3, 4).softmax(2)
    other = means.clone()
    other[0, 1] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(network(means, available), network(other, available), strict=True))


def test_availability_bits_tell_absent_from_present() -> None:
    network = MetaNetwork(2, 2)
    means = torch.zeros(1, 2, 2)
    seen = [network(means, torch.tensor([present])).w_f.item() for present in ([True, True], [True, False])]
    assert seen[0] != seen[1]


def test_two_samples_equal_two_batches_and_autocast_changes_nothing() -> None:
    network = MetaNetwork(3, 4)
    means, available = randn(2, 3, 4).softmax(2), bools(2, 3)
    both = network(means, available)
    for b in (0, 1):
        single = network(means[b : b + 1], available[b : b + 1])
        for one, two in zip(single, both, strict=True):
            torch.testing.assert_close(one[0], two[b], atol=1e-6, rtol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = network(means.bfloat16(), available)
    assert cast.beta.dtype == torch.float32


def test_only_one_configuration_has_a_meta_network() -> None:
    for changes in (
        {"soft_label": "fixed"},
        {"soft_label": "mean"},
        {"soft_label": "none"},
        {"soft_label_weight": 0.0},
    ):
        assert meta_network_of(objective_of(Options().updated(changes))) is None
    assert meta_network_of(objective_of(Options())).sharpness == (0.5, 20.0)


def test_start_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="start_sharpness"):
        MetaNetwork(2, 2, sharpness=(1, 10), start_sharpness=10)
