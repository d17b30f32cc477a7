"""Runs: warden, always. The duties that recur: heartbeat, leases of open connections, resolv.conf, saved state."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from initd import feeds, metrics
from initd.errors import InitdError
from initd.kernel import conntrack
from initd.published import replace
from initd.resolve import sweep_pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from initd.core.ruleset import Endpoint, IPAddress
    from initd.feeds import GithubFeed
    from initd.keeping import Keeping
    from initd.live import Live
    from initd.operations import Operations
    from initd.resolvconf import ResolvConf
    from initd.settings import Settings

HEARTBEAT = 5.0
"""Seconds between signs of life; the keeper waits for four of them."""

AUDIT = 0.5
"""Seconds until the next end of audit mode is waited for. One that failed is made up for by `_recheck`; the kernel has
ended it anyway (`Ruleset.audit`)."""

METRICS = 15.0
"""Seconds between two writings of the metrics file: Prometheus' usual scrape interval."""

RECHECK = 60.0
"""Seconds between comparisons of the kernel's rules with what was written."""

SAVE = 2.0
"""Seconds between looks whether anything is worth writing down."""

SAVING, SAVE_LATEST = 0.02, 30.0
"""Share of the time that writing it down may take, and seconds that it may be put off for that.

40,000 leases are 0.2 s, and some of so many is always being refreshed.
"""


class Upkeep:
    """The warden's recurring duties; `run` returns when the keeper says stop."""

    def __init__(
        self, settings: Settings, live: Live, resolv: ResolvConf, keeping: Keeping, operations: Operations
    ) -> None:
        self._settings = settings
        self._live = live
        self._resolv = resolv
        self._keeping = keeping
        self._operations = operations
        self._written: object = None
        self._upstreams = resolv.upstreams  # those that rules and guard have been told of

    async def run(self, feed: GithubFeed) -> None:
        """Do them all until told to stop. A duty that fails says so and is tried again at its next turn."""
        duties = [
            asyncio.create_task(self._every(feeds.RETRY, feed.keep)),
            asyncio.create_task(self._every(HEARTBEAT, self._heartbeat)),
            asyncio.create_task(self._every(sweep_pause(self._settings), self._sweep)),
            asyncio.create_task(self._every(sweep_pause(self._settings), self._resolvers)),
            asyncio.create_task(self._every(SAVE, self._save)),
            asyncio.create_task(self._every(SAVE, self._record)),
            asyncio.create_task(self._every(RECHECK, self._recheck, first=RECHECK)),
            asyncio.create_task(self._every(AUDIT, self._end_audit)),
            *([asyncio.create_task(self._every(METRICS, self._metrics))] if self._settings.metrics_file else []),
        ]
        try:
            await self._keeping.stopping.wait()
        finally:
            for duty in duties:
                duty.cancel()
            await asyncio.gather(*duties, return_exceptions=True)
        await self._live.try_to_write_down()

    async def _every(self, seconds: float, duty: Callable[[], Awaitable[None]], *, first: float = 0.0) -> None:
        """`duty` for ever. What fails in the same way again is not told again: it may be a full disk."""
        told = ""
        await asyncio.sleep(first)
        while True:
            try:
                await duty()
                told = ""
            except Exception as error:  # noqa: BLE001 - one failure must not end a duty
                if repr(error) != told:
                    log, known = self._live.parts.log, isinstance(error, (InitdError, OSError))
                    (log.warning if known else log.exception)("upkeep.failed", duty=duty.__name__, reason=str(error))
                told = repr(error)
            await asyncio.sleep(seconds)

    async def _recheck(self) -> None:
        await self._live.recheck()

    async def _heartbeat(self) -> None:
        self._keeping.beat()

    async def _sweep(self) -> None:
        in_use: set[IPAddress] = set()
        try:
            in_use = {address for address, _, _ in await self._live.in_worker(conntrack.destinations)}
        finally:  # leases end also where connections cannot be seen
            self._live.parts.guard.sweep(in_use)

    async def _resolvers(self) -> None:
        """Follow resolv.conf; a change that could not be put into force is tried again at the next turn."""
        self._resolv.check()
        if (upstreams := self._resolv.upstreams) != self._upstreams:
            await self._permit({*self._upstreams, *upstreams})  # the guard must never ask where it may not go
            self._live.parts.guard.set_upstreams(upstreams)
            await self._permit(upstreams)
            self._upstreams = upstreams

    async def _permit(self, upstreams: Iterable[Endpoint]) -> None:
        self._live.upstreams = frozenset(upstreams)
        await self._live.refresh()

    async def _end_audit(self) -> None:
        await self._live.audit_is_over()
        await self._live.set_audit(None)

    async def _record(self) -> None:
        self._operations.recorder.write()

    async def _metrics(self) -> None:
        figures = metrics.text(await self._operations.figures()) + "\n"
        await asyncio.to_thread(replace, Path(self._settings.metrics_file), figures)

    async def _save(self) -> None:
        """Write the state for people and for the next warden, when anything but the passing of time changed it."""
        live = self._live
        guard = live.parts.guard
        mark = (live.in_force, dict(live.feeds), live.upstreams, guard.stats().counts.forwarded, len(guard.leases))
        if mark == self._written:
            return
        began = time.monotonic()
        await live.write_down()
        live.unwritten = None
        self._written = mark
        await asyncio.sleep(min((time.monotonic() - began) / SAVING, SAVE_LATEST))
