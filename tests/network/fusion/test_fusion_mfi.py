from __future__ import annotations

import torch
from fusion_cases import make_design, make_pass, make_spec

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.mfi import PairWeights


def test_against_the_formula_pair_by_pair() -> None:
    """mean over present i of x_i + sum over present j of softmax_j(MLP[q_j, q_i, 1]) * x_j."""
    spec = make_spec()
    design = make_design("mfi", spec)
    mlp, width = design.scales[-1].mlp, spec.channels[-1]
    for subset in all_subsets(3):
        inputs = make_pass(spec, [subset])
        x = inputs.features[-1][0]
        present = [m for m in range(3) if subset[m]]
        pooled = x.flatten(2).mean(2)
        targets = []
        for i in present:
            scores = torch.stack([mlp(torch.cat((pooled[j], pooled[i], torch.ones(2 * width)))) for j in present])
            weights = scores.softmax(0)
            targets.append(x[i] + sum(w[:, None, None, None] * x[j] for w, j in zip(weights, present, strict=True)))
        fused = design.fuse_scale(2, inputs.features[-1], inputs.mask, None, None).fused[0]
        torch.testing.assert_close(fused, torch.stack(targets).mean(0), atol=1e-5, rtol=1e-5)


def test_absent_sources_get_no_weight() -> None:
    """The published code leaves softmax mass on absent sources."""
    weights = PairWeights(8)
    mask = torch.tensor(list(all_subsets(4)))
    pairs = weights(torch.randn(15, 4, 8), mask)
    assert (pairs.movedim(2, 1)[~mask] == 0).all()
    torch.testing.assert_close(pairs.sum(2), torch.ones(15, 4, 8))


def test_number_of_parameters() -> None:
    """10 C^2 + 3 C less the C biases that cancel in the softmax."""
    for width, published in ((32, 10_336), (320, 1_024_960)):
        count = sum(p.numel() for p in PairWeights(width).parameters())
        assert count == 10 * width**2 + 2 * width == published - width
    widths = (32, 64, 128, 256, 320, 320)
    spec = make_spec(modalities=4, channels=widths, strides=((1,) * 3, *((2,) * 3,) * 5), kernel_sizes=((3,) * 3,) * 6)
    assert round(sum(p.numel() for p in build_fusion("mfi", spec).parameters()) / 1e6, 2) == 2.92
