"""The prediction from what is visible and that from all that a case has, as one batch where the scales are coarse."""

from __future__ import annotations

from typing import Any, ClassVar

import builders
import pytest
import torch
from fusion_cases import LAYOUTS as FUSION_LAYOUTS
from fusion_cases import Pass, design_class, design_names, make_design, make_pass, make_spec, own_designs, run
from network_cases import LAYOUTS, batch, config
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_mgml.network import multi_encoder_unet
from nnunetv2_mgml.network.build import build_network
from nnunetv2_mgml.network.decoder import FusionDecoder
from nnunetv2_mgml.network.fusion.attention import StudentDropout
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, find_design
from nnunetv2_mgml.network.fusion.concat import ConcatFusion
from nnunetv2_mgml.network.interface import Needs, View
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.objective.memory import step_memory

JOINING = [name for name, design in own_designs().items() if design.joins_passes]
SETTINGS = [name for name in design_names() if design_class(name).joins_passes]
VISIBLE = torch.tensor([[True, False, True, True], [False, True, False, False]])
AVAILABLE = torch.tensor([[True, True, True, True], [False, True, True, False]])
VIEW = View(VISIBLE, AVAILABLE)
LEARNS = Needs("learns", modality=True)


def step(net: MultiEncoderUNet, joined: bool, needs: Needs, patch: tuple[int, ...], view: View = VIEW) -> list[Any]:
    """Return outputs and gradients of a training step in float64, the same random numbers given."""
    net = net.double().train()
    net._joins_passes = joined
    net.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = net(batch(patch).double(), view, needs)
    outputs = [*out.student, *out.complete, *out.auxiliary, out.modality]
    (out.fusion_loss + sum(k * output.square().mean() for k, output in enumerate(outputs, 1))).backward()
    return [*(output.detach() for output in outputs), *(p.grad for p in net.parameters())]


