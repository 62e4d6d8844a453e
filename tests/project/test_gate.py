"""What `.ci/`, the Makefile, pre-commit and the workflows promise."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import tokenize
from pathlib import Path
from types import ModuleType

import pytest

import nnunetv2_mgml

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    p for room in ("nnunetv2_mgml", "dataset_conversion", ".ci", "docs/site") for p in (ROOT / room).rglob("*.py")
)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


CARELESS = {
    "dataset_conversion/parallel.py",
    "dataset_conversion/splits.py",
    "nnunetv2_mgml/presentation/figures/style.py",
}
"""Files that still silence mypy without a reason; nothing is ever added here."""


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def careless(text: str) -> list[str]:
    """Return the comments that silence mypy without a code, or without a reason behind it."""
    lines = iter(text.splitlines(keepends=True))
    comments = [t.string for t in tokenize.generate_tokens(lambda: next(lines, "")) if t.type == tokenize.COMMENT]
    silencing = [c for c in comments if re.search(r"#\s*(type:\s*ignore|mypy:)", c)]
    return [c for c in silencing if not re.search(r"# type: ignore\[[\w, -]+\]\s+# \S+", c)]


def test_mypy_is_only_silenced_with_code_and_reason() -> None:
    found = {str(path.relative_to(ROOT)): careless(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: comments for path, comments in found.items() if comments and path not in CARELESS} == {}


@pytest.mark.parametrize(
    ("comment", "fine"),
    [
        ("# type: ignore[misc]  # nnU-Net's class has no types", True),
        ("# type: ignore[misc]", False),
        ("# type: ignore", False),
        ("# type: ignore  # no code here", False),
        ("# mypy: ignore-errors", False),
        ("# a type that we ignore", True),
    ],
)
def test_how_mypy_may_be_silenced(comment: str, fine: bool) -> None:
    assert (careless(f"x = 1  {comment}\n") == []) is fine
    assert careless(f"x = '{comment}'\n") == []


@pytest.mark.parametrize(
    ("text", "suffix", "found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', ".html", 1),
        ('<script src="assets/x.js"></script><a href="https://example.org">read</a>', ".html", 0),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', ".html", 1),
        ('<link rel="canonical" href="https://example.org/">', ".html", 0),
        ('<link rel="preconnect" href="https://fonts.example" crossorigin><img src="http://a/b.png">', ".html", 2),
        ('@import "https://fonts.example/x.css"; a{background:url(data:image/svg+xml;x)}', ".css", 1),
        ("@font-face{src:url('https://fonts.example/x.woff2')}", ".css", 1),
    ],
)
def test_pages_that_would_ask_the_network_are_found(text: str, suffix: str, found: int) -> None:
    assert len(script("check_site").outside(text, suffix)) == found


def test_a_site_without_pages_is_no_site(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = script("check_site").main
    assert check(str(tmp_path)) == 1
    (tmp_path / "index.html").write_text("<p>fine</p>")
    capsys.readouterr()
    assert check(str(tmp_path)) == 0
    (tmp_path / "a.html").write_text("<img src='https://example.org/a.png'>")
    assert check(str(tmp_path)) == 1
    assert "a.html: https://example.org/a.png" in capsys.readouterr().out


def test_a_tag_is_released_only_with_its_version_and_a_date(tmp_path: Path) -> None:
    problems = script("check_release").problems
    for name in ("nnunetv2_mgml/__init__.py", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    version = nnunetv2_mgml.__version__
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(
        re.sub(rf"^## {re.escape(version)} - .+$", f"## {version} - 2026-12-01", changes.read_text(), flags=re.M)
    )
    assert problems(f"v{version}", tmp_path) == []
    assert "has to be" in problems("v9.9.9", tmp_path)[0]
    (tmp_path / "CITATION.cff").write_text("version: 9.9.9\n")
    changes.write_text(f"## {version} - unreleased\n")
    assert len(problems(f"v{version}", tmp_path)) == 2


def test_the_rooms_are_counted_whole() -> None:
    counted = [file for _, files in script("rooms").rooms() for file in files]
    assert sorted(counted) == [p for p in SOURCES if p.relative_to(ROOT).parts[0] not in (".ci", "docs")]
    table = script("rooms").table()
    assert table[-1].split() == ["all", str(len(counted)), str(sum(int(row.split()[2]) for row in table[1:-1]))]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_sets_itself_up_or_uses_what_it_is_given() -> None:
    def recipe(*arguments: str) -> list[str]:
        command = ["make", "--silent", "--always-make", "--dry-run", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    tests = "-m pytest -ra --numprocesses 2 --dist loadfile --no-loadscope-reorder"
    assert recipe("test", "VENV=/some/where") == [f"/some/where/bin/python {tests}"]
    for target, extras, last in (("test", "[test]", tests), ("demo", "", "/mgml demo -o demo --overwrite")):
        lines = recipe(target)
        assert lines[0].endswith("python3 -m venv .venv")
        assert lines[1].endswith(f'pip install --quiet --editable ".{extras}"')
        assert lines[-1].endswith(last)


def test_the_hooks_are_tools_of_the_dev_environment() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    [local] = config["repos"]
    assert local["repo"] == "local"  # nothing is cloned
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy", "end-of-file-fixer"} <= set(hooks)
    assert {hook["language"] for hook in hooks.values()} == {"system"}


def test_workflows_run_every_python_that_is_allowed() -> None:
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    pythons = re.findall(r'"(3\.\d+)"', re.search(r"python: \[(.+)\]", text)[1])
    assert pythons == ["3.10", "3.11", "3.12", "3.13"]
    setup = next(
        n
        for n in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(n, ast.keyword) and n.arg == "python_requires"
    )
    assert ast.literal_eval(setup.value) == f">={pythons[0]}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_workflows_pin_what_they_run_and_begin_without_rights(path: Path) -> None:
    text = path.read_text()
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    assert [
        action for action, comment in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) or "# v" not in comment
    ] == []
    assert re.search(r"^permissions: \{\}$", text, re.MULTILINE)


def test_every_type_ignore_has_its_code_and_a_reason() -> None:
    files = [*(ROOT / "nnunetv2_mgml").rglob("*.py"), *(ROOT / "dataset_conversion").rglob("*.py")]
    lines = [line for file in files for line in file.read_text().splitlines() if "# type: ignore" in line]
    assert lines
    assert [line for line in lines if not re.search(r"# type: ignore\[[\w,-]+\]  # \w+", line)] == []
