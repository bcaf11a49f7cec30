"""What the HTTP server is told: where it listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from onebase.errors import ConfigError
from onebase.options import require

KEY_VARIABLE = "ONEBASE_API_KEY"


@dataclass(frozen=True)
class Settings:
    """Raises ConfigError where other machines could ask without a key, or a value is out of range."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str = field(default="", repr=False)  # empty: anybody on this machine may ask
    allow_runtime_loading: bool = False
    max_body: int = 1 << 20  # bytes of a request
    body_seconds: float = 30.0  # that a request's body may take to arrive
    refresh: float = 5.0  # seconds between two looks at the adapters folder
    drain: float = 60.0  # seconds that running answers have at shutdown

    def __post_init__(self) -> None:
        require("host", self.host, bool(self.host), "an address or a name")
        require("port", self.port, 0 <= self.port < 1 << 16, "from 0 to 65535")
        require("max_body", self.max_body, self.max_body >= 1, "at least 1 byte")
        for name in ("body_seconds", "refresh", "drain"):
            require(name, getattr(self, name), getattr(self, name) > 0, "more than 0 seconds")
        if not self.api_key and not is_loopback(self.host):
            raise ConfigError(
                f"option host={self.host!r}",
                "other machines could ask without a key",
                hint=f"give --api-key, or set {KEY_VARIABLE}",
            )


def is_loopback(host: str) -> bool:
    """Whether a name or an address, in brackets or not, is this machine's own."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
