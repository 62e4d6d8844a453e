"""What every fusion design must do. A design joins by registering; nothing here needs to know its name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_cases import (
    LAYOUTS,
    OTHER_SIZE,
    Pass,
    design_class,
    design_names,
    hide,
    make_design,
    make_pass,
    make_spec,
    objective,
    own_designs,
    reads_mask,
    run,
    scales_with_leaks,
)

from nnunetv2_mgml.modalities import all_subsets
from nnunetv2_mgml.network.fusion import FusedScale, FusionDesign, build_fusion, fusion_designs, register
from nnunetv2_mgml.network.fusion.published import differences_table, published_designs

NAMES = design_names()
TWO_MASKS = [[1, 0, 1], [0, 1, 0]]
HALF = (torch.bfloat16, torch.float16)
designs = pytest.mark.parametrize("name", NAMES)


def test_registry() -> None:
    assert {
        "mean",
        "concat",
        "region_aware",
        "hemis",
        "uhved",
        "mfi",
        "sfusion",
        "mmformer",
        "imfuse",
        "m2ftrans",
    } <= set(fusion_designs())
    for name, cls in fusion_designs().items():
        assert cls.name == name
        assert cls.summary
    with pytest.raises(ValueError, match="already registered by MeanFusion"):
        register(type("Second", (FusionDesign,), {"name": "mean"}))
    with pytest.raises(ValueError, match="needs a class attribute 'name'"):
        register(type("Nameless", (FusionDesign,), {}))
    with pytest.raises(ValueError, match=r"Unknown fusion design 'men'\. Allowed: concat, "):
        build_fusion("men", make_spec())


@designs
def test_unknown_option(name: str) -> None:
    with pytest.raises(ValueError, match="has no option colour"):
        make_design(name, make_spec(options={"colour": 1}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mmformer", {"depth": 0}),
        ("mmformer", {"depth": "2"}),
        ("mmformer", {"depth": True}),
        ("mmformer", {"dropout": -0.1}),
        ("mmformer", {"dropout": 1.0}),
        ("m2ftrans", {"channel_attention": 1}),
    ],
)
def test_bad_option(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_fusion(name, make_spec(options=options))


@designs
@pytest.mark.parametrize("modalities", [2, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(name: str, layout: str, modalities: int) -> None:
    """2D and 3D, anisotropic and odd sizes, the plan's patch and another; any number of modalities."""
    spec = make_spec(layout, modalities)
    design = make_design(name, spec)
    mask = [[1] * modalities, [0] * (modalities - 1) + [1]]
    for size in (None, OTHER_SIZE[layout]):
        inputs = make_pass(spec, mask, size)
        with torch.no_grad():
            results = run(design.eval(), inputs)
        for features, result in zip(inputs.features, results, strict=True):
            assert result.fused.shape == (2, *features.shape[2:])
            assert result.fused.dtype == features.dtype
            assert result.fused.isfinite().all()
            if result.auxiliary is not None:
                assert result.auxiliary.shape == (2, spec.num_classes, *features.shape[3:])


@designs
def test_masks_are_per_sample(name: str) -> None:
    """A batch of two with different masks equals two batches of one."""
    spec = make_spec("anisotropic")
    design = make_design(name, spec).eval()
    both = make_pass(spec, TWO_MASKS)
    with torch.no_grad():
        together = run(design, both)
        for b in range(2):
            alone = run(
                design,
                Pass(
                    [f[b : b + 1] for f in both.features],
                    both.mask[b : b + 1],
                    [c if c is None else c[b : b + 1] for c in both.contexts],
                ),
            )
            for one, two in zip(alone, together, strict=True):
                torch.testing.assert_close(one.fused[0], two.fused[b], atol=1e-5, rtol=1e-4)


@designs
def test_the_mask_matters(name: str) -> None:
    """Every modality that is present has an effect, so no design looks at one mask entry only."""
    spec = make_spec()
    design = make_design(name, spec).eval()
    inputs = make_pass(spec, [[1, 1, 1]])
    with torch.no_grad():
        full = run(design, inputs)
        for m in range(3):
            mask = torch.arange(3)[None] != m
            fewer = run(design, Pass([hide(f, mask) for f in inputs.features], mask, inputs.contexts))
            for one, two in zip(full, fewer, strict=True):
                assert not torch.allclose(one.fused, two.fused, atol=1e-3)


@designs
def test_content_of_absent_modalities_is_ignored_where_the_mask_is_used(name: str) -> None:
    """Noise in an absent modality changes no bit, for every subset: catches masks of another sample or modality.

    At the bottleneck for every design but those that say they read zeros, which must not use the mask at all; at any
    other scale where the design uses the mask.
    """
    design = make_design(name, make_spec()).eval()
    scales = range(design.spec.num_scales)
    using = [scale for scale in scales if reads_mask(design, scale)]
    if design_class(name).reads_zeros:
        assert using == [], "reads_zeros is for designs that do not use the mask"
    else:
        assert design.spec.num_scales - 1 in using, "uses no mask at the bottleneck: set reads_zeros, or use it"
    assert set(scales_with_leaks(design)) & set(using) == set()


