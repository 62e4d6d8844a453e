"""The mean, against its definition."""

from __future__ import annotations

import torch
from fusion_cases import hide, make_design, make_pass, make_spec

from nnunetv2_mgml.modalities import all_subsets


def test_mean_is_the_mean() -> None:
    spec = make_spec()
    design = make_design("mean", spec)
    inputs = make_pass(spec, torch.ones(7, 3, dtype=torch.bool))
    subsets = torch.tensor(all_subsets(3))
    for scale, features in enumerate(inputs.features):
        fused = design.fuse_scale(scale, hide(features, subsets), subsets, None, None).fused
        for sample, subset in enumerate(subsets):
            torch.testing.assert_close(fused[sample], features[sample, subset].mean(0))
