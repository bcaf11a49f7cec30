"""Files and folders are whole or absent; a lock makes two processes take turns."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from onebase.errors import ConfigError, OutputError
from onebase.files import atomic_file, atomic_folder, process_lock, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_text_makes_parents_and_replaces(tmp_path: Path):
    target = tmp_path / "a" / "b.txt"
    write_text(target, "one")
    write_text(target, "zwei ü")
    assert target.read_bytes() == "zwei ü".encode()
    assert names(target.parent) == ["b.txt"]


def fail_half_way(target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_text("half")
        assert target.read_text() == "old", "nothing shows before it is whole"
        raise KeyError


def fail_half_way_in_folder(target: Path) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_text("half")
        raise KeyError


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path):
    target = tmp_path / "kept.txt"
    write_text(target, "old")
    with pytest.raises(KeyError):
        fail_half_way(target)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["kept.txt"]


def test_a_failed_folder_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyError):
        fail_half_way_in_folder(tmp_path / "out")
    assert names(tmp_path) == []


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / content).write_text(content)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["second"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_an_os_error_becomes_an_output_error(tmp_path: Path, atomic):
    with pytest.raises(OutputError, match="No space left"), atomic(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_our_own_error_passes_through(tmp_path: Path, atomic):
    with pytest.raises(ConfigError, match=r"^mine$"), atomic(tmp_path / "out"):
        raise ConfigError("mine")


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), process_lock(tmp_path / "file" / "lock"):
        pass


COUNT = """
import sys, time
from pathlib import Path
from onebase.files import process_lock
folder = Path(sys.argv[1])
for _ in range(20):
    with process_lock(folder / "lock"):
        seen = int((folder / "count").read_text())
        time.sleep(0.002)  # without the lock, the other process reads the same number here
        (folder / "count").write_text(str(seen + 1))
"""


def test_two_processes_take_turns(tmp_path: Path):
    (tmp_path / "count").write_text("0")
    started = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert (tmp_path / "count").read_text() == "40"
