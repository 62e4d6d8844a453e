from __future__ import annotations

import pytest
import torch
from fusion_cases import Pass, make_design, make_pass, make_spec

from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.region_aware import ProbabilityMap, RegionFusion


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("width", "fusion", "maps", "deepest"),
    [
        (16, 52_064, 2_996, None),
        (32, 133_296, 4_164, None),
        (64, 392_528, 14_260, None),
        (128, 1_298_064, 52_500, 50_452),
        (256, 4_657_424, 201_172, None),
        (320, 7_111_248, 311_604, 306_484),
    ],
)
def test_number_of_parameters(width: int, fusion: int, maps: int, deepest: int | None) -> None:
    """The closed forms of RFNet's fusion and map modules at M = K = 4, norms left out.

    Below 32 channels our map module is wider inside, 8 instead of C/4: RFNet's has 1,372 parameters at 16.
    """
    spec = make_spec(modalities=4, channels=(width,) * 3, norm_op=None)
    assert count(RegionFusion(spec, 0)) == fusion
    assert count(ProbabilityMap(spec, 0)) == maps
    assert deepest is None or count(ProbabilityMap(spec, 2)) == deepest


def region_features(module: RegionFusion, inputs: Pass, maps: torch.Tensor) -> torch.Tensor:
    """What the first region convolution reads, ``(B, K, C, *spatial)``: what it gives if it copies class by class."""
    convolution, behind, *_ = module.regions[0]
    classes, channels = maps.shape[1], inputs.features[0].shape[2]
    seen: list[torch.Tensor] = []
    hook = behind.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        convolution.bias.zero_()
        for k in range(classes):
            copying = torch.zeros(channels, classes, channels)
            copying[:, k] = torch.eye(channels)
            convolution.weight.copy_(copying.reshape(convolution.weight.shape))
            module(inputs.features[0], inputs.mask, maps)
    hook.remove()
    return torch.stack(seen, 1)


@pytest.mark.parametrize("last", [False, True])
def test_the_first_convolution_is_the_published_one(last: bool) -> None:
    """Weights, maps and the 1x1 convolution, in float64 and one after the other; and their gradients."""
    spec = make_spec()
    module = RegionFusion(spec, 0).double()
    inputs = make_pass(spec, [[1, 0, 1], [1, 1, 1]])
    features = inputs.features[0].double()
    if last:
        features = features.movedim(2, -1).contiguous().movedim(-1, 2)
    maps = torch.rand(2, 4, *features.shape[3:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    convolution, behind, *_ = module.regions[0]
    found: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []
    behind.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone()))
    module.weights.register_forward_hook(lambda *args: weights.append(args[2]))
    module(features, inputs.mask, maps)
    with torch.no_grad():
        module(features, inputs.mask, maps)  # by another product where channels lie side by side
    present = inputs.mask[:, None].double()
    per_class = torch.einsum("bmcdhw,bkm,bkdhw->bkcdhw", features, weights[0] * present, maps)
    slow = torch.nn.functional.conv3d(per_class.flatten(1, 2), convolution.weight, convolution.bias)
    torch.testing.assert_close(found[0], slow)
    torch.testing.assert_close(found[1], slow)
    some = torch.randn_like(slow)
    ours, published = (
        torch.autograd.grad((result * some).sum(), module.parameters(), retain_graph=True, allow_unused=True)
        for result in (found[0], slow)
    )
    used = [pair for pair in zip(ours, published, strict=True) if pair[1] is not None]
    assert len(used) > 2
    for one, two in used:
        torch.testing.assert_close(one, two)


