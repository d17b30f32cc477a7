"""Runs: warden. Audit mode: what is merely unlisted is let through and recorded, for a time that root asked for.

The end is a moment of the monotonic clock, which all processes of a boot share, written down before anything changes:
a warden that restarts takes up what is left, never more. A note that is missing, damaged or somebody else's means that
everything is enforced. No error leads into this mode.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from initd.published import replace

if TYPE_CHECKING:
    from pathlib import Path

    from initd.settings import Settings

FILE = "audit.json"
LONGEST = 86_400
"""Seconds that one request may ask for; INITD_MODE=audit lasts as long as the box."""


@dataclass(frozen=True, slots=True)
class Audit:
    """`until` is monotonic seconds, None for as long as the box runs (INITD_MODE=audit)."""

    until: float | None

    @property
    def end(self) -> float:
        """`until`, infinity without an end."""
        return math.inf if self.until is None else self.until

    def left(self, now: float) -> float | None:
        """Seconds left, never negative; None without an end."""
        return None if self.until is None else max(self.until - now, 0.0)

    def over(self, now: float) -> bool:
        """Whether it has ended."""
        return now >= self.end


def begin(settings: Settings, *, resuming: bool, now: float) -> Audit | None:
    """What a warden starts with. The first of a box goes by the settings, a later one by the note of the one before."""
    wanted = Audit(None) if settings.mode == "audit" else None
    path = settings.run_dir / FILE
    if not resuming:
        try:
            note(path, wanted)
        except OSError:
            return None
        return wanted
    found = _read(path, now)
    if found is not None and found.until is None:
        return wanted
    return found


def note(path: Path, audit: Audit | None) -> None:
    """Write down what holds from now on. Raises OSError."""
    replace(path, json.dumps({"audit": audit is not None, "until": audit and audit.until}))


def _read(path: Path, now: float) -> Audit | None:
    """The note, if it is ours; one that is over tells of connections that are to be closed. None otherwise."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_uid != os.geteuid():
                return None
            data = json.loads(file.read(4096))
        if data["audit"] is not True:
            return None
        if data["until"] is None:
            return Audit(None)
        until = float(data["until"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Audit(until) if until <= now + LONGEST else None
