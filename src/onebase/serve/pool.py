"""The adapters that can be served: a folder of them and those loaded by name, in memory only while there is room."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from onebase.adapters.adapter import Adapter, Origin
from onebase.config import LoraConfig
from onebase.errors import (
    AdapterNameError,
    BaseError,
    ConfigError,
    FormatError,
    MissingFile,
    OnebaseError,
    nearest,
)
from onebase.serve.request import NoRoom, UnknownAdapter
from onebase.storage.adapter_files import CONFIG, SIDECAR, TENSORS
from onebase.storage.alike import AdapterReader
from onebase.storage.format import HasModel

Stamp = tuple[tuple[str, int, int, int], ...]  # of each file: name, when it was changed, its size, its inode


@dataclass(frozen=True)
class Registered:
    """An adapter that was proved to fit the base. A changed one is registered anew, as another version."""

    name: str
    path: Path
    version: int  # no two registrations have the same
    stamp: Stamp
    found: bool  # in the pool's folder, by `refresh`
    config: LoraConfig
    origin: Origin
    modules: int
    parameters: int
    bytes: int  # in memory


@dataclass(eq=False)
class Pinned:
    """An adapter in memory. It stays there while it has users, whatever becomes of its files or its name."""

    name: str
    version: int
    adapter: Adapter
    bytes: int
    users: int = 0
    used: int = 0  # when last; the pool counts

    @property
    def key(self) -> object:
        """Tells this version of this adapter from all others."""
        return self.name, self.version


@dataclass(frozen=True)
class AdapterInfo:
    """What there is to say of a registered adapter, and whether it is in memory and in use."""

    registered: Registered
    loaded: bool
    users: int


class AdapterPool:
    """Adapters by name, for one base. Its methods may be called from any thread; one thread alone acquires.

    `folder` is searched by `refresh`; adapters are loaded from inside it only (None: from anywhere). `budget`: bytes
    that the adapters in memory may take, 0 for no limit; those without users make room, least recently used first.
    """

    def __init__(self, base: HasModel, folder: str | Path | None = None, budget: int = 0) -> None:
        self._folder, self.budget = None if folder is None else Path(folder).absolute(), budget
        self._reader = AdapterReader(base)
        self._lock = threading.RLock()
        self.model_lock = (
            threading.Lock()
        )  # held while the base's modules are read, or changed by an injection
        self._known: dict[str, Registered] = {}
        self._refused: dict[str, tuple[Stamp, str]] = {}
        # Unloaded by name though they lie in the folder: not found again while the files are the same.
        self._hidden: dict[str, Stamp] = {}
        self._served = Counter[str]()  # of the names that are known
        self._memory: dict[tuple[str, int], Pinned] = {}
        # Loaded last by name: often the next that is used.
        self._fresh: tuple[Registered, Adapter] | None = None
        self._versions = self._clock = 0
        self.loads = self.hits = 0
        if folder is not None:
            if not Path(folder).is_dir():
                raise MissingFile(f"adapters folder {folder}", "no such folder")
            self.refresh()

    @property
    def folder(self) -> Path | None:
        """Where adapters are found."""
        return self._folder

    def names(self) -> list[str]:
        """The adapters that can be asked for, sorted."""
        with self._lock:
            return sorted(self._known)

    def refused(self) -> dict[str, str]:
        """The folders that hold an adapter which cannot be served, and why."""
        with self._lock:
            return {name: reason for name, (_, reason) in sorted(self._refused.items())}

    def find(self, name: str) -> Registered:
        """The adapter of this name. Raises UnknownAdapter, with the reason if it was refused."""
        with self._lock:
            if name in self._known:
                return self._known[name]
            if name in self._refused:
                raise UnknownAdapter(f"adapter {name!r}", f"it was refused: {self._refused[name][1]}")
            raise UnknownAdapter(f"adapter {name!r}", "no adapter of that name", nearest(name, self._known))

    def info(self, name: str) -> AdapterInfo:
        """All about an adapter. Raises UnknownAdapter."""
        with self._lock:
            one = self.find(name)
            pinned = self._memory.get((name, one.version))
            return AdapterInfo(one, pinned is not None, pinned.users if pinned else 0)

    @property
    def bytes(self) -> int:
        """Of all adapters in memory."""
        with self._lock:
            fresh = self._fresh[0].bytes if self._fresh else 0
            return sum(pinned.bytes for pinned in self._memory.values()) + fresh

    def load(self, name: str, path: str | Path, replace: bool = False) -> Registered:
        """Register the adapter in a folder under a name; with `replace` in the place of one that has it.

        Raises AdapterNameError where the name is taken or unusable, ConfigError where the folder is outside of the
        pool's, and what `load_adapter` raises; nothing is registered then.
        """
        if not name or name.startswith(".") or "/" in name or not name.isprintable():
            raise AdapterNameError(
                f"adapter name {name!r}", "must be printable, without / and a dot at its start"
            )
        with self._lock:
            if name in self._known and not replace:
                raise AdapterNameError(f"load adapter {name!r}", "that name is taken", hint="unload it first")
        folder = self._inside(Path(path))
        made, adapter = self._prove(name, folder, found=False)
        with self._lock:
            if name in self._known and not replace:
                raise AdapterNameError(f"load adapter {name!r}", "that name is taken", hint="unload it first")
            self._register(made)
            self._fresh = made, adapter
            return made

    def unload(self, name: str) -> None:
        """Forget a name. Requests that use the adapter, or wait for it, go on. Raises UnknownAdapter."""
        with self._lock:
            one = self.find(name)
            self._forget(name)
            if self._folder is not None and (one.found or _stamp(self._folder / name) == one.stamp):
                self._hidden[name] = one.stamp
            self._drop_stale()

    def refresh(self) -> None:
        """Look again: new adapters in the folder, changed files, folders that are gone. Broken ones are refused."""
        with self._lock:
            known, refused, hidden = dict(self._known), dict(self._refused), dict(self._hidden)
        places = {name: one.path for name, one in known.items() if not one.found}
        if self._folder is not None:
            entries = (path for path in self._folder.iterdir() if not path.name.startswith("."))
            places = {path.name: path for path in entries if _holds_one(path)} | places
        for name, path in sorted(places.items()):
            stamp, one = _stamp(path), known.get(name)
            same = (
                one and one.stamp == stamp,
                name in refused and refused[name][0] == stamp,
                hidden.get(name) == stamp,
            )
            if any(same):
                continue
            try:
                made, _ = self._prove(name, self._inside(path), found=one.found if one else True)
            except (OnebaseError, OSError, ValueError, RuntimeError) as error:  # a loop of links, too
                self._refuse(name, stamp, str(error))
            else:
                with self._lock:
                    self._register(made)
        with self._lock:
            for name in {*known, *refused, *hidden} - places.keys():
                if self._known.get(name) is known.get(name):  # else it was loaded meanwhile
                    self._forget(name)
                    self._refused.pop(name, None)
                    self._hidden.pop(name, None)
            self._drop_stale()

    def acquire(self, wanted: Registered) -> Pinned:
        """The adapter's newest version in memory, with one more user; `release` it.

        Raises NoRoom while adapters in use fill the budget, ConfigError where it never fits, and what `load_adapter`
        raises.
        """
        with self._lock:
            one = self._known.get(wanted.name, wanted)
            pinned = self._memory.get((one.name, one.version))
            self.hits += pinned is not None
            read = self._taken(one) if pinned is None else None
            if pinned is None:
                self._make_room(one)
        if pinned is None:
            one, adapter = self._opened(one, read)
            pinned = Pinned(one.name, one.version, adapter, one.bytes)
        with self._lock:
            self.loads += (one.name, one.version) not in self._memory
            self._memory[one.name, one.version] = pinned
            self._clock += 1
            pinned.users, pinned.used = pinned.users + 1, self._clock
        return pinned

    def _opened(self, one: Registered, read: Adapter | None) -> tuple[Registered, Adapter]:
        """The adapter as its files are. Where they changed it is another version: the old one's keys do not fit it."""
        adapter = read or self._read(one.path)
        while _stamp(one.path) != one.stamp:
            new, adapter = self._prove(one.name, one.path, one.found)
            with self._lock:
                if self._known.get(one.name) is one:
                    self._register(new)
                self._make_room(new)
            one = new
        return one, adapter

    def _taken(self, one: Registered) -> Adapter | None:
        """What was read to prove it, if it was the last one."""
        with self._lock:
            fresh, self._fresh = self._fresh, None
        return fresh[1] if fresh and fresh[0] is one else None

    def release(self, pinned: Pinned) -> None:
        """One user less."""
        with self._lock:
            pinned.users -= 1
            self._drop_stale()

    def count(self, names: Iterable[str]) -> None:
        """A request of these adapters is over."""
        with self._lock:
            self._served.update(name for name in names if name in self._known)

    def served(self) -> dict[str, int]:
        """How many requests of each adapter that can be asked for are over, since its name came."""
        with self._lock:
            return dict(self._served)

    def _make_room(self, one: Registered) -> None:
        if self.budget and one.bytes > self.budget:
            found = f"it takes {one.bytes} bytes, adapters may take {self.budget}"
            raise ConfigError(f"adapter {one.name!r}", found, hint="raise the memory budget")
        if self.budget and not self.shrink(self.budget - one.bytes):
            raise NoRoom(f"adapter {one.name!r}", "the adapters in use fill the memory budget")

    def shrink(self, most: int) -> bool:
        """Let adapters without users go, least recently used first, until the others take `most` bytes; if they do."""
        with self._lock:
            if self.bytes > most:
                self._fresh = None
            over = self.bytes - most
            idle = [one for one in self._memory.values() if not one.users] if over > 0 else []
            for gone in sorted(idle, key=lambda one: one.used):
                if over <= 0:
                    break
                del self._memory[gone.name, gone.version]
                over -= gone.bytes
            return over <= 0

    def _register(self, made: Registered) -> None:
        self._refused.pop(made.name, None)
        self._hidden.pop(made.name, None)
        self._known[made.name] = made
        self._drop_stale()

    def _refuse(self, name: str, stamp: Stamp, reason: str) -> None:
        reason = reason.replace(
            f"{self._folder}{os.sep}", ""
        )  # clients read it: where the folder lies is not theirs
        with self._lock:
            self._forget(name)
            self._refused[name] = stamp, reason
            self._drop_stale()

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._served.pop(name, None)

    def _drop_stale(self) -> None:
        """Free the versions that nobody uses and nobody can ask for."""
        idle = [one for one in self._memory.values() if not one.users]
        for one in idle:
            known = self._known.get(one.name)
            if known is None or known.version != one.version:
                del self._memory[one.name, one.version]
        if self._fresh and self._known.get(self._fresh[0].name) is not self._fresh[0]:
            self._fresh = None

    def _prove(self, name: str, folder: Path, found: bool) -> tuple[Registered, Adapter]:
        stamp = _stamp(folder)
        adapter = self._read(folder)
        if not adapter.origin.writes:
            said = f"it gives {'labels' if adapter.origin.has_head else 'vectors'} to texts and writes none"
            raise BaseError(f"serve adapter {folder}", said, hint="use onebase predict, or onebase embed")
        if _stamp(folder) != stamp:
            raise FormatError(f"adapter {folder}", "its files changed while they were read", hint="try again")
        with self._lock:
            self._versions += 1
            version = self._versions
        tensors = adapter.tensors().values()
        numbers, size = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
        sizes = (len(adapter.lowrank), numbers, size)
        made = Registered(name, folder, version, stamp, found, adapter.config, adapter.origin, *sizes)
        return made, adapter

    def _read(self, folder: Path) -> Adapter:
        with self.model_lock:
            return self._reader.read(folder)

    def _inside(self, path: Path) -> Path:
        """The folder itself, every link followed. Raises ConfigError where it, or a file in it, is outside of ours."""
        if self._folder is None:
            return path
        root = self._folder.resolve()
        folder = (path if path.is_absolute() else root / path).resolve()
        for one in (folder, *(folder / name for name in (CONFIG, TENSORS, SIDECAR))):
            if not one.resolve().is_relative_to(root) or folder == root:
                raise ConfigError(f"adapter folder {path}", "it is not inside of the adapters folder")
        return folder


def _holds_one(folder: Path) -> bool:
    """Whether a folder is an adapter's; one that cannot be read is refused later, with the reason."""
    try:
        return (folder / CONFIG).is_file()
    except OSError:
        return True


def _stamp(folder: Path) -> Stamp:
    found: list[tuple[str, int, int, int]] = []
    for name in (CONFIG, TENSORS, SIDECAR):
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        found.append((name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(found)
