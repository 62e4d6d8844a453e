"""What the documentation promises exists."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from nnunetv2_mgml.commands.main import COMMANDS
from nnunetv2_mgml.training import TRAINERS

ROOT = Path(__file__).parents[2]
MENTIONS = {"mgml convert back", "mgml convert brats --missing_ok", "mgml convert folders", "mgml convert split"}
"""Names of commands in running text, not commands to type."""
WRITTEN_BY_THE_READER = "nnunetv2_mgml.network.fusion.gated"
"""The module of the tutorial in docs/fusion.md."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"^(mgml .+?)(?:\s+#.*)?$|`(mgml [^`\n]+)`", text, flags=re.MULTILINE)
    lines = {(block or inline).strip() for block, inline in found}
    checked = ("convert", "check", "plan", "warmstart", "evaluate", "compare", "find-best", "report")
    checked += ("export-model", "export-network", "info", "demo")
    return sorted(
        line
        for line in lines - MENTIONS
        if line.split()[1] in checked and "..." not in line and "[" not in line and len(line.split()) > 2
    )


@pytest.mark.parametrize("line", commands())
def test_documented_commands_parse(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)
    parser.parse_args(arguments)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 10


def test_documented_trainers_exist() -> None:
    named = set(re.findall(r"`(nnUNetTrainer\w+)`", (ROOT / "README.md").read_text()))
    assert named
    assert named <= set(TRAINERS)


def python_imports() -> list[str]:
    """Import statements of every fenced Python block, one string each."""
    found = set()
    for page in PAGES:
        for block in re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            tree = ast.parse(textwrap.dedent(block))
            found.update(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    return sorted(statement for statement in found if WRITTEN_BY_THE_READER not in statement)


@pytest.mark.parametrize("statement", python_imports())
def test_documented_imports_work(statement: str) -> None:
    exec(statement, {})


def test_there_are_imports_to_check() -> None:
    assert any("nnunetv2_mgml" in statement for statement in python_imports())