def assert_same(one: list[Any], other: list[Any]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert (left is None) == (right is None)
        assert left is None or torch.allclose(left, right, rtol=1e-9, atol=1e-11)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("both passes as one batch")


def test_designs_that_join() -> None:
    assert JOINING == ["concat", "hemis", "mean", "mfi", "mmformer", "region_aware"]


@pytest.mark.parametrize("fusion", JOINING)
@pytest.mark.parametrize("teacher_scale", [0, 1])
@pytest.mark.parametrize("recompute", [False, True])
def test_same_outputs_and_gradients(fusion: str, teacher_scale: int, recompute: bool) -> None:
    """As one after the other, in float64; `mmformer` with its dropout, silent in the prediction from everything."""
    patch = (16, 16, 16)
    net = builders.network(config(fusion), deep_supervision=True, patch=patch)
    net.gradient_checkpointing = recompute
    needs = LEARNS._replace(teacher_scale=teacher_scale)
    assert_same(*(step(net, joined, needs, patch) for joined in (True, False)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("few", [64, 2**14])
def test_in_every_layout(layout: str, deep: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the bottleneck alone to everything below full resolution."""
    monkeypatch.setattr(multi_encoder_unet, "_FEW_VOXELS", few)
    sizes = LAYOUTS[layout]
    net = builders.network(config("region_aware"), deep_supervision=deep, **sizes)
    net.gradient_checkpointing = True
    assert_same(*(step(net, joined, LEARNS, sizes["patch"]) for joined in (True, False)))


def test_pyramid_heads_are_the_students() -> None:
    net = builders.network(config("mmformer", fusion_options={"pyramid_heads": True}), deep_supervision=True)
    assert len(net.double()(batch((16, 16, 16)).double(), VIEW, LEARNS).auxiliary) > 1
    assert_same(*(step(net, joined, LEARNS, (16, 16, 16)) for joined in (True, False)))


def test_what_is_not_visible_changes_no_bit_of_the_student() -> None:
    """Though it is in the same batch as a prediction that sees it."""
    net = builders.network(config("region_aware"), deep_supervision=True).train()
    x = batch((16, 16, 16))
    other = torch.where(VISIBLE[:, :, None, None, None], x, 7 * x + 1)
    for one, two in zip(net(x, VIEW, LEARNS).student, net(other, VIEW, LEARNS).student, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("needs", "view"),
    [
        (LEARNS._replace(noisy=True), VIEW),
        (LEARNS._replace(complete="target"), VIEW),
        (LEARNS._replace(complete="no"), VIEW),
        (LEARNS, VIEW._replace(own_images=batch((16, 16, 16)))),
    ],
)
def test_apart_where_the_two_are_computed_differently(
    needs: Needs, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusionDecoder, "both", refuse)
    net = builders.network(config("region_aware"), deep_supervision=True)
    net(batch((16, 16, 16)), view, needs)
    with pytest.raises(AssertionError, match="one batch"):
        net(batch((16, 16, 16)), VIEW, LEARNS)


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout_op": "torch.nn.Dropout3d", "dropout_op_kwargs": {"p": 0.4}},
        {"norm_op": "torch.nn.BatchNorm3d"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_apart_where_a_layer_meets_other_samples(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's dropout would act in both, and a batch norm would take statistics of both."""
    monkeypatch.setattr(FusionDecoder, "both", refuse)
    plan = builders.configuration((16, 16, 16))
    plan["architecture"]["arch_kwargs"].update(changes)
    net = build_network(ConfigurationManager(plan), config("concat").network, 4, 3, 4, True, LEARNS)
    net(batch((16, 16, 16)), VIEW, LEARNS)


def test_apart_where_nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusionDecoder, "both", refuse)
    monkeypatch.setattr(multi_encoder_unet, "_FEW_VOXELS", 1)
    builders.network(config("region_aware"))(batch((16, 16, 16)), VIEW, LEARNS)


@pytest.mark.parametrize("name", [name for name in own_designs() if name not in JOINING])
def test_other_designs_do_not_join(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusionDecoder, "both", refuse)
    builders.network(config(name))(batch((16, 16, 16)), VIEW, LEARNS)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("layout", FUSION_LAYOUTS)
def test_a_design_that_joins_knows_one_sample_at_a_time(name: str, layout: str) -> None:
    """In training as well: no random numbers, no loss, and nothing of a sample in another's result."""
    spec = make_spec(layout)
    design = make_design(name, spec).train().double()
    assert type(design).begin is FusionDesign.begin
    assert type(design).begin_training is FusionDesign.begin_training
    inputs = make_pass(spec, [[1, 0, 1], [0, 1, 0], [1, 1, 1]])
    doubled = Pass(
        [f.double() for f in inputs.features], inputs.mask, [c if c is None else c.double() for c in inputs.contexts]
    )
    alone = [
        Pass(
            [f[b : b + 1] for f in doubled.features],
            doubled.mask[b : b + 1],
            [c if c is None else c[b : b + 1] for c in doubled.contexts],
        )
        for b in range(3)
    ]
    together, apart = run(design, doubled), [run(design, one) for one in alone]
    joined = [scale for scale in range(spec.num_scales) if design.joins(scale)]
    assert len(joined) >= spec.num_scales - 1
    for scale in joined:
        assert together[scale].loss is None
        expected = torch.cat([one[scale].fused for one in apart])
        assert torch.allclose(together[scale].fused, expected, rtol=1e-9, atol=1e-11)


def test_mmformer_joins_its_bottleneck_where_it_drops_nothing() -> None:
    spec = make_spec()
    deepest = spec.num_scales - 1
    design = find_design("mmformer")(spec)
    assert [design.joins(scale) for scale in range(spec.num_scales)] == [True] * deepest + [False]
    design.options["dropout"] = 0.0
    assert design.joins(deepest)


def test_a_fuse_scale_of_its_own_has_to_say_so() -> None:
    class Other(ConcatFusion):
        def fuse_scale(self, *args: Any) -> FusedScale:
            return super().fuse_scale(*args)

    class Saying(Other):
        joins_passes: ClassVar[bool] = True

    class Renamed(ConcatFusion):
        pass

    assert (Other.joins_passes, Saying.joins_passes, Renamed.joins_passes) == (False, True, True)


def test_a_state_or_random_numbers_of_its_own_keep_them_apart() -> None:
    """The teacher's pass must not be noisy, and what a training step begins with must not be left out."""

    class Begins(ConcatFusion):
        def begin_training(self, available: torch.Tensor) -> Any:
            return super().begin_training(available)

    class Noisy(ConcatFusion):
        def __init__(self, spec: FusionSpec) -> None:
            super().__init__(spec)
            self.drop = StudentDropout(0.5)

    assert not Begins.joins_passes
    net = builders.network(config("concat", network_form="multi_encoder"))
    assert net._joins_passes
    spec = net.fusion.spec
    for fusion, joins in ((Noisy(spec), False), (ConcatFusion(spec), True), (Begins(spec), False)):
        again = MultiEncoderUNet(net.encoders, fusion, net.decoder, net.modality_decoder)
        assert again._joins_passes == joins


def test_needs_no_memory_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of patches as large as real ones what has many voxels, here the two finest scales, stays as it was."""
    plans = builders.plans(patch=(64, 64, 64), stages=5)
    plans["mgml"] = {"config": {**builders.TINY, "gradient_checkpointing": True, "width_factor": 1.0}}
    joined = step_memory(plans, "3d_fullres", builders.BRATS_JSON).peak
    monkeypatch.setattr(multi_encoder_unet, "_FEW_VOXELS", 0)
    assert joined < 1.03 * step_memory(plans, "3d_fullres", builders.BRATS_JSON).peak
