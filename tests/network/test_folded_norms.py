"""What starts from a conditional network, of fewer modalities or without conditional norms, is that network."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from builders import BRATS_JSON, configuration, network, options_with
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet
from nnunetv2_mgml.network.folded_norms import fold
from nnunetv2_mgml.network.subset_module import zero_absent
from nnunetv2_mgml.network.transfer import Donor, Transfer, labels_of, transfer

CHANNELS = ("t1", "t1ce", "t2", "flair")
LABELS = labels_of(BRATS_JSON)
LAYOUTS: dict[str, dict[str, Any]] = {"3d": {}, "2d": {"patch": (16, 16)}, "residual": {"residual": True}}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def stock(modalities: int = 4, affine: bool = True, **layout: Any) -> nn.Module:
    plan = ConfigurationManager(configuration(**layout))
    arguments = dict(plan.network_arch_init_kwargs)
    arguments["norm_op_kwargs"] = {**arguments["norm_op_kwargs"], "affine": affine}
    unet: nn.Module = get_network_from_plans(
        plan.network_arch_class_name,
        arguments,
        plan.network_arch_init_kwargs_req_import,
        modalities,
        3,
        allow_init=True,
        deep_supervision=False,
    )
    return unet.double().eval()


def conditional(modalities: int = 4, taught: bool = True, affine: bool = True, **layout: Any) -> ConditionedUNet:
    """A network in float64; `taught`: all its norms' numbers are away from those at the start."""
    torch.manual_seed(modalities)
    net = ConditionedUNet(stock(modalities, affine, **layout), modalities)
    for module in net.modules() if taught else ():
        if hasattr(module, "of_modalities"):
            for parameter in module.parameters():
                parameter.data += 0.3 * torch.randn_like(parameter)
    return net.double().eval()


def start(net: nn.Module, given: nn.Module, channels: tuple[str, ...], offered: tuple[str, ...] | None) -> Transfer:
    taken = transfer(net, channels, LABELS, Donor(given.state_dict(), offered, LABELS))
    taken.apply(net)
    return taken


def images(layout: str = "3d", modalities: int = 4) -> torch.Tensor:
    size = LAYOUTS[layout].get("patch", (16, 16, 16))
    return torch.randn(1, modalities, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@layouts
def test_a_stock_network_is_the_conditional_one_that_sees_all(layout: str) -> None:
    trained, net = conditional(**LAYOUTS[layout]), stock(**LAYOUTS[layout])
    taken = start(net, trained, CHANNELS, CHANNELS)
    assert all(part.taken == part.total for part in taken.parts)
    (note,) = taken.notes
    assert note.endswith("they start as with t1, t1ce, t2, flair visible.")
    x = images(layout)
    with torch.no_grad():
        close(net(x), trained(x, torch.ones(1, 4).bool()))


def test_a_stock_network_of_fewer_modalities_is_the_conditional_one_with_the_others_hidden() -> None:
    trained, net, own = conditional(), stock(2), ("flair", "t1")
    (note,) = start(net, trained, own, CHANNELS).notes
    assert note.endswith("as with t1, flair visible and t1ce, t2 hidden.")
    x, visible = images(), torch.tensor([[True, False, False, True]])
    with torch.no_grad():
        close(net(x[:, [3, 0]]), trained(x, visible))


@layouts
@pytest.mark.parametrize("dropped", [("flair",), ("t1",), ("t1ce", "t2")], ids="-".join)
def test_a_conditional_network_of_fewer_modalities_is_the_same_for_every_subset(
    layout: str, dropped: tuple[str, ...]
) -> None:
    own = tuple(name for name in reversed(CHANNELS) if name not in dropped)
    trained, net = conditional(**LAYOUTS[layout]), conditional(len(own), taught=False, **LAYOUTS[layout])
    taken = start(net, trained, own, CHANNELS)
    assert all(part.taken == part.total for part in taken.parts)
    (note,) = taken.notes
    assert note.startswith(f"{', '.join(dropped)}, of which the checkpoint's norms know, is not here")
    x, order = images(layout), [CHANNELS.index(name) for name in own]
    for subset in all_subsets(len(own)):
        visible = torch.zeros(1, 4, dtype=torch.bool)
        visible[0, order] = torch.tensor(subset)
        with torch.no_grad():
            close(net(x[:, order], visible[:, order]), trained(x, visible))


def test_a_new_modality_that_is_hidden_changes_nothing() -> None:
    trained, net, own = conditional(3), conditional(3, taught=False), ("t1", "t2", "dwi")
    start(net, trained, own, CHANNELS[:3])
    x = images(modalities=3)
    for t1, t2 in itertools.product((True, False), repeat=2):
        if t1 or t2:
            theirs, ours = torch.tensor([[t1, False, t2]]), torch.tensor([[t1, t2, False]])
            with torch.no_grad():
                close(net(x[:, [0, 2, 1]], ours), trained(x, theirs))


@pytest.mark.parametrize("form", ["multi_encoder", "early_fusion"])
def test_an_encoder_is_the_conditional_one_that_sees_its_modality_alone(form: str) -> None:
    trained, own = conditional(), ("flair", "t1")
    net = whole_network(form, len(own))
    (note,) = start(net, trained, own, CHANNELS).notes
    assert "in each encoder or stem as with its modality alone visible, elsewhere as with t1, flair visible" in note
    x = images()
    for m, j in enumerate((3, 0)):
        alone = torch.eye(4).bool()[j : j + 1]
        with torch.no_grad(), trained._told.tell(alone):
            expected = trained.encoder(zero_absent(x, alone))
            found = net.encoders[m](x[:, j : j + 1]) if form == "early_fusion" else None
            found = net.encoders[m].encoder(x[:, j : j + 1]) if found is None else found
        for mine, theirs in zip(found, expected, strict=form == "multi_encoder"):  # a stem is the first scale
            close(mine, theirs)


def test_a_decoder_is_the_conditional_one_that_sees_what_the_network_has() -> None:
    """An encoder of a new modality starts from the mean of all, its column as its norms."""
    trained, own = conditional(), ("flair", "dwi", "t1")
    net = whole_network("multi_encoder", len(own))
    start(net, trained, own, CHANNELS)
    for mine, theirs, visible in (
        (net.decoder.stages[0].convs[0].norm, trained.decoder.stages[0].convs[0].norm, [1.0, 0.0, 0.0, 1.0]),
        (net.encoders[1].encoder.stages[0][0].convs[0].norm, trained.encoder.stages[0][0].convs[0].norm, [0.25] * 4),
    ):
        signs = torch.tensor(visible).double() - 0.5
        scale, shift = (signs[:, None, None] * theirs.of_modalities).sum(0).unbind(0)
        close(mine.weight, theirs.weight * (1 + scale))
        close(mine.bias, theirs.bias * (1 + scale) + shift)


def test_encoders_and_what_is_not_here_are_told_of_together() -> None:
    trained, own = conditional(), ("flair", "t1")
    dropped, encoders = start(whole_network("multi_encoder", 2, norms=True), trained, own, CHANNELS).notes
    assert dropped.startswith("t1ce, t2, of which the checkpoint's norms know, is not here")
    assert encoders.endswith("with its modality alone visible, that decoder as with t1, flair visible.")
    (all_here,) = start(whole_network("multi_encoder", 4, norms=True), trained, CHANNELS, CHANNELS).notes
    assert all_here.endswith("that decoder as with t1, t1ce, t2, flair visible.")


def whole_network(form: str, modalities: int, norms: bool = False) -> Any:
    """Ours, with the widths of the stock network and its decoder."""
    widths = {"width_factor": 1.0, "decoder_width_ratio": 1.0, "decoder_convs": None, "conditional_norms": norms}
    return network(options_with(fusion="mean", network_form=form, **widths), modalities=modalities).double().eval()


def test_nothing_changes_by_a_bit_where_no_modality_is_dropped() -> None:
    trained, net = conditional(), conditional(taught=False)
    taken = start(net, trained, CHANNELS, CHANNELS)
    assert not taken.notes
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in trained.state_dict().items())


