"""Runs: warden, always. The warden's side of its channel to the keeper: probes to run, the word to stop."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from typing import TYPE_CHECKING, Any

from initd.errors import EnforcementError
from initd.handover import beat, tell

if TYPE_CHECKING:
    from initd.handover import Handover
    from initd.logs import Log

PROBE_SECONDS = 40.0
"""The keeper bounds a probe to 30 s; then something is wrong with the keeper itself."""

PACKET = 256 * 1024

RECENT = 600.0
"""Seconds for which the end of a warden is worth a warning."""

LOOP, LOOP_SECONDS = 3, 120.0
"""So many ends within so many seconds are a crash loop: the box is then not healthy."""


class Keeping:
    """Sends requests to the keeper and hands its answers to whoever waits for them."""

    def __init__(self, handover: Handover, *, log: Log) -> None:
        self.generation = handover.generation
        self.ended = handover.ended
        self.lost = False
        self.stopping = asyncio.Event()
        self._init = handover.init
        self._channel = handover.keeper
        self._pulse = handover.pulse
        self._log = log
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        asyncio.get_running_loop().add_reader(self._channel, self._receive)

    def recent_ends(self, now: float, *, seconds: float = RECENT) -> list[tuple[float, int]]:
        """Seconds ago and exit code of the wardens that ended lately; `now` is monotonic."""
        return [(now - at, code) for at, code in self.ended if now - at <= seconds]

    def looping(self, now: float) -> bool:
        """Whether wardens end as fast as they are started."""
        return len(self.recent_ends(now, seconds=LOOP_SECONDS)) >= LOOP

    def warnings(self, now: float) -> list[str]:
        """What the operator should know about who keeps whom alive."""
        found = []
        if self.lost:
            found.append("the keeper is gone: rules and guard go on, nobody restarts the warden; restart the box")
        if ends := self.recent_ends(now):
            ago, code = ends[-1]
            found.append(
                f"the warden ended {len(ends)}x lately, {ago:.0f} s ago with exit code {code}; see the box's log"
            )
        return found

    def tell(self, event: str, **fields: Any) -> None:
        """Send one event; losing it is harmless."""
        tell(self._channel, event, **fields)

    def beat(self) -> None:
        """Show that the event loop turns."""
        beat(self._pulse)

    async def probe(self, plan: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Run one probe as the session user; EnforcementError when it could not be run."""
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self.tell("probe", id=number, plan=plan)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                answer = await future
        except TimeoutError as error:
            raise EnforcementError("the verification gave no answer", hint="see the box's log") from error
        finally:
            del self._waiting[number]
        if answer.get("code") != 0 or not isinstance(answer.get("result"), dict):
            raise EnforcementError(f"the verification could not run (exit code {answer.get('code')})")
        result: dict[str, list[dict[str, Any]]] = answer["result"]
        return result

    def _receive(self) -> None:
        try:
            packet = self._channel.recv(PACKET)
        except BlockingIOError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            # The keeper is gone. Rules and guard go on without it; there is nobody left to restart us, or to end us.
            asyncio.get_running_loop().remove_reader(self._channel)
            self.lost = True
            self._log.error("keeper.lost")
            self._end_with_init()
            return
        message = json.loads(packet)
        if message["event"] == "stop":
            self.stopping.set()
        elif message["event"] == "probe" and (future := self._waiting.get(message["id"])) and not future.done():
            future.set_result(message)

    def _end_with_init(self) -> None:
        """A pidfd is readable once its process has ended, and needs no permission over it, pidfd_open(2)."""
        try:
            asyncio.get_running_loop().add_reader(os.pidfd_open(self._init), self.stopping.set)
        except ProcessLookupError:
            self.stopping.set()
