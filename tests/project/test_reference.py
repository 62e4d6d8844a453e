"""The reference of the docs site is made from the registries, and tables in docs/ name what those have."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import nnunetv2_mgml
from nnunetv2_mgml.commands.main import COMMANDS
from nnunetv2_mgml.network.fusion import fusion_designs
from nnunetv2_mgml.objective import loss_terms
from nnunetv2_mgml.scoring.metrics import all_metrics
from nnunetv2_mgml.training import TRAINERS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", DOCS / "site" / "tables.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_column(text: str) -> list[str]:
    """Return the names in backticks that begin the rows of the tables in a page."""
    return [name for row in re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]


def test_every_registered_thing_has_its_row(tables: ModuleType) -> None:
    pages = tables.pages()
    assert first_column(pages["fusion-designs"]) == list(fusion_designs())
    assert re.findall(r"^\| `(\w+)` \|", pages["terms"], re.MULTILINE) == list(loss_terms())
    assert first_column(pages["metrics"]) == list(all_metrics())
    assert first_column(pages["trainers"]) == sorted(TRAINERS)
    assert re.findall(r"^## mgml ([\w-]+)$", pages["commands"], re.MULTILINE) == list(COMMANDS)
    assert re.findall(r"^## `(\w+)`", pages["api"], re.MULTILINE) == nnunetv2_mgml.__all__
    assert {"fusion", "num_epochs", "temperature"} < set(first_column(pages["options"]))


def test_commands_are_listed_with_what_help_says(tables: ModuleType) -> None:
    page = tables.commands()
    assert "### mgml convert brats" in page
    assert re.search(r"^\| `--seed SEED` \| seed of the random split \(default: 0\) \|$", page, re.MULTILINE)
    assert re.search(
        r"^\| `--preset \{nnunet,paper,paper-losses,reference-losses,early-fusion\} ...` \| one or several. nnunet: ",
        page,
        re.MULTILINE,
    )
    assert re.search(r"^\| `--missing_modalities NAME ...` \| Modalities to do without", page, re.MULTILINE)
    assert "SUPPRESS" not in page
    assert "%(default)s" not in page


def test_cells_cannot_break_a_table(tables: ModuleType) -> None:
    text = tables.table(("a", "b"), [("x | y", "two\n lines")])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x \\| y | two lines |"]


def test_metrics_in_the_text_are_those_there_are() -> None:
    section = (DOCS / "evaluation.md").read_text().split("## Metrics")[1].split("\n### ")[0]
    assert sorted(first_column(section)) == sorted(all_metrics())


@pytest.mark.parametrize("page", ["method.md", "rebalancing.md"])
def test_options_in_the_text_are_those_there_are(page: str, tables: ModuleType) -> None:
    section = re.split(r"^\| option \| ?\|$", (DOCS / page).read_text(), flags=re.MULTILINE)[1].split("\n\n")[0]
    named = first_column(section)
    assert len(named) > 3
    assert set(named) <= set(first_column(tables.options()))


def test_every_page_is_reached_from_the_site(tables: ModuleType) -> None:
    navigation = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.name for path in DOCS.glob("*.md")}
    made = {f"reference/{name}.md" for name in tables.pages()}
    assert pages | made <= navigation
    assert navigation - pages - made == {"contributing.md", "changelog.md", "security.md"}
