"""Runs: anybody, on demand. One question to the warden over its socket, for every command of `fwctl`."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from initd.core import messages
from initd.errors import ConfigError, InitdError

TIMEOUT = 60.0
"""Seconds that the warden may take for one answer; a reload resolves names, a verification waits for time-outs."""


class UnavailableError(InitdError):
    """No warden answers here (EX_UNAVAILABLE)."""

    code = 69


def run_dir() -> Path:
    """Where the box of this mount namespace has its socket."""
    return Path(os.environ.get("INITD_RUN_DIR") or "/run/initd")


def ask(op: str, **fields: Any) -> dict[str, Any]:
    """One request to the warden. Raises UnavailableError, or the error that the warden answered with."""
    path = run_dir() / "control.sock"
    try:
        request = messages.request(op, **fields)
    except messages.ProtocolError as error:
        raise ConfigError(str(error)) from error
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(path))
            sock.sendall(request)
            with sock.makefile("rb") as lines:
                line = lines.readline(messages.MAX_ANSWER + 1)
        answer = json.loads(line)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise UnavailableError(f"no box is running here ({path})", hint=_why_not(path.parent)) from error
    except TimeoutError as error:
        hint = _restarting(path.parent) or "see the box's log"
        raise UnavailableError(f"the warden did not answer within {TIMEOUT:.0f} s", hint=hint) from error
    except (OSError, ValueError) as error:
        hint = _restarting(path.parent) or "it may be restarting: try again, and see the box's log"
        ended = isinstance(error, (ConnectionError, ValueError))
        reason = "it closed the connection" if ended else str(error)
        raise UnavailableError(f"no answer from the warden: {reason}", hint=hint) from error
    if answer["ok"]:
        return dict(answer["result"])
    failure = InitdError(answer["error"]["message"], hint=answer["error"]["hint"])
    failure.code = answer["error"]["code"]
    raise failure


def _restarting(place: Path) -> str | None:
    """What the keeper says about a warden that it has to start again."""
    try:
        return f"{(place / 'restarting').read_text(encoding='utf-8').strip()}; see the box's log"
    except OSError:
        return None


def _why_not(place: Path) -> str:
    try:
        return f"the start failed: {(place / 'failed').read_text(encoding='utf-8').strip()}"
    except OSError:
        return "start it with `docker compose up -d`, and see `docker compose logs` if it does not stay up"
