"""The direction of imports between the rooms of the package, read from every import statement there is.

Imports inside functions and under ``TYPE_CHECKING`` count as well: they are the ones by which a direction gets lost.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "nnunetv2_mgml"

FOUNDATION = {"modalities", "io", "plans", "upstream"}
LEARNING = {"dataloading", "network", "objective"}
ALLOWED: dict[str, set[str]] = {
    "modalities": set(),
    "io": {"modalities"},
    "plans": {"modalities", "io"},
    "upstream": {"modalities", "io", "plans"},
    "phantom": {"modalities", "io"},
    "dataset_conversion": FOUNDATION,
    "dataloading": FOUNDATION,
    "network": FOUNDATION,
    "objective": FOUNDATION | {"network"},
    "inference": FOUNDATION | LEARNING,
    "scoring": FOUNDATION | {"inference"},
    "presentation": FOUNDATION | LEARNING | {"inference", "scoring"},
    "workflows": FOUNDATION | LEARNING | {"inference", "scoring", "presentation", "phantom", "dataset_conversion"},
    "training": FOUNDATION | LEARNING | {"inference", "scoring", "presentation", "workflows"},
    "ext": {"training"},
    "commands": FOUNDATION
    | LEARNING
    | {"inference", "scoring", "presentation", "workflows", "training", "dataset_conversion", "phantom"},
}
"""Room -> the rooms it may import, beside itself and the package's top."""

KNOWN: set[tuple[str, str]] = set()
"""(file, imported module) that point the wrong way and are to go; nothing is ever added here."""


def modules() -> dict[str, Path]:
    """Return dotted name -> file of everything in the package, the conversion at the repository's top included."""
    found = {}
    for name, folder in ((PACKAGE, ROOT / PACKAGE), (f"{PACKAGE}.dataset_conversion", ROOT / "dataset_conversion")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, with the names they are asked for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; the package imports by full names"
            if node.module == PACKAGE:
                yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith(f"{PACKAGE}."):
                yield node.module


def room(module: str) -> str:
    """Return the room of a module; empty for the package's top, which only forwards names."""
    return ([*module.split("."), ""])[1]


def violations() -> set[tuple[str, str]]:
    """Return (file, module) of every import that its room does not allow."""
    found = set()
    for module, path in modules().items():
        own = room(module)
        if own.startswith("_") or not own:  # the package's top and its private helpers forward names lazily
            continue
        for name in imported(path):
            target = room(name)
            if target in ALLOWED and target != own and target not in ALLOWED[own]:
                found.add((path.relative_to(ROOT).as_posix(), name))
    return found


def test_every_room_has_its_place() -> None:
    rooms = {room(name) for name in modules()}
    assert {name for name in rooms if name and not name.startswith("_")} == set(ALLOWED)


def test_imports_point_one_way() -> None:
    assert violations() - KNOWN == set()


def test_known_violations_only_get_fewer() -> None:
    assert KNOWN - violations() == set(), "these are mended: take them off the list"


def test_the_rooms_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        free = {name for name, targets in ALLOWED.items() if name not in done and targets <= done}
        assert free, f"a cycle among {sorted(set(ALLOWED) - done)}"
        done |= free


def test_the_walk_sees_imports_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "import nnunetv2_mgml.io.files\n"
        "from nnunetv2_mgml import plans\n"
        "if TYPE_CHECKING:\n    from nnunetv2_mgml.scoring.results import Evaluation\n"
        "def late():\n    from nnunetv2_mgml.commands import main\n"
    )
    rooms = {room(name) for name in imported(file)}
    assert rooms == {"io", "plans", "scoring", "commands"}


PARSES = f"{PACKAGE}.upstream.predict_command"
"""Exchanges the parser inside nnU-Net's own commands; the arguments themselves are in commands/predict.py."""


@pytest.mark.parametrize("module", modules())
def test_only_commands_parse_arguments_and_print(module: str) -> None:
    if room(module) == "commands" or module == PARSES:
        return
    names = set()
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            names.add("print")
    assert not names & {"argparse", "print"}, f"{module} parses arguments or prints; that is for commands/"
