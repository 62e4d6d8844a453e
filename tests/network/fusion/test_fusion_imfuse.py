from __future__ import annotations

import math

import pytest
import torch
from fusion_cases import make_design, make_pass, make_spec
from torch import nn

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.imfuse import InterleavedMamba, interleave, present_first


class CumulativeSum(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.cumsum(1)


def block_of(design: nn.Module) -> InterleavedMamba:
    return design.mamba["2"]


def test_interleaving() -> None:
    """Voxel by voxel all modalities, then the read-out token."""
    tokens, read_out = torch.randn(2, 3, 5, 4), torch.randn(5, 4)
    sequence = interleave(tokens, read_out).unflatten(1, (5, 4))
    for m in range(3):
        assert torch.equal(sequence[:, :, m], tokens[:, m])
    assert torch.equal(sequence[1, :, 3], read_out)


def test_absent_tokens_move_to_the_end() -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    order = present_first(mask, 2)
    assert order[0].tolist() == [0, 2, 3, 4, 6, 7, 1, 5]
    assert order[1].tolist() == [1, 3, 5, 7, 0, 2, 4, 6]


@pytest.mark.parametrize("layout", ["3d", "anisotropic", "2d"])
def test_identity_block_returns_the_read_out_tokens(layout: str) -> None:
    spec = make_spec(layout)
    fusion = block_of(make_design("imfuse", spec))
    fusion.block = nn.Identity()
    inputs = make_pass(spec, list(all_subsets(3)))
    size = inputs.features[2].shape[3:]
    expected = (fusion.read_out + fusion.positions(size)).T.reshape(1, -1, *size)
    assert torch.equal(fusion(inputs.features[2], inputs.mask), expected.expand(7, *expected.shape[1:]))


def test_read_out_sees_present_modalities_of_all_voxels_up_to_its_own() -> None:
    """With a cumulative sum for a block, L_v is the sum over voxels <= v of the present modalities and read-outs."""
    spec = make_spec()
    fusion = block_of(make_design("imfuse", spec))
    fusion.block = CumulativeSum()
    inputs = make_pass(spec, list(all_subsets(3)))
    features = inputs.features[2]
    own = features.sum(1).flatten(2) + (fusion.read_out + fusion.positions(features.shape[3:])).T
    torch.testing.assert_close(fusion(features, inputs.mask).flatten(2), own.cumsum(2), atol=1e-4, rtol=1e-4)


def test_a_prediction_scans_no_longer_than_what_is_present() -> None:
    """Subsets of as many modalities together, and nothing else than where all sequences are as long as the longest."""
    spec = make_spec()
    fusion = block_of(make_design("imfuse", spec)).eval()
    inputs = make_pass(spec, list(all_subsets(3)))
    features = inputs.features[2]
    voxels, lengths = features.shape[3:].numel(), []
    fusion.block.register_forward_pre_hook(lambda _, tokens: lengths.append(tuple(tokens[0].shape[:2])))
    padded = fusion(features, inputs.mask)
    with torch.no_grad():
        found = fusion(features, inputs.mask)
        alone = [fusion(features[b : b + 1], inputs.mask[b : b + 1]) for b in range(len(features))]
    torch.testing.assert_close(found, padded.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(alone), padded.detach(), atol=1e-5, rtol=1e-4)
    assert lengths[:4] == [(7, 4 * voxels), (3, 2 * voxels), (3, 3 * voxels), (1, 4 * voxels)]
    assert sorted(length // voxels for _, length in lengths[4:]) == [2, 2, 2, 3, 3, 3, 4]


def test_masking_equals_removal() -> None:
    """Exactly, short convolution included: published code lets absent tokens through as zeros."""
    spec = make_spec()
    fusion = block_of(make_design("imfuse", spec))
    for subset in all_subsets(3):
        keep = [m for m in range(3) if subset[m]]
        inputs = make_pass(spec, [subset, (True, True, True)])
        with torch.no_grad():
            masked = fusion(inputs.features[2], inputs.mask)
            removed = fusion(inputs.features[2][:1, keep], inputs.mask[:1, keep])
        torch.testing.assert_close(masked[:1], removed, atol=1e-5, rtol=1e-5)


def test_scales() -> None:
    """Mamba where the plan's features have at most max_voxels voxels, and always at the bottleneck."""
    for limit, expected in ((4096, {"0", "1", "2"}), (216, {"1", "2"}), (1, {"2"})):
        design = make_design("imfuse", make_spec(options={"max_voxels": limit}))
        assert set(design.mamba) == expected


def test_runs_in_float32_under_autocast() -> None:
    spec = make_spec()
    design = make_design("imfuse", spec)
    seen: list[torch.dtype] = []
    block_of(design).block.mamba.register_forward_hook(lambda _, inputs, out: seen.extend((inputs[0].dtype, out.dtype)))
    inputs = make_pass(spec, [[1, 0, 1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        design.fuse_scale(2, inputs.features[2].bfloat16(), inputs.mask, None, None)
    assert seen == [torch.float32, torch.float32]


def test_number_of_parameters() -> None:
    """Stock widths: Mamba at 16^3, 8^3 and 4^3, one read-out vector and position code each, instead of token tables."""
    widths = (32, 64, 128, 256, 320, 320)
    spec = make_spec(
        modalities=4,
        channels=widths,
        patch_size=(128,) * 3,
        strides=((1,) * 3, *((2,) * 3,) * 5),
        kernel_sizes=((3,) * 3,) * 6,
        norm_op=None,
    )
    design = build_fusion("imfuse", spec)

    def mamba(c: int, side: int, n: int = 16) -> int:
        e, r = 2 * c, math.ceil(c / 16)
        block = 6 * c**2 + 5 * e + e * (r + 2 * n) + r * e + e + e * n + e + 4 * c + c**2 + c
        return block + c + 3 * side * c

    assert round(sum(p.numel() for p in design.mamba["5"].block.parameters()) / 1e6, 2) == 0.78
    expected = sum((4 + 28) * c**2 + 3 * c for c in widths[:3]) + sum((1 + 28) * c**2 + 3 * c for c in widths[3:])
    expected += mamba(256, 16) + mamba(320, 8) + mamba(320, 4)
    assert sum(p.numel() for p in design.parameters()) == expected
