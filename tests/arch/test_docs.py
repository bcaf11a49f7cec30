"""What the guides import is there under that name."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*from (onebase[\w.]*) import ([\w, ]+)$", re.MULTILINE)
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def imported(guide):
    found = IMPORT.findall(guide.read_text(encoding="utf-8"))
    return [(module, name.strip()) for module, names in found for name in names.split(",")]


@pytest.mark.parametrize("guide", [one for one in GUIDES if imported(one)], ids=lambda guide: guide.name)
def test_what_a_guide_imports_is_there(guide):
    for module, name in imported(guide):
        assert hasattr(importlib.import_module(module), name), f"{guide.name}: {module} has no {name}"


def test_the_guides_import_something():
    assert {module for guide in GUIDES for module, _ in imported(guide)}
