"""Runs: `_initd` with NET_ADMIN and NET_RAW, always. The warden's page: from lockdown to serving.

Nothing opens by an error: every step before `armed` either succeeds or ends the warden with its exit code, and the
lockdown stays. A later warden (generation 2 and up) takes over rules that are in force and never locks down again.
"""

from __future__ import annotations

import contextlib
import os
import resource
from typing import TYPE_CHECKING

from initd.enforce import Enforcer
from initd.errors import InitdError
from initd.handover import take_over
from initd.kernel.select import demand, pick
from initd.settings import load

if TYPE_CHECKING:
    from initd.settings import Settings


def main() -> int:
    """Lock down before anything else is imported, read or asked, then serve until told to stop."""
    settings = load(os.environ)
    _make_room()
    try:
        handover = take_over(os.environ)
        backend, probe = pick(settings.backend)
        if not handover.resuming:
            Enforcer(backend).lockdown(os.getuid())
        demand(settings.require, {**probe.capabilities, "dns": handover.resolv is not None})
        # Imports of 150 ms (asyncio, structlog) wait until the box is shut.
        from initd.serve import serve  # noqa: PLC0415

        return serve(settings, handover, backend=backend, probe=probe)
    except InitdError as error:
        _leave_word(settings, error)
        raise


def _make_room() -> None:
    """As many descriptors as we may have: a slow resolver alone can take a thousand, and then nobody could ask us."""
    with contextlib.suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leave_word(settings: Settings, error: InitdError) -> None:
    """Sessions that come too early read here why the box did not start."""
    try:
        (settings.run_dir / "failed").write_text(f"{error}\n", encoding="utf-8")
    except OSError:
        return
