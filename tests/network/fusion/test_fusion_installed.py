"""Fusion designs of other packages: found by entry point, and no broken one takes the others with it."""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import network, options_with
from fusion_cases import DOCS, install, recipe

from nnunetv2_mgml.network.fusion import base, find_design, fusion_designs
from nnunetv2_mgml.network.fusion.installed import GROUP

OWN = set(fusion_designs())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on the path, before anybody asked for the designs of other packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(base, "_PROBLEMS", None)
    importlib.invalidate_caches()
    return tmp_path


def test_the_documented_design_as_a_package_of_its_own(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found, listed, planned and trained with, without a change in ours."""
    install(fresh, "my-fusion", {"gated": "my_fusion:GatedFusion"}, recipe())
    monkeypatch.delitem(sys.modules, "my_fusion", raising=False)
    assert set(fusion_designs()) == OWN | {"gated"}
    net = network(options_with(fusion="gated", fusion_options={"sharpness": 2.0}, width_factor=1.0), modalities=3)
    x, mask = torch.randn(2, 3, 16, 16, 16), torch.tensor([[True, False, True], [False, True, False]])
    net(x, modality_mask=mask).square().mean().backward()
    assert all(gate.grad.abs().max() > 0 for gate in net.fusion.gates)


def test_the_documented_metadata_names_the_design() -> None:
    """The pyproject.toml of the recipe has our group."""
    (text,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert f'[project.entry-points."{GROUP}"]\ngated = "my_fusion:GatedFusion"\n' in text


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import a_module_nobody_has", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("Broken = 3", "TypeError: 3 is not a subclass of FusionDesign"),
        (
            "from nnunetv2_mgml.network.fusion import FusionDesign\nclass Broken(FusionDesign):\n    name = 'mean'",
            "ValueError: Fusion design 'mean' is already registered by MeanFusion",
        ),
        ("Other = 3", "AttributeError: module 'broken_fusion' has no attribute 'Broken'"),
        (
            "from nnunetv2_mgml.network.fusion import FusionDesign, register\n@register\nclass Half(FusionDesign):\n"
            "    name = 'half'\nraise OSError('no kernel')",
            "OSError: no kernel",
        ),
    ],
)
def test_a_broken_package_is_named_and_the_others_work(
    code: str, reason: str, fresh: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(fresh, "broken-fusion", {"broken": "broken_fusion:Broken"}, code)
    install(fresh, "my-fusion", {"gated": "my_fusion:GatedFusion"}, recipe())
    for module in ("broken_fusion", "my_fusion"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    expected = f"Fusion design 'broken' of broken-fusion cannot be used: {reason}"
    with caplog.at_level(logging.WARNING):
        assert set(fusion_designs()) == OWN | {"gated"}
        fusion_designs()
    (record,) = [record for record in caplog.records if "broken" in record.message]
    assert record.message.startswith(expected)
    assert record.message.endswith(f"uninstall broken-fusion (entry point broken_fusion:Broken in group {GROUP}).")
    assert find_design("mean") is base._REGISTRY["mean"]
    with pytest.raises(ValueError, match=rf"Unknown fusion design 'broken'\. Allowed: .*{re.escape(expected)}"):
        find_design("broken")


def test_info_lists_it_in_a_new_process(tmp_path: Path) -> None:
    install(tmp_path, "my-fusion", {"gated": "my_fusion:GatedFusion"}, recipe())
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    out = subprocess.run(
        [sys.executable, "-m", "nnunetv2_mgml.commands.main", "info", "--fusions"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout
    assert re.search(r"^gated +learned gate per modality and channel$", out, re.MULTILINE)
