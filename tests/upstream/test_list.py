"""nnU-Net is bent in ``upstream/`` only, and every file there names a test that guards it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnunetv2_mgml.upstream

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "nnunetv2_mgml" / "upstream"
FILES = sorted(path for path in UPSTREAM.glob("*.py") if path.name != "__init__.py")
OTHERS = sorted(
    path
    for folder in (ROOT / "nnunetv2_mgml", ROOT / "dataset_conversion")
    for path in folder.rglob("*.py")
    if UPSTREAM not in path.parents
)
LIBRARIES = ("nnunetv2", "dynamic_network_architectures", "batchgenerators", "batchgeneratorsv2", "acvl_utils", "torch")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_says_what_it_bends_why_and_what_guards_it(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    parts = dict(re.findall(r"^(Bends|Why|Guarded by): (.+(?:\n    .+)*)", text, re.MULTILINE))
    assert set(parts) == {"Bends", "Why", "Guarded by"}
    tests = re.split(r",\s+", parts["Guarded by"])
    assert any(test.startswith("tests/upstream/") for test in tests)
    for test in tests:
        assert "def test_" in (ROOT / test).read_text(encoding="utf-8"), f"{path.name} names {test}"


def test_the_list_is_complete() -> None:
    listed = re.findall(r"^- `(\w+)`: .+\.$", nnunetv2_mgml.upstream.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == [path.stem for path in FILES]


def test_every_body_we_repeat_is_named() -> None:
    """Each function whose source the drift tests hash stands in the list, or in a file of it."""
    predictor = ROOT / "nnunetv2_mgml" / "inference" / "predictor.py"
    told = " ".join(path.read_text(encoding="utf-8") for path in (UPSTREAM / "__init__.py", predictor, *FILES))
    hashed = [
        name
        for file in ("test_upstream_drift.py", "test_inference_drift.py")
        for name in re.findall(r'^    [\w.]*?(\w+): "[0-9a-f]{16}",$', (Path(__file__).parent / file).read_text(), re.M)
    ]
    assert len(hashed) > 10
    assert [name for name in hashed if name not in told and name != "forward"] == []


def bends(tree: ast.AST) -> Iterator[str]:
    """Yield what a file does to a library that only ``upstream/`` may do."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    imported[alias.asname or alias.name.split(".")[0]] = alias.name
    for full in imported.values():
        if any(part.startswith("_") and not part.startswith("__") for part in full.split(".")):
            yield f"imports {full}, which is private"
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            text = ast.unparse(target)
            root, dot, rest = text.partition(".")
            if not dot or not isinstance(target, ast.Attribute) or root not in imported:
                continue
            if not f"{imported[root]}.{rest}".startswith("torch.backends."):  # these are settings
                yield f"sets {text}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            first = node.args[0]
            if isinstance(first, ast.Name) and first.id in imported:
                yield f"sets an attribute of {imported[first.id]}"
        if isinstance(node, ast.Attribute) and node.attr in ("meta_path", "_orig_mod", "getsource"):
            yield f"uses {ast.unparse(node)}"


def test_bending_is_seen() -> None:
    code = (
        "import argparse, sys, torch\nfrom nnunetv2.inference import predict_from_raw_data as upstream\n"
        "from torch._dynamo import OptimizedModule\nupstream.nnUNetPredictor = 1\nsetattr(upstream, 'x', 1)\n"
        "sys.meta_path.append(1)\nnetwork._orig_mod\ntorch.backends.cudnn.benchmark = True\n"
    )
    assert sorted(bends(ast.parse(code))) == [
        "imports torch._dynamo.OptimizedModule, which is private",
        "sets an attribute of nnunetv2.inference.predict_from_raw_data",
        "sets upstream.nnUNetPredictor",
        "uses network._orig_mod",
        "uses sys.meta_path",
    ]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_bent_elsewhere(path: Path) -> None:
    if path.parent.name == "nnunetv2_mgml":
        return  # the package's own finder of old paths
    assert list(bends(ast.parse(path.read_text(encoding="utf-8")))) == []
