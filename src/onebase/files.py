"""Files that are either whole or absent (temporary name, fsync, rename), and a lock between processes."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from filelock import FileLock, Timeout

from onebase.errors import OnebaseError, OutputError, OutputExists


def cache_home() -> Path:
    """Where fetched bases and built code are kept: `$ONEBASE_HOME`, else `onebase` in the user's cache folder."""
    if home := os.environ.get("ONEBASE_HOME"):
        return Path(home).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "onebase"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unnamed_file(folder: Path) -> Generator[IO[bytes]]:
    """An open file in `folder` that nobody else can find; it is gone once it is closed and no longer mapped.

    Raises OutputError where the disk is full or the folder cannot be written.
    """
    try:
        with TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        raise _output_error(folder, error) from error


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def remove(path: Path) -> None:
    """Delete a file or a whole folder, whether it exists or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(NotADirectoryError):  # the parent is a file, so nothing was written
            path.unlink(missing_ok=True)


@contextmanager
def _replacing(target: Path) -> Generator[Path]:
    """A temporary name beside `target` that is gone afterwards; OSErrors come out as OutputError."""
    temporary = _temporary_name(target)
    try:
        yield temporary
        _fsync(target.parent)
    except OnebaseError:
        raise
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        remove(temporary)


@contextmanager
def atomic_file(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it becomes `path`, on failure nothing remains.

    Raises OutputError where the disk is full or the folder cannot be written.
    """
    target = Path(path)
    with _replacing(target) as temporary:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(target)


@contextmanager
def atomic_folder(path: str | Path) -> Generator[Path]:
    """Like `atomic_file`, for a folder that must not exist yet (or is replaced as a whole)."""
    target = Path(path)
    with _replacing(target) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _fsync(entry)
        _swap(temporary, target)


def _swap(temporary: Path, target: Path) -> None:
    """Put `temporary` in the place of `target`; what stood there goes only after that."""
    if not target.exists():
        temporary.rename(target)
        return
    old = _temporary_name(target)
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    remove(old)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_writable(path: str | Path) -> None:
    """Raise OutputError where no file can be written at `path`; asked before the work that it would waste."""
    if Path(path).is_dir():
        raise OutputError(f"output {path}", "it is a folder", hint="name a file")
    parent = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "is read-only" if parent.is_dir() else "is not a folder"
        raise OutputError(f"output {path}", f"{parent} {why}")


@contextmanager
def process_lock(path: str | Path, wait: bool = True) -> Generator[None]:
    """Hold `path` as a lock file, so that two processes which prepare the same thing take turns.

    Without `wait`, OutputExists where another process holds it.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(target))
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise OutputExists(f"output {target.parent}", "another process is at work there") from error
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        yield
    finally:
        lock.release()


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}", error.strerror or str(error))
