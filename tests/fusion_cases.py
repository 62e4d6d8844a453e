"""Specs, features and passes for the tests of fusion designs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import FusedScale, FusionDesign, FusionSpec, build_fusion, fusion_designs
from nnunetv2_mgml.network.fusion.installed import GROUP

DOCS = (Path(__file__).parents[1] / "docs" / "fusion.md").read_text()

LAYOUTS: dict[str, dict[str, Any]] = {
    "3d": dict(patch_size=(12, 12, 12), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 3),
    "anisotropic": dict(
        patch_size=(5, 7, 9), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3))
    ),
    "2d": dict(patch_size=(10, 14), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3),
}
OTHER_SIZE = {"3d": (5, 7, 9), "anisotropic": (7, 16, 12), "2d": (17, 9)}
QUICK: dict[str, dict[str, Any]] = {"sfusion": {"depth": 2, "grid": 4}}
"""Options that keep the tests short; a design not named here runs with its defaults."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "m2ftrans+channel": ("m2ftrans", {"channel_attention": True, "pyramid_heads": True, "reweighting": "published"}),
    "m2ftrans+added": ("m2ftrans", {"channel_attention": True, "channel_wiring": "added"}),
    "mmformer+pyramid": ("mmformer", {"pyramid_heads": True}),
    "sfusion+interpolated": ("sfusion", {"form": "interpolated", "depth": 2, "grid": 4}),
    "region_aware+full": ("region_aware", {"full_resolution_regions": True}),
    "demoseg+learned": ("demoseg", {"gating": "learned"}),
    "imfuse+concat": ("imfuse", {"max_voxels": 1, "pyramid_heads": True}),
}
"""Further settings to run all tests with: test name -> (design, options)."""


def own_designs() -> dict[str, type[FusionDesign]]:
    """The designs of this package; those of others are tested too, but documented and benchmarked elsewhere."""
    return {name: cls for name, cls in fusion_designs().items() if cls.__module__.startswith("nnunetv2_mgml.")}


def design_names() -> list[str]:
    """Everything the common tests run with: all designs there are, those of others included, and `VARIANTS`."""
    return [*fusion_designs(), *VARIANTS]


def design_class(name: str) -> type[FusionDesign]:
    """The class behind a test name."""
    return fusion_designs()[VARIANTS.get(name, (name, {}))[0]]


class Pass(NamedTuple):
    """Inputs of one pass, full resolution first."""

    features: list[torch.Tensor]
    mask: torch.Tensor
    contexts: list[torch.Tensor | None]


def make_spec(layout: str = "3d", modalities: int = 3, **changes: Any) -> FusionSpec:
    """A spec of three scales with 8, 12 and 16 channels."""
    dimension = len(LAYOUTS[layout]["patch_size"])
    norm = nn.InstanceNorm3d if dimension == 3 else nn.InstanceNorm2d
    values = dict(
        num_modalities=modalities,
        num_classes=4,
        channels=(8, 12, 16),
        norm_op=norm,
        conv_op=nn.Conv3d if dimension == 3 else nn.Conv2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **LAYOUTS[layout],
    )
    return FusionSpec(**{**values, **changes})


def make_design(name: str, spec: FusionSpec, seed: int = 0) -> FusionDesign:
    """Build and initialise a design as the network does; every parameter away from zero, so that it has an effect."""
    name, options = VARIANTS.get(name, (name, QUICK.get(name, {})))
    torch.manual_seed(seed)
    design = build_fusion(name, FusionSpec(**{**spec.__dict__, "options": {**options, **spec.options}}))
    with torch.no_grad():
        for parameter in design.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return design


