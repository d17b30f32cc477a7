"""Runs: warden, always. The only way for anything in the box to resolve: sockets around `initd.core.dnsfilter`.

An address enters the learned set before the answer that holds it leaves; if it does not enter, the answer is
SERVFAIL. Everything happens on one event loop and `learn` is synchronous, so "before" needs no lock: questions for
the same name and type share one upstream question and are all answered after its insert.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

from initd.core import wire
from initd.core.cache import Cache, Entry, Key
from initd.core.dnsfilter import (
    LOCAL_TTL,
    Decide,
    Fate,
    GuardOptions,
    Judged,
    held_answer,
    judge,
    learnable,
    name_wire,
    screen,
    type_name,
)
from initd.core.leases import Held
from initd.core.policy import Verdict
from initd.core.throttle import Throttle
from initd.dnsfigures import Asked, Counts, GuardStats, ResolveError
from initd.dnslearn import LearnedSet, Learner
from initd.dnslisten import Doors, Port
from initd.dnsrefresh import Refresher
from initd.upstream import Question, Upstreams

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Iterable, Mapping

    from initd.core.ruleset import Element, Endpoint, IPAddress
    from initd.logs import Log

__all__ = ["Asked", "DnsGuard", "GuardOptions", "GuardStats", "ResolveError"]

RECHECK = 10.0
"""Seconds after which a cached answer's addresses are put into the set again, whatever their lease says."""

NEGATIVE_MOST = 60
"""Seconds that an upstream's "no" is believed at most."""

STALE_TTL = 30  # seconds; for an answer out of living leases while no resolver answers (RFC 8767, 4)

JUDGED_MOST = 8192
WAITERS = 1024
"""Clients that may wait for the same answer."""

_REFUSAL = wire.negative_reply(wire.NXDOMAIN)
_EMPTY = wire.negative_reply(wire.NOERROR)
_CARRIED = (wire.TYPE_A, wire.TYPE_AAAA)
_ASKED = (Fate.FORWARD, Fate.HOSTS)


class Failure(NamedTuple):
    """No answer to give."""

    kind: str
    rcode: int = wire.SERVFAIL


Outcome = Entry | Failure


