from __future__ import annotations

import numpy as np
import torch
from fusion_cases import make_design, make_pass, make_spec

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.hemis import moments


def test_moments_are_those_of_the_present_modalities() -> None:
    features = torch.randn(1, 4, 3, 5, 2, generator=torch.Generator().manual_seed(0)) + 2
    for subset in all_subsets(4):
        mean, variance = moments(features, torch.tensor([subset]))
        present = features[:, list(subset)].double().numpy()
        np.testing.assert_allclose(mean.numpy(), present.mean(1), atol=1e-6)
        np.testing.assert_allclose(variance.numpy(), present.var(1, ddof=0), atol=1e-6)
        if sum(subset) == 1:
            assert variance.abs().max() == 0


def test_moments_of_every_subset_from_shared_sums() -> None:
    """One sample, all masks at once, also beside a large mean; never negative."""
    features = torch.randn(1, 4, 3, 5, 2, generator=torch.Generator().manual_seed(0)) + 1000
    subsets = torch.tensor(all_subsets(4))
    shared = build_fusion("hemis", make_spec(modalities=4)).share([features])[0]
    means, variances = shared.moments(subsets)
    for subset, mean, variance in zip(subsets, means, variances, strict=True):
        present = features[:, subset].double().numpy()[0]
        np.testing.assert_allclose(mean.numpy(), present.mean(0), atol=1e-3)
        np.testing.assert_allclose(variance.numpy(), present.var(0, ddof=0), atol=1e-4)
        assert (variance >= 0).all()


def test_variance_in_half_precision() -> None:
    """Computed in float32: neither lost beside a large mean nor infinite where it leaves the float16 range."""
    features = torch.tensor([1000.0, 1001.0]).reshape(1, 2, 1, 1, 1, 1).to(torch.float16)
    _, variance = moments(features, torch.tensor([[True, True]]))
    assert variance.dtype == torch.float32
    assert abs(variance.item() - 0.25) < 1e-4
    spec = make_spec()
    design = make_design("hemis", spec)
    inputs = make_pass(spec, [[1, 1, 1]])
    with torch.autocast("cpu", dtype=torch.float16):
        fused = design.fuse_scale(0, (1000 * inputs.features[0]).half(), inputs.mask, None, None).fused
    assert fused.isfinite().all()


def test_number_of_parameters() -> None:
    widths = (32, 64, 128, 256, 320, 320)
    spec = make_spec(modalities=4, channels=widths, strides=((1,) * 3, *((2,) * 3,) * 5), kernel_sizes=((3,) * 3,) * 6)
    count = sum(p.numel() for p in build_fusion("hemis", spec).parameters())
    assert count == sum(2 * c**2 + c for c in widths)
    assert round(count / 1e6, 3) == 0.585