def make_pass(
    spec: FusionSpec, mask: list[list[int]] | torch.Tensor, size: tuple[int, ...] | None = None, seed: int = 1
) -> Pass:
    """Random features (mean not zero) of an input of ``size`` voxels, zero where absent, and decoder features."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.as_tensor(mask).bool()
    sized = FusionSpec(**{**spec.__dict__, "patch_size": size or spec.patch_size})
    batch, modalities = mask.shape
    features, contexts = [], []
    for scale, width in enumerate(spec.channels):
        shape = sized.feature_size(scale)
        offset = torch.randn(batch, modalities, width, *[1] * len(shape), generator=generator)
        content = torch.randn(batch, modalities, width, *shape, generator=generator) + offset
        features.append(hide(content, mask))
        contexts.append(torch.randn(batch, width, *shape, generator=generator))
    return Pass(features, mask, [*contexts[:-1], None])


def hide(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero the absent modalities as `FusionDecoder` does."""
    return features.masked_fill(~mask.reshape(*mask.shape, *[1] * (features.ndim - 2)), 0)


def run(design: FusionDesign, inputs: Pass, shared: Any = None) -> list[FusedScale]:
    """One pass from the bottleneck up; results full resolution first."""
    state = design.begin(shared)
    results = [
        design.fuse_scale(s, inputs.features[s], inputs.mask, inputs.contexts[s], state)
        for s in reversed(range(len(inputs.features)))
    ]
    return results[::-1]


def fused_at(design: FusionDesign, scale: int, inputs: Pass, features: torch.Tensor) -> torch.Tensor:
    """The result at one scale, with ``features`` there and those of ``inputs`` at the deeper scales."""
    state = design.begin()
    with torch.no_grad():
        for deeper in reversed(range(scale + 1, len(inputs.features))):
            design.fuse_scale(deeper, inputs.features[deeper], inputs.mask, inputs.contexts[deeper], state)
        return design.fuse_scale(scale, features, inputs.mask, inputs.contexts[scale], state).fused


def reads_mask(design: FusionDesign, scale: int) -> bool:
    """Whether the mask alone, with the features as they are, changes the result at a scale."""
    full = make_pass(design.spec, [[1] * design.spec.num_modalities])
    masks = [full.mask & (torch.arange(design.spec.num_modalities) != m) for m in range(design.spec.num_modalities)]
    one, *others = (
        fused_at(design, scale, full._replace(mask=mask), full.features[scale]) for mask in (full.mask, *masks)
    )
    return any(not torch.equal(one, other) for other in others)


def scales_with_leaks(design: FusionDesign) -> list[int]:
    """The scales at which noise in absent modalities changes a bit, in any subset of three modalities."""
    leaks = set()
    for subset in all_subsets(3):
        inputs = make_pass(design.spec, [(True,) * 3, subset, (True,) * 3])
        for scale, features in enumerate(inputs.features):
            noise = 1e3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
            garbage = features + hide(noise, ~inputs.mask)
            if not torch.equal(fused_at(design, scale, inputs, features), fused_at(design, scale, inputs, garbage)):
                leaks.add(scale)
    return sorted(leaks)


def objective(results: list[FusedScale]) -> torch.Tensor:
    """A scalar that depends on everything a design returns, with a weight per element."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for result in results:
        for part in (result.fused, result.auxiliary):
            if part is not None:
                total = total + (part.float() * torch.randn(part.shape, generator=generator)).sum()
        if result.loss is not None:
            total = total + result.loss
    return total


def take_modalities(tensor: torch.Tensor, keep: list[int], blocks: int, dim: int) -> torch.Tensor:
    """Keep some of ``blocks`` equal parts of ``tensor`` along ``dim``: weights after removing modalities."""
    return torch.cat([tensor.chunk(blocks, dim)[m] for m in keep], dim)


def install(folder: Path, package: str, entry_points: dict[str, str], code: str) -> None:
    """Write a module and the metadata of an installed package around it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    (folder / f"{package.replace('-', '_')}.py").write_text(code)


def recipe() -> str:
    """The design that docs/fusion.md tells the reader to write."""
    (code,) = re.findall(r"```python\n(\"\"\"Gated sum.*?)```", DOCS, re.DOTALL)
    return code
