"""Runs: warden, always. Questions to the original resolvers: who is asked, how long, and what counts as an answer.

Every attempt has a UDP socket of its own, connected (so the kernel drops other sources) on a random port, a random id
and random letter case. All attempts of one question stay open until the first good answer or the deadline, so a slow
server is still heard. No task and no future on the UDP path: callbacks only, for the sake of latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from initd.core import wire
from initd.core.dnsfilter import case_mask, mix_case

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from initd.core.dnsfilter import GuardOptions
    from initd.core.ruleset import Endpoint
    from initd.core.throttle import Throttle
    from initd.logs import Log

ATTEMPTS = 4
WAITING = 4096
"""Questions of one lane that may wait for a seat."""

AILING_AFTER = 2
AILING_MOST = 30.0
"""Seconds for which a server that does not answer is asked last."""

RECEIVE = 4096


@dataclass(frozen=True, slots=True)
class ServerStats:
    """One upstream's record; `ailing` means asked last for now."""

    server: str
    asked: int
    answered: int
    timeouts: int
    ailing: bool
    edns: bool
    mixed_case: bool


class Server:
    """An upstream and what was learned about it."""

    __slots__ = (
        "ailing_until", "answered", "asked", "edns", "endpoint", "failures", "family", "mixed_case", "place",
        "timeouts",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.family = socket.AF_INET if endpoint.address.version == 4 else socket.AF_INET6
        self.place = (str(endpoint.address), endpoint.port)
        self.edns = True
        self.mixed_case = True
        self.failures = 0
        self.ailing_until = 0.0
        self.asked = self.answered = self.timeouts = 0

    def failed(self, now: float) -> None:
        """No answer in its time; after the second in a row it is asked last, for longer each time."""
        self.failures += 1
        self.timeouts += 1
        if self.failures >= AILING_AFTER:
            self.ailing_until = now + min(2.0 ** min(self.failures - AILING_AFTER, 10), AILING_MOST)

    def stats(self, now: float) -> ServerStats:
        """As figures."""
        name, port = self.place
        name += "" if port == 53 else f"#{port}"
        ailing = self.ailing_until > now
        return ServerStats(name, self.asked, self.answered, self.timeouts, ailing, self.edns, self.mixed_case)


class Attempt:
    """One message to one server, over UDP; `sock` is None once it is over.

    `edns` and `mixed_case`: how it was asked. What is thought of the server may change while others are on their way.
    """

    __slots__ = ("asked", "edns", "mixed_case", "sent", "server", "sock")

    def __init__(self, server: Server, asked: bytes, sock: socket.socket) -> None:
        self.server = server
        self.edns, self.mixed_case = server.edns, server.mixed_case
        self.asked = asked
        self.sock: socket.socket | None = sock
        self.sent = time.monotonic()


class Lane:
    """Questions of one kind: they begin while fewer than `seats` of all are on their way, else they wait."""

    __slots__ = ("seats", "waiting")

    def __init__(self, seats: int) -> None:
        self.seats = seats
        self.waiting: deque[Question] = deque()


class Question:
    """One name and type on its way to an answer; `done(answer, reason)` is called exactly once.

    `answer` is None when there is none to be had; `reason` then is "timeout", "servfail", "overload", "withdrawn" or
    "stopped".
    """

    __slots__ = (
        "attempts", "deadline", "done", "finished", "literal", "mask", "name", "plan", "refused", "streams", "timer",
        "type",
    )  # fmt: skip

    def __init__(
        self, name: bytes, qtype: int, done: Callable[[wire.Answer | None, str], None], *, literal: bool
    ) -> None:
        self.name = name
        self.literal = literal
        self.type = qtype
        self.mask = case_mask(name)
        self.done = done
        self.attempts: list[Attempt] = []
        self.plan: list[Server] = []
        self.deadline = 0.0
        self.refused: set[Server] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.streams: set[asyncio.Task[None]] = set()
        self.finished = False


class Upstreams:
    """The original resolvers. Not thread-safe; belongs to the running event loop."""

    def __init__(self, endpoints: Iterable[Endpoint], options: GuardOptions, *, log: Log, loud: Throttle) -> None:
        self._within = options.answer_within
        # Whoever owns a zone below a wildcard can leave any number of questions unanswered.
        self._listed, self._others = Lane(options.concurrency), Lane(options.concurrency * 3 // 4)
        self._log = log
        self._loud = loud
        self._active: set[Question] = set()
        self._seating = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._latencies: deque[float] = deque(maxlen=2048)
        self.servers: list[Server] = []
        self.set_endpoints(endpoints)

    def set_endpoints(self, endpoints: Iterable[Endpoint]) -> None:
        """Ask these from now on, in this order; what is known about one that stays is kept."""
        known = {server.endpoint: server for server in self.servers}
        self.servers = [known.get(one) or Server(one) for one in dict.fromkeys(endpoints)]
        for question in self._active:
            question.plan = self._plan()

    def percentiles(self) -> tuple[float, float]:
        """Median and 99th percentile of the latest answers, in milliseconds; zeros before the first."""
        ordered = sorted(self._latencies)
        if not ordered:
            return 0.0, 0.0
        return tuple(round(1000 * ordered[int(part * (len(ordered) - 1))], 3) for part in (0.5, 0.99))  # type: ignore[return-value]

    def ask(self, question: Question) -> None:
        """Begin; `done` may be called before this returns."""
        loop = asyncio.get_running_loop()
        lane = self._listed if question.literal else self._others
        question.deadline = time.monotonic() + self._within
        if len(self._active) < lane.seats:
            self._begin(question)
        elif len(lane.waiting) < WAITING:
            question.timer = loop.call_later(self._within, self._finish, question, None, "timeout")
            lane.waiting.append(question)
        else:
            self._finish(question, None, "overload")

    def withdraw(self, unwanted: Callable[[bytes], bool]) -> None:
        """End each question for an unwanted name, so that nothing more is sent for it."""
        for question in [*self._listed.waiting, *self._others.waiting, *self._active]:  # an end gives its seat away
            if unwanted(question.name):
                self._finish(question, None, "withdrawn")

    async def close(self) -> None:
        """End every question as a failure."""
        for question in [*self._active, *self._listed.waiting, *self._others.waiting]:
            self._finish(question, None, "stopped")
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, question: Question) -> None:
        self._active.add(question)
        question.plan = self._plan()
        if not question.plan:
            self._finish(question, None, "servfail")
            return
        self._next(question)

    def _plan(self) -> list[Server]:
        """Whom to ask for a question, in order; each of them at least once."""
        now = time.monotonic()
        # sorted() is stable: among the healthy the configured order decides, as with resolv.conf(5).
        order = sorted(self.servers, key=lambda server: server.ailing_until if server.ailing_until > now else 0.0)
        return (order * ATTEMPTS)[: max(ATTEMPTS, len(order))]

    def _next(self, question: Question) -> None:
        """Ask the next server of the plan that can be asked at all; give up when there is none."""
        if question.finished:
            return
        if question.timer is not None:
            question.timer.cancel()
        left = question.deadline - time.monotonic()
        while question.plan and left > 0:
            server = question.plan.pop(0)
            if server in question.refused or not self._send(question, server):
                continue
            share = max(self._within / max(ATTEMPTS, len(self.servers)), 0.2)
            wait = left if not question.plan else min(share, left)
            question.timer = asyncio.get_running_loop().call_later(wait, self._late, question)
            return
        if left > 0 and (question.streams or any(attempt.sock for attempt in question.attempts)):
            question.timer = asyncio.get_running_loop().call_later(left, self._late, question)
            return
        self._finish(question, None, "servfail" if question.refused else "timeout")

    def _send(self, question: Question, server: Server) -> bool:
        random = secrets.randbits(8 * len(question.name) + 16)
        name = mix_case(question.name, question.mask, random >> 16) if server.mixed_case else question.name
        asked = wire.build_query(random & 0xFFFF, name, question.type, edns=server.edns)
        sock = None
        try:
            sock = socket.socket(server.family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.connect(server.place)
            sock.send(asked)
            attempt = Attempt(server, asked, sock)
            asyncio.get_running_loop().add_reader(sock.fileno(), self._readable, question, attempt)
        except OSError as error:
            self._unreachable(question, server, error)
            if sock is not None:
                sock.close()
            return False
        question.attempts.append(attempt)
        server.asked += 1
        return True

    def _unreachable(self, question: Question, server: Server, error: OSError) -> None:
        server.failed(time.monotonic())
        question.refused.add(server)
        if self._loud.allows(time.monotonic()):
            self._log.warning("dns.upstream.unreachable", server=server.place[0], error=error.strerror)

    def _late(self, question: Question) -> None:
        now = time.monotonic()
        if question.attempts and question.attempts[-1].sock is not None:
            question.attempts[-1].server.failed(now)
        if now >= question.deadline:
            self._finish(question, None, "timeout")
        else:
            self._next(question)

    def _readable(self, question: Question, attempt: Attempt) -> None:
        """Take what arrived for one attempt; everything that is no answer to it is waited past."""
        if attempt.sock is None:
            return
        try:
            data = attempt.sock.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError as error:  # ICMP unreachable, or our own rules
            self._end(attempt)
            self._unreachable(question, attempt.server, error)
            self._next(question)
            return
        try:
            answer = wire.scan_answer(data, attempt.asked)
        except wire.Malformed:
            answer = None
        if answer is None:
            if attempt.mixed_case and wire.echoes(data, attempt.asked):
                # Not believed: asked again without mixed case, under a new id and port.
                if attempt.server.mixed_case:
                    self._log.warning("dns.upstream.case", server=attempt.server.place[0])
                attempt.server.mixed_case = False
                self._again(question, attempt)
            return
        self._answered(question, attempt, answer)

    def _again(self, question: Question, attempt: Attempt) -> None:
        self._end(attempt)
        question.plan.insert(0, attempt.server)
        self._next(question)

    def _answered(self, question: Question, attempt: Attempt, answer: wire.Answer) -> None:
        server = attempt.server
        self._heard(server, time.monotonic() - attempt.sent)
        if answer.truncated:
            self._end(attempt)
            task = asyncio.get_running_loop().create_task(self._stream(question, server))
            for tasks in (self._tasks, question.streams):
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        elif answer.rcode in (wire.NOERROR, wire.NXDOMAIN):
            self._finish(question, answer, "")
        elif answer.rcode in (wire.FORMERR, wire.NOTIMP) and attempt.edns:
            server.edns = False  # RFC 6891, 7: an old server
            self._again(question, attempt)
        else:
            self._end(attempt)
            question.refused.add(server)
            self._next(question)

    def _heard(self, server: Server, seconds: float) -> None:
        server.answered += 1
        server.failures = 0
        server.ailing_until = 0.0
        self._latencies.append(seconds)

    async def _stream(self, question: Question, server: Server) -> None:
        """The same question over TCP (RFC 7766), within what is left of its time."""
        answer: wire.Answer | None = None
        left = question.deadline - time.monotonic()
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, wire.Malformed):
            async with asyncio.timeout(min(left, self._within / 2)):
                answer = await _ask_stream(server, question)
        question.streams -= {asyncio.current_task()}
        if answer is not None and answer.rcode in (wire.NOERROR, wire.NXDOMAIN):
            self._finish(question, answer, "")
            return
        question.refused.add(server)
        self._next(question)

    def _end(self, attempt: Attempt) -> None:
        if attempt.sock is not None:
            asyncio.get_running_loop().remove_reader(attempt.sock.fileno())
            attempt.sock.close()
            attempt.sock = None

    def _finish(self, question: Question, answer: wire.Answer | None, reason: str) -> None:
        if question.finished:
            return
        question.finished = True
        try:
            question.done(answer, reason)  # before the tidying: somebody waits for it
        finally:
            if question.timer is not None:
                question.timer.cancel()
            for attempt in question.attempts:
                self._end(attempt)
            for task in question.streams - {asyncio.current_task()}:
                task.cancel()
            self._active.discard(question)
            self._seat()

    def _seat(self) -> None:
        """Begin what waits, as far as there are seats; not re-entered, since a question may end while it begins."""
        if self._seating:
            return
        self._seating = True
        try:
            for lane in (self._listed, self._others):
                while lane.waiting and len(self._active) < lane.seats:
                    waiting = lane.waiting.popleft()
                    if not waiting.finished:
                        self._begin(waiting)
        finally:
            self._seating = False


async def _ask_stream(server: Server, question: Question) -> wire.Answer | None:
    asked = wire.build_query(secrets.randbits(16), question.name, question.type, edns=server.edns)
    reader, writer = await asyncio.open_connection(*server.place)
    try:
        writer.write(len(asked).to_bytes(2) + asked)
        while True:
            data = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            answer = wire.scan_answer(data, asked)
            if answer is not None:
                return None if answer.truncated else answer
    finally:
        writer.close()
