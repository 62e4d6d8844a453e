"""What a design computes once for many masks (`FusionDesign.share`) gives each of them its own result."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import LAYOUTS, Pass, design_names, hide, make_design, make_pass, make_spec, run

from nnunetv2_mgml.modalities import all_subsets

designs = pytest.mark.parametrize("name", design_names())


@designs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_parts_give_the_same(name: str, layout: str) -> None:
    """One sample for every subset, and a batch with a mask each: what is shared changes the result by rounding only."""
    spec = make_spec(layout)
    design = make_design(name, spec).eval()
    subsets = torch.tensor(all_subsets(3))
    for batch in (1, len(subsets)):
        inputs = make_pass(spec, torch.ones(batch, 3, dtype=torch.bool))
        features = [f.expand(len(subsets), *f.shape[1:]) for f in inputs.features]
        contexts = [c if c is None else c.expand(len(subsets), *c.shape[1:]) for c in inputs.contexts]
        given = features if design.hides_absent else [hide(f, subsets) for f in features]
        with torch.no_grad():
            plain = run(design, Pass([hide(f, subsets) for f in features], subsets, contexts))
            shared = run(design, Pass(given, subsets, contexts), design.share(inputs.features))
        for one, two in zip(plain, shared, strict=True):
            torch.testing.assert_close(one.fused, two.fused, atol=1e-4, rtol=1e-4)
            if one.auxiliary is not None:
                torch.testing.assert_close(one.auxiliary, two.auxiliary, atol=1e-4, rtol=1e-4)


@designs
def test_shared_parts_keep_absent_modalities_out(name: str) -> None:
    """What a modality holds changes no bit of the result for the subsets without it, though the parts are shared."""
    spec = make_spec()
    design = make_design(name, spec).eval()
    inputs = make_pass(spec, [[1, 1, 1]])
    for absent in range(3):
        subsets = torch.tensor([subset for subset in all_subsets(3) if not subset[absent]])
        contexts = [c if c is None else c.expand(len(subsets), *c.shape[1:]) for c in inputs.contexts]
        results = []
        for content in (inputs.features, [f.clone() for f in inputs.features]):
            if results:
                for feature in content:
                    feature[:, absent] += 1e3 * torch.randn_like(feature[:, absent])
            features = [f.expand(len(subsets), *f.shape[1:]) for f in content]
            given = features if design.hides_absent else [hide(f, subsets) for f in features]
            with torch.no_grad():
                results.append(run(design, Pass(given, subsets, contexts), design.share(content)))
        assert all(torch.equal(one.fused, two.fused) for one, two in zip(*results, strict=True))
