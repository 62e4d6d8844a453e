from __future__ import annotations

import pytest
from fusion_cases import make_spec

from nnunetv2_mgml.network.fusion.skip import skip_fusion


@pytest.mark.parametrize(("width", "count"), [(32, 32_864), (320, 3_277_760)])
def test_number_of_parameters(width: int, count: int) -> None:
    """(M + 28) C^2 + 3 C."""
    spec = make_spec(modalities=4, channels=(width,) * 3, norm_op=None)
    assert sum(p.numel() for p in skip_fusion(spec, 0).parameters()) == (4 + 28) * width**2 + 3 * width == count
    half = sum(p.numel() for p in skip_fusion(spec, 0, width // 2).parameters())
    assert half == (4 + 27) * width**2 + 2 * width + (width + 1) * width // 2
    assert sum(p.numel() for p in skip_fusion(spec, 0, inputs=1).parameters()) == (1 + 28) * width**2 + 3 * width
