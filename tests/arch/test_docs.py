"""What the guides, benchmarks and examples import from the package is there under that name."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*from (onebase[\w.]*) import ([\w, ]+)$", re.MULTILINE)
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(file):
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return [(module, name.strip()) for module, names in IMPORT.findall(text) for name in names.split(",")]
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").split(".")[0] == "onebase"]
    return [(node.module, alias.name) for node in ours for alias in node.names]


USERS = [file for file in GUIDES + PROGRAMS if imported(file)]


@pytest.mark.parametrize("file", USERS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_is_imported_is_there(file):
    for module, name in imported(file):
        found = importlib.import_module(module)
        assert hasattr(found, name), f"{module} has no {name}"


def test_guides_and_programs_import_something():
    assert {file.suffix for file in USERS} == {".md", ".py"}
