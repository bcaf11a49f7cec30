"""What is served: names to adapters, what there is to say of them, loading and unloading while requests run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from onebase.errors import MissingFile, OnebaseError, nearest
from onebase.serve.pool import Registered
from onebase.serve.prompts import Prompts
from onebase.serve.request import UnknownAdapter
from onebase.serve.worker import ShuttingDown, Worker
from onebase.storage.adapter_files import CONFIG
from onebase.web.metrics import MIXTURE, Metrics, Snapshot
from onebase.web.problems import Problem
from onebase.web.protocol import Chosen, LoadBody, UnloadBody
from onebase.web.settings import Settings

TRAINING = ("steps", "tokens", "rows", "loss")  # as `onebase inspect` shows
logger = logging.getLogger("onebase")


class Speaker(NamedTuple):
    """Who answers a request: the name for the engine, its adapters, and the label that it is counted under."""

    chosen: Chosen
    adapters: list[Registered]
    label: str


class Service:
    """A worker and what the routes need besides, for one asyncio loop. Raises BaseError for a base without words."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.engine, self.base, self.pool = worker.engine, worker.engine.base, worker.engine.pool
        self.name = base_name(self.base.ref)
        self.prompts, self.metrics = Prompts(self.base), Metrics()
        self.created = int(time.time())
        self.open = True  # False once it shuts down: requests at work end, new ones are refused
        self._refreshing: asyncio.Task[None] | None = None

    # -- Names.

    def names(self) -> list[str]:
        """The adapters that can be asked for. One with the base's name cannot."""
        return [name for name in self.pool.names() if name != self.name]

    def refused(self) -> dict[str, str]:
        """The adapters that cannot be asked for, and why."""
        taken = {self.name: "it has the base's name"} if self.name in self.pool.names() else {}
        return self.pool.refused() | taken

    async def choose(self, model: str, mixture: Mapping[str, float] | None) -> Speaker:
        """Who answers. Looks into the folder before it says that a name is unknown.

        Raises ShuttingDown, or Problem: 404 for a name that is not served, 400 for a mixture of another's.
        """
        if not self.open:
            raise ShuttingDown("the server", "it is shutting down")
        if mixture and model != self.name:
            raise Problem(400, f"mixture: the model must be the base's, {self.name!r}", param="mixture")
        if mixture:
            found = [await self._find(name, "mixture") for name in mixture]
            return Speaker(Chosen(None, tuple(mixture.items())), found, MIXTURE)
        if model == self.name:
            return Speaker(Chosen(), [], self.name)
        one = await self._find(model, "model")
        return Speaker(Chosen(one.name), [one], one.name)

    async def _find(self, name: str, param: str) -> Registered:
        try:
            if name not in self.names() and await asyncio.to_thread(self._lies_there, name):
                await self.refresh()
            if name == self.name:
                raise UnknownAdapter(f"adapter {name!r}", "it is the base")
            return self.pool.find(name)
        except UnknownAdapter as error:
            reason = self.refused().get(name)
            near = nearest(name, [self.name, *self.names()])
            said = (
                f": it was refused: {reason}"
                if reason
                else f"; nearest valid: {', '.join(near)}"
                if near
                else ""
            )
            message = f"the model {name!r} does not exist{said}"
            raise Problem(404, message, "not_found_error", param, "model_not_found") from error

    def _lies_there(self, name: str) -> bool:
        """Whether the adapters folder has a folder of that name: a look at all of it would find something."""
        if self.pool.folder is None or name.startswith(".") or Path(name).name != name:
            return False
        try:
            return (self.pool.folder / name / CONFIG).is_file()
        except OSError:  # a name longer than names are
            return False

    async def refresh(self) -> None:
        """Look into the adapters folder; who asks while that is done waits for the same look."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        names, refused = set(self.names()), self.refused()
        try:
            await asyncio.to_thread(self.pool.refresh)
        except (OnebaseError, OSError) as error:  # the folder itself; the adapters that are known go on
            logger.warning("adapters folder: %s", error)
        for name in sorted(set(self.names()) - names):
            logger.info("adapter %r was found", name)
        for name, reason in self.refused().items():
            if refused.get(name) != reason:
                logger.warning("adapter %r is refused: %s", name, reason)

    async def keep_looking(self) -> None:
        """`refresh` for ever."""
        while True:
            await asyncio.sleep(self.settings.refresh)
            await self.refresh()

    # -- Lists.

    def models(self) -> list[dict[str, Any]]:
        """What /v1/models lists: the base, then the adapters."""
        base = {"root": self.name, "parent": None}
        adapters = {name: {"root": name, "parent": self.name} for name in self.names()}
        return [self._model(name, facts) for name, facts in ({self.name: base} | adapters).items()]

    def _model(self, name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        same = {"object": "model", "created": self.created, "owned_by": "onebase"}
        return {"id": name, **same, **facts, "max_model_len": self.engine.context}

    def adapters(self) -> dict[str, Any]:
        """What /v1/adapters says. Reads the folder where loading is allowed."""
        chat = bool(getattr(self.base.tokenizer, "chat_template", None))
        facts = {
            "id": self.name,
            "parameters": self.base.parameters,
            "context": self.engine.context,
            "chat": chat,
        }
        return {
            "object": "list",
            "base": facts,
            "runtime_loading": self.settings.allow_runtime_loading,
            "data": [described for name in self.names() if (described := self._describe(name))],
            "refused": [{"id": name, "reason": reason} for name, reason in self.refused().items()],
            "loadable": self._loadable(),
        }

    def _describe(self, name: str) -> dict[str, Any] | None:
        try:
            info = self.pool.info(name)
        except UnknownAdapter:  # unloaded since its name was read
            return None
        one, training = info.registered, info.registered.origin.training
        facts = {key: training[key] for key in TRAINING if key in training}
        if isinstance(settings := training.get("settings"), dict) and isinstance(settings.get("data"), str):
            facts["data"] = Path(settings["data"]).name
        config = one.config
        targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        return {
            "id": name,
            "object": "adapter",
            "rank": config.rank,
            "alpha": config.alpha,
            "rslora": config.rslora,
            "variant": "dora" if config.dora else "lora",
            "targets": sorted(targets),
            "modules": one.modules,
            "parameters": one.parameters,
            "bytes": one.bytes,
            "base": one.origin.base,
            "prompt": dict(one.origin.prompt),
            "training": facts,
            "loaded": info.loaded,
            "users": info.users,
        }

    def _loadable(self) -> list[str]:
        if self.pool.folder is None or not self.settings.allow_runtime_loading:
            return []
        known = {*self.pool.names(), *self.pool.refused()}
        try:
            there = {path.name for path in self.pool.folder.iterdir()} - known
            return sorted(name for name in there if self._lies_there(name))
        except OSError:
            return []

    async def snapshot(self) -> Snapshot:
        """Where engine and pool stand, for the metrics. Raises ShuttingDown."""
        stats = await asyncio.wrap_future(self.worker.stats())
        return Snapshot(stats, len(self.names()), self.refused())

    # -- Loading; statuses, types and messages are vLLM's.

    async def load(self, body: LoadBody) -> str:
        """Register an adapter of the folder under a name; what to answer. Raises Problem."""
        self._require_loading()
        name, path = body.lora_name, body.lora_path
        if not name or not path:
            raise _mistake("Both 'lora_name' and 'lora_path' must be provided.")
        if name == self.name:
            raise _mistake(f"'{name}' is the base's name.")
        if name in self.pool.names() and not body.load_inplace:
            hint = "If you want to load the adapter in place, set 'load_inplace' to True."
            raise _mistake(f"The lora adapter '{name}' has already been loaded. {hint}")
        try:
            await asyncio.to_thread(self.pool.load, name, path, body.load_inplace)
        except MissingFile as error:
            raise _missing(f"Loading lora {name} failed: No adapter found for {path}") from error
        except (
            OnebaseError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # pathlib's too: a NUL, a loop of links
            raise _mistake(f"Loading lora {name} failed: {error}") from error
        logger.info("adapter %r was loaded", name)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: UnloadBody) -> str:
        """Forget a name; what to answer. Raises Problem."""
        self._require_loading()
        name = body.lora_name
        if not name:
            raise _mistake("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            self.pool.unload(name)
        except UnknownAdapter as error:
            raise _missing(f"The lora adapter '{name}' cannot be found.") from error
        logger.info("adapter %r was unloaded", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _require_loading(self) -> None:
        if not self.settings.allow_runtime_loading:
            said = "loading at run time is off: start the server with --allow-runtime-loading"
            raise Problem(403, said, "permission_error", code=403)


def base_name(ref: str) -> str:
    """What clients call a base: a folder's or a file's own name, else what was asked for."""
    path = Path(ref).expanduser()
    return path.resolve().name if path.exists() else ref


def _mistake(message: str) -> Problem:
    return Problem(400, message, "InvalidUserInput", code=400)


def _missing(message: str) -> Problem:
    return Problem(404, message, "NotFoundError", code=404)
