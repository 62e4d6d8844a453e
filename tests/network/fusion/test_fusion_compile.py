"""Every fusion design under torch.compile."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import VARIANTS, Pass, make_design, make_pass, make_spec, objective, run
from torch._dynamo.testing import CompileCounterWithBackend

from nnunetv2_mgml.network.fusion import fusion_designs

TWO_SCALES = dict(channels=(8, 16), patch_size=(6, 6, 6), strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2)
MASKS = ([[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [0, 0, 1]])


def check(name: str, backend: str) -> None:
    """Training mode, ``fullgraph``: no Python branch on mask values; another mask needs no second graph."""
    spec = make_spec(**TWO_SCALES)
    design = make_design(name, spec)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda *inputs: run(design, Pass(*inputs)), fullgraph=True, backend=counter)
    exact = backend != "inductor" or not draws_numbers(name)
    for mask in MASKS:
        inputs = make_pass(spec, mask)
        inputs = inputs._replace(features=[f.requires_grad_() for f in inputs.features])
        torch.manual_seed(4)
        results = compiled(*inputs)
        torch.manual_seed(4)
        for one, two in zip(results, run(design, inputs), strict=True):
            assert one.fused.isfinite().all()
            if exact:
                torch.testing.assert_close(one.fused, two.fused, atol=1e-4, rtol=1e-4)
    objective(results).backward()
    assert all(parameter.grad is not None for parameter in design.parameters())
    assert counter.frame_count == 1


def draws_numbers(name: str) -> bool:
    """Whether two eager passes in training mode differ (sampling, dropout)."""
    spec = make_spec()
    design = make_design(name, spec)
    first, second = (run(design, make_pass(spec, MASKS[0])) for _ in range(2))
    return not all(torch.equal(one.fused, two.fused) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("name", fusion_designs())
def test_compiles_as_one_graph(name: str) -> None:
    check(name, "aot_eager")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_one_graph(name: str) -> None:
    """Without tracing the backward pass, which takes most of the time: it is as for the design above."""
    check(name, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["region_aware", "mmformer"])
def test_compiles_with_inductor(name: str) -> None:
    """The default and a transformer; each takes the compiler minutes on two cores."""
    check(name, "inductor")
