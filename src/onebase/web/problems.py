"""What went wrong with an HTTP request, as OpenAI's error object; our errors with their status in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from onebase.errors import OnebaseError
from onebase.serve.request import PromptTooLong, QueueFull, UnknownAdapter
from onebase.serve.worker import ShuttingDown


@dataclass(eq=False)
class Problem(Exception):
    """An answer that is an error. `param`: the field it is about; `code`: OpenAI's word for it, vLLM's number."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | int | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    def body(self) -> dict[str, Any]:
        """The error object."""
        inner = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": inner}


class _Row(NamedTuple):
    status: int
    type: str
    param: str | None = None
    code: str | None = None


# The first row that an error is an instance of.
ROWS: dict[type[OnebaseError], _Row] = {
    QueueFull: _Row(429, "rate_limit_error", None, "queue_full"),
    ShuttingDown: _Row(503, "service_unavailable_error", None, "shutting_down"),
    UnknownAdapter: _Row(404, "not_found_error", "model", "model_not_found"),
    PromptTooLong: _Row(400, "invalid_request_error", "prompt", "context_length_exceeded"),
    OnebaseError: _Row(400, "invalid_request_error"),
}

# What an HTTP status alone says.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    503: "service_unavailable_error",
}


def problem_of(error: OnebaseError) -> Problem:
    """An error that a request caused, as the answer to it."""
    row = next(row for kind, row in ROWS.items() if isinstance(error, kind))
    headers = {"Retry-After": str(math.ceil(error.seconds))} if isinstance(error, QueueFull) else {}
    return Problem(row.status, str(error), row.type, row.param, row.code, headers)


def problem_at(status: int, message: str, headers: Mapping[str, str] | None = None) -> Problem:
    """A problem that its HTTP status tells."""
    kind = "server_error" if status == 500 else TYPES.get(status, "invalid_request_error")
    return Problem(status, message, kind, headers=headers or {})
