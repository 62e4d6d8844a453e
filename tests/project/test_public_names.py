"""Names importable from the top of the package, and what importing it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_mgml

ROOT = Path(__file__).parents[2]
SOURCE = Path(nnunetv2_mgml.__file__).read_text(encoding="utf-8")


def for_type_checkers() -> dict[str, str]:
    """Return name -> place, in the spelling of ``_PLACES``, of the imports under TYPE_CHECKING."""
    [block] = [n for n in ast.parse(SOURCE).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        module = (node.module or "").removeprefix("nnunetv2_mgml.")
        for alias in node.names:
            found[alias.asname or alias.name] = module + (f":{alias.name}" if alias.asname else "")
    del found["ModuleSpec"]
    return found


def test_the_three_lists_agree() -> None:
    assert for_type_checkers() == nnunetv2_mgml._PLACES
    assert nnunetv2_mgml.__all__ == list(nnunetv2_mgml._PLACES)
    assert set(nnunetv2_mgml.__all__) <= set(dir(nnunetv2_mgml))


@pytest.mark.parametrize("name", nnunetv2_mgml.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    value = getattr(nnunetv2_mgml, name)
    assert value.__doc__
    assert getattr(nnunetv2_mgml, name) is value


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        nnunetv2_mgml.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import nnunetv2_mgml; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(done.stdout)) <= {"nnunetv2_mgml", "__future__"}


def test_a_star_import_gives_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from nnunetv2_mgml import *", names)
    assert set(nnunetv2_mgml.__all__) <= set(names)


def test_one_version_everywhere() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == nnunetv2_mgml.__version__
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == nnunetv2_mgml.__version__
