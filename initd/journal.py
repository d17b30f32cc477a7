"""One log line for the processes that must stay small: PID 1 and the keeper; and how every line of ours is written.

The shape is the warden's (`timestamp`, `level`, `event`, then fields), one JSON object a line, or one line of text
when stderr is a terminal. A line never blocks its writer: when nobody drains the pipe, it is lost.
"""

from __future__ import annotations

import json
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_LEVELS = ("debug", "info", "warning", "error", "critical")
_LIMIT = 4096  # PIPE_BUF: a pipe that polls writable takes this much at once, pipe(7)


_wanted = {"format": "auto", "level": "info"}


def configure(environ: Mapping[str, str]) -> None:
    """Follow INITD_LOG_FORMAT and INITD_LOG_LEVEL of `environ` (`Settings.environ()`)."""
    _wanted["format"] = environ.get("INITD_LOG_FORMAT", "auto")
    _wanted["level"] = environ.get("INITD_LOG_LEVEL", "info")


def say(level: str, event: str, **fields: object) -> None:
    """Write one line to stderr, or lose it when stderr is full or closed."""
    if _LEVELS.index(level) >= _LEVELS.index(_wanted["level"]):
        put(_line(level, event, fields))


def put(text: str) -> None:
    """Write to stderr as much as it takes at once."""
    data = text.encode("utf-8", "replace")
    try:
        while data and _ready():
            data = data[os.write(2, data[:_LIMIT]) :]
    except OSError:
        return


def _ready() -> bool:
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    return any(mask & select.POLLOUT for _, mask in poll.poll(0))


def _line(level: str, event: str, fields: dict[str, object]) -> str:
    if _wanted["format"] == "console" or (_wanted["format"] == "auto" and os.isatty(2)):
        tail = "".join(f" {key}={value}" for key, value in fields.items())
        return f"initd: {event}{tail}\n"
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1e6):06d}Z"
    return json.dumps({"timestamp": stamp, "level": level, "event": event, **fields}) + "\n"
