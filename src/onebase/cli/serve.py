"""`onebase serve`: the base and a folder of adapters behind an HTTP API."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from onebase.cli.configs import ServeConfig
from onebase.config import build
from onebase.errors import OnebaseError
from onebase.models.base import load_base
from onebase.serve.request import Limits
from onebase.web.settings import KEY_VARIABLE, Settings

EXTRA = ("fastapi", "prometheus_client", "uvicorn")


class MissingExtra(OnebaseError, ImportError):
    """A command needs packages that are not installed."""


def run(options: dict[str, Any]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    config = build(ServeConfig, options)
    settings = Settings(
        host=config.host,
        port=config.port,
        api_key=config.api_key or os.environ.get(KEY_VARIABLE, ""),
        allow_runtime_loading=config.allow_runtime_loading,
        max_body=config.max_body,
        refresh=config.refresh,
        drain=config.drain,
    )
    limits = Limits(
        slots=config.slots,
        context=config.context,
        kv_and_adapter_bytes=round(config.memory * 1e9),
        queue=config.queue,
    )
    _require_extra()
    server = importlib.import_module("onebase.web.server")
    server.one_heap()
    adapters = Path(config.adapters).expanduser() if config.adapters else None
    with server.bound(settings) as listener:  # before the base: a port that is taken shows at once
        base = load_base(config.base, config.dtype)
        service = server.open_service(base, adapters, limits, settings, config.weights)
        server.serve(service, listener)
    return 0


def _require_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        found = f"not installed: {', '.join(missing)}"
        raise MissingExtra("onebase serve", found, hint="pip install 'onebase[serve]'")