class DnsGuard:
    """`backend` holds the learned set; `decide` is the policy; `options` the rest.

    `on_refused` is told of each question that is refused, before the answer leaves: whoever asked is still there.
    `on_stripped` is told which addresses were kept from an answer.
    """

    def __init__(
        self, *, upstreams: Iterable[Endpoint], decide: Decide, backend: LearnedSet, options: GuardOptions, log: Log
    ) -> None:
        self._loud = Throttle(10, 20)
        self._learner = Learner(backend, options.terms, log=log, loud=self._loud)
        self.leases = self._learner.leases
        self._decide = decide
        self._options = options
        self._terms = options.terms
        self._log = log
        self._upstreams = Upstreams(upstreams, options, log=log, loud=self._loud)
        self._cache = Cache(options.cache)
        self._judged: dict[bytes, Judged] = {}
        self._generation = 0
        self._pending: dict[Key, list[Callable[[Outcome], None]]] = {}
        self._doors = Doors()
        self._refresher = Refresher(self._refresh, options.terms)
        self._refreshing: asyncio.Task[None] | None = None
        self._counts = Counts()
        self.on_refused: Callable[[Asked], None] = _nobody
        self.on_stripped: Callable[[str, tuple[IPAddress, ...]], None] = _nobody

    async def start(self, sockets: Mapping[str, socket.socket]) -> None:
        """Serve on the keeper's sockets (dns4-udp, dns4-tcp, dns6-udp, dns6-tcp; others are left alone)."""
        await self._doors.open([sock for name, sock in sockets.items() if name.startswith("dns")], self.answer)
        self._take_hosts()
        self._refreshing = asyncio.get_running_loop().create_task(self._refresher.run())

    async def stop(self) -> None:
        """Stop serving; leases and learned addresses stay."""
        self._doors.close()
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await self._upstreams.close()

    def set_upstreams(self, endpoints: Iterable[Endpoint]) -> None:
        """Ask these from now on."""
        self._upstreams.set_endpoints(endpoints)

    def set_policy(self, decide: Decide, *, options: GuardOptions | None = None) -> tuple[Element, ...]:
        """Judge by this from now on, learned addresses too; returns elements that were forgotten, to be cut as well.

        Answers from the cache are judged again when they are next asked for; what is being asked upstream and is not
        listed any more ends now. `options.terms`, `cache`, `concurrency` and `answer_within` stay as they were.
        """
        self._decide = decide
        if options is not None:
            self._options = options
            self._cache.clear()
        self._judged.clear()
        self._generation += 1
        self._upstreams.withdraw(lambda name: self._judge(name).fate not in _ASKED)
        self._take_hosts()
        return self._learner.reconsider(lambda name, address: self._held_by(name, address).services)

    def _take_hosts(self) -> None:
        """Learn what /etc/hosts says about listed names: libc reads it before it asks anybody."""
        for name in self._options.local_names:
            with contextlib.suppress(ValueError):
                packed = name_wire(name)
                if self._judge(packed).fate is Fate.HOSTS:
                    for qtype in _CARRIED:
                        self._refresher.soon((packed, qtype))

    def sweep(self, in_use: Collection[IPAddress]) -> None:
        """Keep the leases of addresses with open connections, end those that are over; call it every `Terms.sweep`."""
        self._learner.sweep(in_use)

    def restore(self, saved: Mapping[str, Mapping[IPAddress, int]], *, elapsed: float, least: float = 0.0) -> int:
        """Take up saved leases (`core.leases.from_state`) `elapsed` seconds later; returns how many addresses.

        One that is over gets `least` seconds, or is left out when that is 0.
        """
        return self._learner.restore(saved, self._held_by, elapsed=elapsed, least=least)

    async def resolve(self, name: str) -> tuple[IPAddress, ...]:
        """A and AAAA by the clients' path: learned before this returns. Raises ResolveError."""
        try:
            packed = name_wire(name.lower().removesuffix("."))
        except ValueError:
            raise ResolveError(name, "refused") from None
        judged = self._judge(packed)
        if judged.fate is Fate.OWN:
            return judged.addresses
        if judged.fate not in _ASKED:
            raise ResolveError(name, "refused")
        outcomes = await asyncio.gather(*(self._outcome((packed, qtype)) for qtype in _CARRIED))
        entries = [one for one in outcomes if isinstance(one, Entry)]
        addresses = tuple(ip_address(packed) for entry in entries for packed in entry.reply.addresses())
        if addresses:
            return addresses
        failures = [one.kind for one in outcomes if isinstance(one, Failure)]
        if failures:
            raise ResolveError(name, failures[0])
        missing = any(entry.reply.rcode == wire.NXDOMAIN for entry in entries)
        raise ResolveError(name, "nxdomain" if missing else "empty")

    def stats(self) -> GuardStats:
        """Figures for `fwctl status`."""
        now = time.monotonic()
        p50, p99 = self._upstreams.percentiles()
        return GuardStats(
            replace(self._counts),
            insert_failures=self._learner.failures,
            upstream_p50=p50,
            upstream_p99=p99,
            leases=len(self.leases),
            cached=len(self._cache),
            pending=len(self._pending),
            upstreams=tuple(server.stats(now) for server in self._upstreams.servers),
        )

    def answer(self, data: bytes, port: Port, peer: Any) -> bytes | None:
        """What to send for one message now; None when the answer comes later through `port.send`, or never."""
        self._counts.queries += 1
        try:
            query = wire.scan_query(data)
            entry = self._cache.find((query.name, query.type))
            now = time.monotonic()
            if entry is not None and entry.expires > now < entry.check and entry.generation == self._generation:
                self._counts.from_cache += 1
                return wire.render(data, query, entry.reply, math.ceil(entry.expires - now), stream=port.stream)
            return self._consider(data, query, port, peer)
        except wire.Rejected as rejected:
            self._counts.malformed += 1
            return wire.render_rejection(data, rejected)
        except Exception:  # noqa: BLE001 - one message must not end the guard
            self._log.exception("dns.bug", query=data[:64].hex())
            return wire.render_rejection(data, wire.Rejected(wire.SERVFAIL))

    def _consider(self, data: bytes, query: wire.Query, port: Port, peer: Any) -> bytes | None:
        judged = self._judge(query.name)
        if judged.fate is Fate.REFUSE:
            self._counts.refused += 1
            self.on_refused(Asked(judged.name, type_name(query.type), judged.decision.verdict, peer, port.stream))
            return wire.render(data, query, _REFUSAL, wire.NEGATIVE_TTL, stream=port.stream)
        if judged.fate is Fate.EMPTY or query.type not in _CARRIED:
            return wire.render(data, query, _EMPTY, wire.NEGATIVE_TTL, stream=port.stream)
        if judged.fate is Fate.OWN:
            width = 4 if query.type == wire.TYPE_A else 16
            own = tuple(one.packed for one in judged.addresses if len(one.packed) == width)
            reply = wire.address_reply(query.name, query.type, (), own) if own else _EMPTY
            return wire.render(data, query, reply, LOCAL_TTL, stream=port.stream)
        if judged.fate is Fate.FORWARD and judged.decision.verdict is not Verdict.LISTED:
            asked = Asked(judged.name, type_name(query.type), judged.decision.verdict, peer, port.stream, allowed=True)
            self.on_refused(asked)
        waiting = data[: query.end]  # an answer repeats no more of it, and thousands may have to wait
        outcome = self._want((query.name, query.type), judged, partial(_deliver, waiting, query, port, peer))
        return None if outcome is None else _rendered(data, query, port, outcome)

    def _judge(self, name: bytes) -> Judged:
        judged = self._judged.get(name)
        if judged is None:
            if len(self._judged) >= JUDGED_MOST:
                self._judged.clear()
            judged = self._judged[name] = judge(name, self._decide, self._options)
        return judged

    def _held_by(self, name: str, address: IPAddress) -> Held:
        """What `name` may open at `address` under the policy in force."""
        with contextlib.suppress(ValueError):
            judged = self._judge(name_wire(name))
            if judged.fate in _ASKED and learnable(address.packed, judged):
                return judged.holding((address,))
        return Held(name, (address,), frozenset(), literal=False)

    def _want(self, key: Key, judged: Judged, wait: Callable[[Outcome], None]) -> Outcome | None:
        """The outcome when it is known now; otherwise None, and `wait` is called with it once it is."""
        now = time.monotonic()
        entry = self._cache.find(key)
        if entry is not None and entry.expires > now:
            unchanged = entry.generation == self._generation
            if unchanged or (entry.plain and judged.same_as(entry.judged)):
                self._counts.from_cache += 1
                entry.judged = judged
                return entry if (unchanged and now < entry.check) or self._admit(entry, now) else Failure("insert")
            self._cache.drop(key)
        if judged.fate is Fate.HOSTS:
            return self._accept(key, judged, held_answer(judged.addresses, key[1], LOCAL_TTL))
        waiting = self._pending.get(key)
        if waiting is not None:
            if len(waiting) >= WAITERS:
                return Failure("overload")
            waiting.append(wait)
            return None
        self._counts.forwarded += 1
        self._pending[key] = [wait]
        self._upstreams.ask(Question(*key, partial(self._arrived, key), literal=judged.decision.literal))
        return None

    def _arrived(self, key: Key, answer: wire.Answer | None, reason: str) -> None:
        outcome: Outcome = Failure("bug")
        try:
            outcome = self._judge_arrival(key, answer, reason)
        finally:
            for wait in self._pending.pop(key):
                wait(outcome)

    def _judge_arrival(self, key: Key, answer: wire.Answer | None, reason: str) -> Outcome:
        judged = self._judge(key[0])  # the policy may have changed since it was asked
        if judged.fate not in _ASKED:
            return Failure("refused", wire.NXDOMAIN)
        if answer is not None:
            outcome = self._accept(key, judged, answer)
            if isinstance(outcome, Entry):
                self.leases.answered(judged.name, 4 if key[1] == wire.TYPE_A else 6, outcome.learned)
            return outcome
        self._counts.failed += 1
        if self._loud.allows(time.monotonic()):
            self._log.warning("dns.failed", name=judged.name, type=type_name(key[1]), reason=reason)
        if held := self.leases.last_answer(judged.name):
            self._counts.stale += 1
            return self._accept(key, judged, held_answer(held, key[1], STALE_TTL))
        return Failure(reason)

    def _accept(self, key: Key, judged: Judged, answer: wire.Answer) -> Outcome:
        """Learn what `answer` holds, then make it an entry; a Failure when the kernel does not take it."""
        now = time.monotonic()
        addresses = answer.addresses[: self._terms.cap] if answer.rcode == wire.NOERROR else ()
        screened = screen(addresses, judged, self._options)
        self._note(judged, answer, screened.stripped)
        ttl = answer.ttl
        if screened.passed:
            reply = wire.address_reply(*key, answer.chain, screened.passed)
        else:
            # NXDOMAIN for one type although the other has addresses: some forwarders do, and musl then gives up.
            exists = answer.rcode == wire.NOERROR or self.leases.addresses_of(judged.name)
            reply, ttl = _EMPTY if exists else _REFUSAL, min(ttl, NEGATIVE_MOST)
        entry = Entry(reply, judged, screened.learned, now + ttl)
        entry.plain = len(screened.learned) == len(addresses)
        if not self._admit(entry, now):
            return Failure("insert")
        if ttl:
            self._cache.put(key, entry)
        self._keep(key, entry, now)
        return entry

    def _keep(self, key: Key, entry: Entry, now: float) -> None:
        """Look it up again in time, if there is an address of that kind to be kept."""
        leased = held_answer(self.leases.addresses_of(entry.judged.name), key[1], 0).addresses
        if leased and _kept(entry.judged):
            self._refresher.answered(key, max(entry.expires - now, 0.0))
        else:
            self._refresher.forget(key)

    def _note(self, judged: Judged, answer: wire.Answer, stripped: tuple[IPAddress, ...]) -> None:
        self._counts.stripped += len(stripped)
        self._counts.stray += answer.stray
        if stripped:
            self.on_stripped(judged.name, stripped)
        if (stripped or answer.stray) and self._loud.allows(time.monotonic()):
            shown = [str(one) for one in stripped[:8]]
            self._log.warning("dns.stripped", name=judged.name, addresses=shown, stray=answer.stray)

    def _admit(self, entry: Entry, now: float) -> bool:
        """Put the addresses of `entry` into the set for max(remaining TTL, floor) + grace, and note it.

        Until `entry.check` the cached answer may leave without asking the kernel: its addresses then still have at
        least the remaining TTL and a grace, and at least the floor and half a grace.
        """
        left = max(entry.expires - now, 0.0)
        if entry.learned:
            held = entry.judged.holding(entry.learned)
            done = self._learner.hold(held, lifetime=self._terms.lifetime(left), now=now)
            if done is None:  # the name is over its cap: an older answer's addresses may be gone
                for qtype in _CARRIED:
                    self._cache.drop((name_wire(held.name), qtype))
            elif not done:
                return False
        entry.check = now + min(RECHECK, max(left - self._terms.floor, 0.0) + self._terms.grace / 2)
        entry.generation = self._generation
        return True

    async def _outcome(self, key: Key) -> Outcome:
        """`_want` for those who can await."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        judged = self._judge(key[0])
        outcome = self._want(key, judged, lambda late: None if future.done() else future.set_result(late))
        if outcome is None:
            outcome = await future
        if isinstance(outcome, Failure) and _kept(judged):
            self._refresher.failed(key)
        return outcome

    async def _refresh(self, key: Key) -> None:
        if not _kept(self._judge(key[0])):
            self._refresher.forget(key)
        elif isinstance(outcome := await self._outcome(key), Entry):
            self._keep(key, outcome, time.monotonic())


def _kept(judged: Judged) -> bool:
    """Whether the guard keeps asking for the name by itself."""
    return judged.fate is Fate.HOSTS or (judged.fate is Fate.FORWARD and judged.decision.literal)


def _nobody(*_: object) -> None:
    """Nobody wants to know."""


def _rendered(data: bytes, query: wire.Query, port: Port, outcome: Outcome) -> bytes:
    if isinstance(outcome, Failure):
        return wire.render(data, query, wire.Reply(outcome.rcode), 0, stream=port.stream)
    left = max(outcome.expires - time.monotonic(), 0.0)
    return wire.render(data, query, outcome.reply, math.ceil(left), stream=port.stream)


def _deliver(data: bytes, query: wire.Query, port: Port, peer: Any, outcome: Outcome) -> None:
    port.send(_rendered(data, query, port, outcome), peer)
