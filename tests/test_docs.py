"""What the documentation promises exists."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from nnunetv2_mgml.cli import COMMANDS
from nnunetv2_mgml.training import TRAINERS

ROOT = Path(__file__).parents[1]
MENTIONS = {"mgml convert back", "mgml convert brats --missing_ok", "mgml convert split"}
"""Names of commands in running text, not commands to type."""
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
    checked = ("convert", "plan", "evaluate", "compare", "info", "demo")
    return sorted(line for line in lines - MENTIONS if line.split()[1] in checked and "..." not in line
                  and "[" not in line and len(line.split()) > 2)


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
