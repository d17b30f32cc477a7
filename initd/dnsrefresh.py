"""Runs: warden, always. Keeps leases alive that no client asks for in time.

Those of literally listed names, for clients that cache longer than the TTL; and those of listed names in /etc/hosts,
which libc reads by itself, without asking.
Each name and type is looked up again between half and eight tenths of its lease, at a random time, a few at once, and
never twice within half a floor; as long as its TTL lasts that renews the lease and asks nobody. One that fails is asked
again later and later, one that has no address any more is left to its clients.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from initd.core.cache import Key
    from initd.core.leases import Terms

CONCURRENCY = 16
LONGEST_PAUSE = 600.0
"""Seconds between tries of a name that does not resolve."""


class Refresher:
    """`ask` looks one key up by the clients' path and says what came by `answered`, `failed` or `forget`."""

    def __init__(self, ask: Callable[[Key], Awaitable[None]], terms: Terms) -> None:
        self._ask = ask
        self._terms = terms
        self._due: dict[Key, float] = {}
        self._failures: dict[Key, int] = {}

    def answered(self, key: Key, ttl: float) -> None:
        """There is an answer with this much of its TTL left, whoever asked."""
        pause = max(self._terms.floor / 2, self._terms.lifetime(ttl) * random.uniform(0.5, 0.8))  # noqa: S311 - spreads load
        self._due[key] = time.monotonic() + pause
        self._failures.pop(key, None)

    def soon(self, key: Key) -> None:
        """Ask at the next turn."""
        self._due[key] = 0.0

    def failed(self, key: Key) -> None:
        """No answer just now."""
        count = self._failures[key] = self._failures.get(key, -1) + 1
        pause = min(max(self._terms.floor / 2, 1.0) * 2.0 ** min(count, 10), LONGEST_PAUSE)
        self._due[key] = time.monotonic() + pause * random.uniform(1.0, 1.2)  # noqa: S311 - spreads load

    def forget(self, key: Key) -> None:
        """Nothing has to be kept."""
        self._due.pop(key, None)
        self._failures.pop(key, None)

    async def run(self) -> None:
        """Until cancelled."""
        tick = min(max(self._terms.floor / 20, 0.1), 5.0)
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            due = iter([key for key, at in self._due.items() if at <= now])
            await asyncio.gather(*(self._work(due) for _ in range(CONCURRENCY)))

    async def _work(self, due: Iterator[Key]) -> None:
        for key in due:
            try:
                await self._ask(key)
            except Exception as error:  # noqa: BLE001 - one name must not end the upkeep of all others
                self.failed(key)
                context = {"message": f"{key!r} cannot be refreshed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
