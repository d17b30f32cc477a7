"""Runs: warden, at start and once a day. Ranges that are published instead of resolved: GitHub's /meta.

A saved copy counts at once; without one the start waits for the fetch as long as it waits for names. When neither is to
be had the names of the preset still work through the guard, so a failure is a warning.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from initd import github
from initd.core.policy import Feed
from initd.errors import InitdError

if TYPE_CHECKING:
    from initd.core.ruleset import IPNetwork
    from initd.live import Live
    from initd.settings import Settings

FILE = "github-meta.json"
DAY = 24 * 3600.0
RETRY = 300.0


class GithubFeed:
    """Keeps `live.feeds[Feed.GITHUB]` filled while the policy asks for it."""

    def __init__(self, settings: Settings, live: Live) -> None:
        self._path = settings.state_dir / FILE
        self._timeout = settings.resolve_timeout
        self._live = live
        self._fresh = False

    def wanted(self) -> bool:
        """Whether the policy in force uses the feed."""
        return any(rule.feed is Feed.GITHUB for rule in self._live.in_force.policy.feeds)

    async def start(self) -> None:
        """Fill the feed from the saved copy, or else from the network, and put it into force."""
        if not self.wanted():
            return
        try:
            saved = github.load_saved(self._path)
        except InitdError as error:
            self._live.parts.log.warning("feed.unusable", feed="github", reason=error.message)
            saved = None
        if saved is None:
            self._fresh = await self.fetch()
        else:
            await self._put(saved)

    async def keep(self) -> None:
        """Fetch once a day, sooner after a failure; never returns."""
        pause, self._fresh = DAY if self._fresh else 1.0, False
        while True:
            await asyncio.sleep(pause)
            pause = (DAY if await self.fetch() else RETRY) if self.wanted() else RETRY

    async def fetch(self) -> bool:
        """Fetch, check, save and put into force; False with a warning when that failed."""
        log = self._live.parts.log
        try:
            async with asyncio.timeout(self._timeout):
                addresses = await self._live.parts.guard.resolve(github.HOST)
                raw = await asyncio.to_thread(github.fetch_meta, addresses, timeout=self._timeout)
                ranges = github.parse_meta(raw, report=self._skipped)
        except (OSError, InitdError, TimeoutError) as error:
            log.warning("feed.failed", feed="github", reason=str(error) or "no answer in time")
            return False
        try:
            github.save(self._path, raw)
        except OSError as error:
            log.warning("feed.unsaved", feed="github", reason=str(error))
        await self._put(ranges)
        return True

    def _skipped(self, reason: str) -> None:
        self._live.parts.log.warning("feed.skipped", feed="github", reason=reason)

    async def _put(self, ranges: tuple[IPNetwork, ...]) -> None:
        if ranges == self._live.feeds.get(Feed.GITHUB):
            return
        self._live.feeds[Feed.GITHUB] = ranges
        await self._live.refresh()
        self._live.parts.log.info("feed.applied", feed="github", ranges=len(ranges))