@pytest.mark.parametrize("name", [name for name in NAMES if not design_class(name).reads_zeros])
@pytest.mark.parametrize(
    "wrong",
    [lambda mask: mask.roll(1, 1), lambda mask: mask[:1].expand_as(mask), lambda mask: mask.roll(1, 0)],
    ids=["another modality", "the first sample", "another sample"],
)
def test_a_mask_used_for_the_wrong_thing_is_found(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails for every design, at the bottleneck, once its mask is rolled."""
    design = make_design(name, make_spec()).eval()
    right = design.fuse_scale
    monkeypatch.setattr(
        design,
        "fuse_scale",
        lambda scale, features, mask, context, state: right(scale, features, wrong(mask), context, state),
    )
    assert design.spec.num_scales - 1 in scales_with_leaks(design)


@designs
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_finite_for_every_mask_and_precision(name: str, training: bool) -> None:
    spec = make_spec()
    design = make_design(name, spec).train(training)
    inputs = make_pass(spec, list(all_subsets(3)))
    for features in (inputs.features, [torch.zeros_like(f) for f in inputs.features]):
        for dtype in (None, *HALF):
            cast = [f.to(dtype or f.dtype).requires_grad_() for f in features]
            contexts = [c if c is None or dtype is None else c.to(dtype) for c in inputs.contexts]
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                results = run(design, Pass(cast, inputs.mask, contexts))
            design.zero_grad()
            objective(results).backward()
            for result in results:
                assert result.fused.isfinite().all()
                assert result.auxiliary is None or result.auxiliary.isfinite().all()
                assert result.loss is None or (result.loss.isfinite() and result.loss.dtype == torch.float32)
            # Three InstanceNorms in a row over zeros multiply a gradient by eps ** -1.5 = 3e7: too much for float16.
            if features is inputs.features or dtype is not torch.float16:
                assert all(p.grad is None or p.grad.isfinite().all() for p in design.parameters())


@designs
@pytest.mark.parametrize("layout", ["3d", "2d"])
def test_gradients(name: str, layout: str) -> None:
    """Every parameter has a gradient under every single mask (DDP needs it) and a real one over all of them.

    Without norms, whose preceding biases have no effect by design.
    """
    spec = make_spec(layout, norm_op=None)
    design = make_design(name, spec)
    reached = dict.fromkeys(dict(design.named_parameters()), 0.0)
    for subset in all_subsets(3):
        design.zero_grad()
        inputs = make_pass(spec, [subset])
        objective(run(design, inputs._replace(features=[f.requires_grad_() for f in inputs.features]))).backward()
        for key, parameter in design.named_parameters():
            assert parameter.grad is not None, f"{key} has no gradient under {subset}"
            reached[key] = max(reached[key], parameter.grad.abs().max().item())
    floor = 1e-6 * max(reached.values(), default=0.0)
    assert [key for key, size in reached.items() if size <= floor] == []


@designs
def test_gradient_reaches_present_features_only_through_them(name: str) -> None:
    """Each present modality gets a gradient at every scale, an absent one none."""
    spec = make_spec()
    design = make_design(name, spec)
    inputs = make_pass(spec, TWO_MASKS)
    features = [f.requires_grad_() for f in inputs.features]
    objective(run(design, inputs)).backward()
    for feature in features:
        size = feature.grad.abs().flatten(2).amax(2)
        assert (size[inputs.mask] > 0).all()
        assert (size[~inputs.mask] == 0).all()
        assert (size[inputs.mask] > 1e-2 * size[inputs.mask].max()).all(), "one modality hardly counts"


@designs
def test_deterministic(name: str) -> None:
    """In evaluation, and in training where gradients are off (the teacher pass), with the same result."""
    spec = make_spec()
    design = make_design(name, spec)
    inputs = make_pass(spec, TWO_MASKS)
    with torch.no_grad():
        teacher, again = run(design.train(), inputs), run(design, inputs)
    evaluated = run(design.eval(), inputs)
    for one, two, three in zip(teacher, again, evaluated, strict=True):
        assert torch.equal(one.fused, two.fused)
        assert torch.equal(one.fused, three.fused)
        assert one.loss is None
        assert three.loss is None


@designs
def test_state_dict_round_trip(name: str) -> None:
    spec = make_spec()
    design, other = make_design(name, spec, seed=0).eval(), make_design(name, spec, seed=5).eval()
    inputs = make_pass(spec, TWO_MASKS)
    other.load_state_dict(design.state_dict(), strict=True)
    copied = pickle.loads(pickle.dumps(design))
    with torch.no_grad():
        for again in (other, copied):
            for one, two in zip(run(design, inputs), run(again, inputs), strict=True):
                assert torch.equal(one.fused, two.fused)


@designs
def test_weights_depend_on_modality_is_true(name: str) -> None:
    """The class attribute says whether a network for fewer modalities can load the weights.

    On a patch of 5120 voxels, because a design may treat scales of few voxels in a way of its own.
    """
    shapes = []
    for modalities in (2, 3):
        design = make_design(name, make_spec(modalities=modalities, patch_size=(20, 16, 16)))
        shapes.append({key: value.shape for key, value in design.state_dict().items()})
    assert design_class(name).weights_depend_on_modality == (shapes[0] != shapes[1])


@pytest.mark.parametrize("name", [name for name in NAMES if not design_class(name).weights_depend_on_modality])
def test_removal(name: str) -> None:
    """Masking a modality equals never having had it, for the designs whose weights do not depend on their number."""
    spec = make_spec()
    design, smaller = make_design(name, spec).eval(), make_design(name, make_spec(modalities=2), seed=5).eval()
    smaller.load_state_dict(design.state_dict(), strict=True)
    for absent in range(3):
        keep = [m for m in range(3) if m != absent]
        inputs = make_pass(spec, [[m != absent for m in range(3)]])
        with torch.no_grad():
            masked = run(design, inputs)
            removed = run(smaller, Pass([f[:, keep] for f in inputs.features], inputs.mask[:, keep], inputs.contexts))
        for one, two in zip(masked, removed, strict=True):
            torch.testing.assert_close(one.fused, two.fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", own_designs())
def test_documented(name: str) -> None:
    """docs/fusion.md has a table row with all options and their defaults, and a paragraph."""
    text = (Path(__file__).parents[3] / "docs" / "fusion.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and line.count(" | ") == 5]
    assert len(rows) == 1, f"the table at the top of docs/fusion.md needs one row that begins with '| `{name}` |'"
    design = own_designs()[name]
    depends, options = rows[0].strip("|").split(" | ")[-2:]
    for option, default in design.default_options.items():
        assert f"`{option}` ({json.dumps(default)})" in options, f"option {option} in the row of {name}"
    assert (depends.strip() != "no") == design.weights_depend_on_modality, f"'weights depend on M' in the row of {name}"
    assert f"\n**{name}.** " in text, f"docs/fusion.md needs a paragraph that begins with **{name}.**"


def test_a_design_joins_by_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunetv2_mgml.network.fusion.base._REGISTRY", {})

    @register
    class First(FusionDesign):
        name = "first"
        summary = "the first present modality"

        def fuse_scale(self, scale, features, mask, context, state) -> FusedScale:
            return FusedScale(features[torch.arange(len(mask)), mask.int().argmax(1)])

    assert fusion_designs() == {"first": First}
    inputs = make_pass(make_spec(), TWO_MASKS)
    (*_, deepest) = run(build_fusion("first", make_spec()), inputs)
    assert torch.equal(deepest.fused[1], inputs.features[-1][1, 1])


@designs
def test_a_design_that_hides_absent_modalities_does_so_at_every_scale(name: str) -> None:
    if not design_class(name).hides_absent:
        pytest.skip("the decoder zeroes them")
    assert scales_with_leaks(make_design(name, make_spec()).eval()) == []


def test_the_docs_say_what_differs_from_the_publications() -> None:
    """The table of docs/fusion.md is the one made from the designs."""
    file = Path(__file__).parents[3] / "docs" / "fusion.md"
    found = file.read_text().split("<!-- differences -->\n")[1].split("<!-- /differences -->")[0]
    assert found == differences_table(own_designs()), "put differences_table() between the two marks of docs/fusion.md"
    assert {row.name for row in published_designs(own_designs())} == set(own_designs()) - {"mean"}


@designs
def test_defaults_of_the_first_revision(name: str) -> None:
    """Every revision names options the design has, with values it allows."""
    cls = design_class(name)
    for defaults in cls.defaults_before.values():
        assert set(defaults) <= set(cls.default_options)
        cls.take_options(defaults)
    assert cls.take_options({}, 1) == {**cls.default_options, **cls.defaults_before.get(1, {})}
    make_design(name, make_spec(revision=1))


@pytest.mark.parametrize("training", [True, False])
@designs
def test_context_that_is_not_asked_for_is_not_read(name: str, training: bool) -> None:
    """The decoder hands None where a design says that it does not read the decoder's features."""
    spec = make_spec()
    design = make_design(name, spec).train(training)
    inputs = make_pass(spec, TWO_MASKS)
    asked = [c if design.reads_context(scale) else None for scale, c in enumerate(inputs.contexts)]
    torch.manual_seed(0)
    given = run(design, inputs)
    torch.manual_seed(0)
    for one, two in zip(given, run(design, inputs._replace(contexts=asked)), strict=True):
        assert torch.equal(one.fused, two.fused)
        assert (one.auxiliary is None) == (two.auxiliary is None)
        assert one.auxiliary is None or torch.equal(one.auxiliary, two.auxiliary)


def test_a_subclass_reads_the_decoder_unless_it_says_otherwise() -> None:
    mean = fusion_designs()["mean"]
    assert not mean.uses_context
    assert not type("Same", (mean,), {}).uses_context
    assert type("Other", (mean,), {"fuse_scale": FusionDesign.fuse_scale}).uses_context
    assert not type("Told", (mean,), {"fuse_scale": mean.fuse_scale, "uses_context": False}).uses_context
