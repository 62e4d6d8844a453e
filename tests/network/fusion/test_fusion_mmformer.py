from __future__ import annotations

import torch
from fusion_cases import make_design, make_pass, make_spec, take_modalities
from torch import nn

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import build_fusion
from nnunetv2_mgml.network.fusion.mmformer import MmFormerFusion, MultimodalTransformer


def without_layers(design: MmFormerFusion) -> MultimodalTransformer:
    """The transformer reduced to its bookkeeping: embedding, token order, masking, back to the grid."""
    transformer = design.transformer
    transformer.inter = nn.ModuleList()
    for intra in transformer.intra:
        intra.embed, intra.layers = nn.Identity(), nn.ModuleList()
    return transformer


def test_the_token_grid_is_not_scrambled() -> None:
    """Voxel v of modality m comes back in slot m of voxel v (published code: 0 % of the voxels)."""
    for layout in ("3d", "anisotropic", "2d"):
        spec = make_spec(layout)
        inputs = make_pass(spec, [[1, 0, 1], [1, 1, 1]])
        transformer = without_layers(make_design("mmformer", spec))
        assert torch.equal(transformer(inputs.features[-1], inputs.mask), inputs.features[-1])


def test_each_voxel_reaches_its_own_slot_through_the_layers() -> None:
    """With attention closed to nothing but residuals, a change in one voxel stays in that voxel and modality."""
    spec = make_spec()
    transformer = make_design("mmformer", spec).eval().transformer
    for layer in [*transformer.inter, *(layer for intra in transformer.intra for layer in intra.layers)]:
        nn.init.zeros_(layer.attention.out.weight)
    inputs = make_pass(spec, [[1, 1, 1]])
    changed = inputs.features[-1].clone()
    changed[0, 1, :, 2, 0, 1] += 1
    with torch.no_grad():
        difference = transformer(changed, inputs.mask) - transformer(inputs.features[-1], inputs.mask)
    where = difference.abs().amax(2)[0] > 0
    assert where[1, 2, 0, 1]
    assert where.sum() == 1


def test_masking_equals_removal_in_the_transformer() -> None:
    """Tokens of absent modalities take no softmax mass (published code: they do, as zero vectors)."""
    spec, pair = make_spec(), make_spec(modalities=2)
    transformer = make_design("mmformer", spec).eval().transformer
    for subset in all_subsets(3):
        if sum(subset) != 2:
            continue
        keep = [m for m in range(3) if subset[m]]
        smaller = make_design("mmformer", pair).eval().transformer
        smaller.positions = nn.ModuleList(transformer.positions[m] for m in keep)
        smaller.intra = nn.ModuleList(transformer.intra[m] for m in keep)
        smaller.inter = transformer.inter
        inputs = make_pass(spec, [subset])
        with torch.no_grad():
            masked = transformer(inputs.features[-1], inputs.mask)
            removed = smaller(inputs.features[-1][:, keep], inputs.mask[:, keep])
        torch.testing.assert_close(masked[:, keep], removed, atol=1e-5, rtol=1e-5)
        assert (masked[:, [m for m in range(3) if m not in keep]] == 0).all()


def test_masked_skip_fusion_equals_removal_without_biases_of_absent() -> None:
    """Skip fusion reads zeros in absent slots: dropping their columns of the first convolution gives the same."""
    spec, pair = make_spec(), make_spec(modalities=2)
    design, smaller = make_design("mmformer", spec), make_design("mmformer", pair)
    keep = [0, 2]
    weights = dict(design.scales[0].state_dict())
    weights["0.0.weight"] = take_modalities(weights["0.0.weight"], keep, 3, 1)
    smaller.scales[0].load_state_dict(weights)
    inputs = make_pass(spec, [[1, 0, 1]])
    one = design.fuse_scale(0, inputs.features[0], inputs.mask, None, None).fused
    two = smaller.fuse_scale(0, inputs.features[0][:, keep], inputs.mask[:, keep], None, None).fused
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_number_of_parameters() -> None:
    """Skip fusions; per modality embedding, position code and layer; the inter-modal layer."""
    widths = (32, 64, 128, 256, 320, 320)
    spec = make_spec(
        modalities=4,
        channels=widths,
        patch_size=(128,) * 3,
        strides=((1,) * 3, *((2,) * 3,) * 5),
        kernel_sizes=((3,) * 3,) * 6,
        norm_op=None,
    )
    design = build_fusion("mmformer", spec)
    d, h = 320, 4 * 320
    layer = 4 * d**2 + d + 4 * d + 2 * d * h + h + d
    skips = sum((4 + 28) * c**2 + 3 * c for c in widths)
    assert round(skips / 1e6, 2) == 9.34
    assert sum(p.numel() for p in design.scales.parameters()) == skips
    assert sum(p.numel() for p in design.parameters()) == skips + 4 * (d**2 + d + layer + 3 * 4 * d) + layer
    assert round(5 * layer / 1e6, 1) == 6.2


def test_dropout_is_on_in_training() -> None:
    spec = make_spec()
    design = make_design("mmformer", spec).train()
    inputs = make_pass(spec, [[1, 1, 1]])
    first, second = (design.transformer(inputs.features[-1], inputs.mask) for _ in range(2))
    assert not torch.equal(first, second)