def test_a_scale_of_zero_is_no_division_by_zero() -> None:
    """The norm cannot be put exactly then; it is off by a thousandth of its own scale and shift."""
    parts = torch.zeros(2, 2, 3)
    parts[1, 0] = torch.tensor([2.0, 2.0 - 1e-5, 0.5])  # hidden: 1 + s = 0, 5e-6, 0.75
    parts[0] = torch.tensor([[0.5, -1.0, 2.0], [1.0, 2.0, 3.0]])
    parts[1, 1] = 0.7
    weight, bias = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 1.0, -1.0])
    own = {"n.weight": weight, "n.bias": bias, "n.of_modalities": parts}
    folded = fold(own, {1: 0.0})
    z = torch.linspace(-2, 2, 5)[:, None]
    for t1 in (True, False):
        expected = norm(own, z, (t1, False))
        found = norm(folded, z, (t1, True))
        tolerance = 1.1e-3 * (z * weight + bias).abs() + 1e-5
        assert ((found - expected).abs() <= tolerance).all()
        torch.testing.assert_close(found[:, 2], expected[:, 2])
    assert not folded["n.of_modalities"][1].any()


def norm(weights: dict[str, torch.Tensor], z: torch.Tensor, visible: tuple[bool, ...]) -> torch.Tensor:
    a, b = ((torch.tensor(visible).float() - 0.5)[:, None, None] * weights["n.of_modalities"]).sum(0)
    return (z * weights["n.weight"] + weights["n.bias"]) * (1 + a) + b


def test_one_channel_without_a_name_is_always_visible() -> None:
    """Of a checkpoint that does not say what it was trained with."""
    trained = conditional(1)
    for net in (stock(2), conditional(2, taught=False)):
        (note,) = start(net, trained, CHANNELS[:2], None).notes
        assert note.endswith("as with its one channel visible.")
        first = next(m for m in net.encoder.modules() if isinstance(m, nn.InstanceNorm3d))
        theirs = next(m for m in trained.encoder.modules() if isinstance(m, nn.InstanceNorm3d))
        close(first.weight, (theirs.weight * (1 + 0.5 * theirs.of_modalities[0, 0])).detach())


def test_norms_without_a_scale_of_their_own_say_what_is_left_out() -> None:
    trained = conditional(affine=False)
    (note,) = start(stock(affine=False), trained, CHANNELS, CHANNELS).notes
    assert "(affine false), which could take that up: it is left out" in note


def test_norms_of_another_number_of_modalities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of_modalities' .* shape \(3, 2, 8\); for its 4 modalities .* \(4, 2, 8\)"):
        start(stock(), conditional(3), CHANNELS, CHANNELS)
