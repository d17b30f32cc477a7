"""The control socket's language: newline-framed JSON, at most 64 KiB a message, a closed set of requests.

The privileged side validates: an unknown operation, an unknown or missing field, a wrong type or a frame that is
too long is a `ProtocolError`, answered once, and the connection is closed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 64 * 1024
"""Bytes of one frame, newline included, in either direction."""

OPERATIONS: dict[str, dict[str, type]] = {
    "status": {},
    "health": {},
    "reload": {},
    "verify": {},
    "test": {"target": str},
    "log": {"after": int},
    "why": {"target": str},
    "suggest": {},
    "audit": {"seconds": int},
}
"""Operation → its fields, all of them required."""


class ProtocolError(Exception):
    """A frame that is not one of ours; the text is fit to be sent back."""


@dataclass(frozen=True, slots=True)
class Request:
    """One validated request."""

    op: str
    fields: dict[str, Any]


def parse_request(frame: bytes) -> Request:
    """Exactly one of `OPERATIONS` with exactly its fields, or ProtocolError."""
    if len(frame) > MAX_MESSAGE:
        raise ProtocolError(f"message longer than {MAX_MESSAGE} bytes")
    try:
        data = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("message is not JSON") from error
    if not isinstance(data, dict):
        raise ProtocolError("message is not an object")
    op = data.pop("op", None)
    if not isinstance(op, str) or op not in OPERATIONS:
        raise ProtocolError(f"unknown operation {op!r:.60}; known: {', '.join(OPERATIONS)}")
    fields = OPERATIONS[op]
    if set(data) != set(fields):
        raise ProtocolError(f"{op} takes {', '.join(fields) or 'no fields'}")
    for key, kind in fields.items():
        if not isinstance(data[key], kind):
            raise ProtocolError(f"{op}: {key} must be a {kind.__name__}")
    return Request(op, data)


def frame(message: dict[str, Any]) -> bytes:
    """One message as it goes over the wire. Raises ProtocolError when it would be too long."""
    raw = json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n"
    if len(raw) > MAX_MESSAGE:
        raise ProtocolError(f"answer longer than {MAX_MESSAGE} bytes")
    return raw


def request(op: str, **fields: Any) -> bytes:
    """A request as the client sends it."""
    return frame({"op": op, **fields})


def result(value: dict[str, Any]) -> bytes:
    """The answer to a request that was carried out."""
    return frame({"ok": True, "result": value})


def failure(message: str, *, hint: str | None = None, code: int = 70) -> bytes:
    """The answer to a request that was not; `code` becomes the client's exit code."""
    return frame({"ok": False, "error": {"message": message[:32_000], "hint": hint, "code": code}})