def test_regions_do_not_leak() -> None:
    """Where the maps are one-hot in space, class k's feature is zero outside region k."""
    spec = make_spec()
    module = RegionFusion(spec, 0)
    inputs = make_pass(spec, [[1, 0, 1]])
    labels = torch.randint(4, inputs.features[0].shape[3:], generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.one_hot(labels, 4).movedim(-1, 0)[None].float()
    regions = region_features(module, inputs, maps)
    for k in range(4):
        assert (regions[0, k][:, labels != k] == 0).all()
        assert (regions[0, k][:, labels == k] != 0).all()


def test_equals_the_memory_hungry_form() -> None:
    """Weights before maps gives what the published order, a (B, M, K, C, V) tensor, gives."""
    spec = make_spec()
    module = RegionFusion(spec, 0)
    inputs = make_pass(spec, [[1, 0, 1], [1, 1, 1]])
    maps = torch.randn(2, 4, *inputs.features[0].shape[3:], generator=torch.Generator().manual_seed(0)).softmax(1)
    per_class = inputs.features[0][:, :, None] * maps[:, None, :, None]  # (B, M, K, C, *spatial)
    share = maps.flatten(2).mean(2)
    pooled = per_class.flatten(4).mean(4).transpose(1, 2).flatten(2) / (share[..., None] + 1e-7)
    weights = module.weights(torch.cat((pooled, share[..., None] + 1e-7), 2))  # (B, K, M)
    slow = (per_class * weights.transpose(1, 2)[..., None, None, None, None]).sum(1)
    torch.testing.assert_close(region_features(module, inputs, maps), slow, atol=1e-5, rtol=1e-4)


def test_maps_reach_the_fusion_detached() -> None:
    """The map head is trained by its own loss alone."""
    spec = make_spec()
    design = make_design("region_aware", spec)
    inputs = make_pass(spec, [[1, 1, 1]])
    result = design.fuse_scale(2, inputs.features[2], inputs.mask, None, None)
    result.fused.sum().backward()
    assert all(p.grad is None for p in design.maps.parameters())
    result.auxiliary.sum().backward()
    assert all(p.grad is not None for p in design.maps["2"].parameters())


def test_a_class_missing_from_the_patch_gives_finite_weights() -> None:
    spec = make_spec()
    module = RegionFusion(spec, 0)
    inputs = make_pass(spec, [[1, 1, 1]])
    maps = torch.zeros(1, 4, *inputs.features[0].shape[3:])
    maps[:, 0] = 1
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype is torch.float16):
            assert module(inputs.features[0].to(dtype), inputs.mask, maps.to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6, 1e-12, 0.0])
def test_a_small_class_is_pooled_whole_and_finite(dtype: torch.dtype, share: float) -> None:
    """The mean of a class's feature in its region, however small: a class of 512 voxels of 128^3 is 2.4e-4 of them.

    In half precision too, where large features and a nearly empty class meet; values and gradients.
    """
    spec = make_spec()
    module = RegionFusion(spec, 0)
    inputs = make_pass(spec, [[1, 1, 1]])
    features = (200 + 20 * inputs.features[0]).to(dtype).requires_grad_()
    maps = torch.zeros(1, 4, *features.shape[3:])
    maps[:, 0], maps[:, 1] = 1 - share, share
    pooled: list[torch.Tensor] = []
    module.weights.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
    with torch.autocast(
        "cpu", dtype=torch.bfloat16 if dtype is torch.float32 else dtype, enabled=dtype != torch.float32
    ):
        fused = module(features, inputs.mask, maps.to(dtype))
    fused.float().sum().backward()
    assert pooled[0].dtype == torch.float32
    assert pooled[0].isfinite().all()
    assert features.grad.isfinite().all()
    assert fused.isfinite().all()
    if share >= 1e-3:
        mean = features.detach().float().flatten(3).mean(3).flatten()
        torch.testing.assert_close(pooled[0][0, 1, :-1], mean, atol=0, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_models_of_the_first_revision_keep_their_pooling() -> None:
    """1e-3 where plans were written before; the published 1e-7 now; what plans name counts in both."""
    for changes, epsilon in (
        ({"revision": 1}, 1e-3),
        ({}, 1e-7),
        ({"revision": 1, "options": {"pooling_epsilon": 1e-5}}, 1e-5),
    ):
        design = build_fusion("region_aware", make_spec(**changes))
        assert {fusion.epsilon for fusion in design.fusions.values()} == {epsilon}
    with pytest.raises(ValueError, match="pooling_epsilon is 0"):
        build_fusion("region_aware", make_spec(options={"pooling_epsilon": 0.0}))
