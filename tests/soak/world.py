"""What the soak's internet holds, what is listed when, and the judgement of packets, questions and attempts.

Pure: times come as arguments, monotonic seconds of one clock (namespaces share it).
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from initd.dnsguard import STALE_TTL
from tests.support.remote import RESOLVER4, SILENT4, THIRD4
from tests.support.zone import Entry

if TYPE_CHECKING:
    from tests.support.attempts import Attempt, Target
    from tests.support.dns_server import Logged
    from tests.support.packets import Packet

SITE, WILD, PORTS, ROTATING, DOWNLOADS = (
    "site.example", "wild.example", "ports.example", "rot.example", "cdn.example"
)  # fmt: skip
RANGE, IN_RANGE = "203.0.113.64/28", "203.0.113.70"
UNLISTED, UNLISTED4, UNLISTED6 = "unlisted.example", "203.0.113.240", "2001:db8:2::240"
POOL = tuple(f"n{number:02}.pool.example" for number in range(24))
ROTATION = tuple((f"203.0.113.{100 + n}", f"2001:db8:2:2::{n + 1:x}") for n in range(20))
DOWNLOAD_ROTATION = tuple(f"203.0.113.{160 + n}" for n in range(8))
WEB = frozenset({443, 80, 22})

FLOOR, GRACE = 3, 3  # INITD_DNS_FLOOR and INITD_DNS_GRACE: learned addresses are to expire during the run
RETIRED = 60.0
"""Seconds after which an address that a name has left must be refused: TTL, floor, grace, two sweeps and a margin."""

STALE = STALE_TTL
"""Seconds for which the guard gives its last answer again, and asks nobody, when no resolver answered (RFC 8767)."""

MARGIN = 0.5
"""Seconds within which a packet counts as sent before a change: time stamps are taken at the far end of the cable."""

SETTLE = 6.0
"""Seconds after a resolver came back, for which no failure counts: the guard may still wait for old questions."""

LATE = frozenset({"TIMEOUT", "EAI_AGAIN"})
"""Outcomes that a loaded machine may cause, too; they are tried again, and count when they happen RETRIES times."""

RETRIES = 3

ALWAYS_REFUSED: tuple[Target, ...] = (
    ("tcp", UNLISTED, 443),
    ("tcp", UNLISTED4, 443),
    ("tcp", UNLISTED6, 80),
    ("udp", UNLISTED4, 443),
    ("tcp", SITE, 8443),
    ("tcp", PORTS, 443),
    ("tcp", IN_RANGE, 80),
    ("tcp", "169.254.169.254", 80),
    ("tcp", "10.9.9.9", 443),
    ("tcp", "fd00:9::9", 443),
    ("udp", SILENT4, 53),
    ("tcp", RESOLVER4, 443),
    ("tcp", WILD, 443),
)
ALWAYS_LISTED: tuple[Target, ...] = (
    ("tcp", SITE, 443), ("tcp", SITE, 80), ("tcp", PORTS, 8443), ("tcp", IN_RANGE, 443), ("tcp", ROTATING, 443),
    ("tcp", DOWNLOADS, 443),
)  # fmt: skip


@dataclass(slots=True)
class Spans:
    """Stretches of time, in order; the last one may be open."""

    spans: list[list[float]] = field(default_factory=list)

    def begin(self, at: float) -> None:
        if not self.open:
            self.spans.append([at, math.inf])

    def end(self, at: float) -> None:
        if self.open:
            self.spans[-1][1] = at

    @property
    def open(self) -> bool:
        return bool(self.spans) and self.spans[-1][1] == math.inf

    def cover(self, begin: float, end: float) -> bool:
        """Whether one stretch holds all of it."""
        return any(first <= begin and end <= last for first, last in reversed(self.spans))

    def touch(self, begin: float, end: float) -> bool:
        """Whether any stretch holds a part of it."""
        return any(first <= end and begin <= last for first, last in reversed(self.spans))


def entries() -> list[Entry]:
    """All of the zone that does not change."""
    pool = [
        Entry(name, {"A": (f"203.0.113.{128 + n}",), "AAAA": (f"2001:db8:2:1::{n + 1:x}",)}, ttl=5)
        for n, name in enumerate(POOL)
    ]
    return [
        *pool,
        Entry(f"*.{WILD}", {"A": ("203.0.113.90",)}, ttl=5),
        Entry(PORTS, {"A": ("203.0.113.91",)}, ttl=5),
        Entry(UNLISTED, {"A": (UNLISTED4,), "AAAA": (UNLISTED6,)}),
        Entry(WILD, {"A": (UNLISTED4,)}),
    ]


def policy(pool: set[str]) -> str:
    """The policy file with these names of the pool."""
    return "\n".join([SITE, f"*.{WILD}", f"{PORTS}:8443", f"{RANGE}:443", ROTATING, DOWNLOADS, *sorted(pool)]) + "\n"


class History:
    """What was true when. Only the thread that changes things writes here; judging comes afterwards.

    `surely` and `maybe` are, for each name of the pool, when it was certainly listed and when it may have been: between
    them lies the reload. `dns_bad` is when no resolver answered properly.
    """

    def __init__(self) -> None:
        self.surely = {name: Spans() for name in POOL}
        self.maybe = {name: Spans() for name in POOL}
        self.dns_bad = Spans()
        self.given: dict[str, Spans] = {}  # rotating address → when DNS gave it
        self._owner = {f"203.0.113.{128 + n}": name for n, name in enumerate(POOL)}
        self._owner |= {f"2001:db8:2:1::{n + 1:x}": name for n, name in enumerate(POOL)}

    def listed(self, pool: set[str], at: float, *, done: bool) -> None:
        """A reload towards `pool` begins (`done` False) or has succeeded."""
        for name in POOL:
            if done and name in pool:
                self.surely[name].begin(at)
            elif done:
                self.maybe[name].end(at)
            elif name in pool:
                self.maybe[name].begin(at)
            else:
                self.surely[name].end(at)

    def give(self, addresses: set[str], at: float, *, among: tuple[str, ...]) -> None:
        """From now on DNS gives `addresses` and no other of `among`."""
        for address in among:
            spans = self.given.setdefault(address, Spans())
            (spans.begin if address in addresses else spans.end)(at)

    def leak(self, packet: Packet) -> str | None:
        """Why a packet should not have left the box, or None."""
        where = f"{packet.proto} to {packet.dst} port {packet.dport} ({packet.flags})"
        service = packet.proto == "tcp" and packet.dport
        if packet.dst in {RESOLVER4, THIRD4}:
            # An answer that finds no socket any more is told so by the kernel (RFC 1122, 3.2.2.1), never by a session.
            unreachable = (packet.proto, packet.kind) in {("icmp", 3), ("icmp6", 1)}
            asking = packet.dport == 53 and packet.proto in {"udp", "tcp"}
            return None if asking or unreachable else f"{where}: a resolver"
        if packet.dst in {"203.0.113.10", "2001:db8:2::10", "203.0.113.90"} and service in WEB:
            return None
        if packet.dst == "203.0.113.91" and service == 8443:
            return None
        if packet.dst in DOWNLOAD_ROTATION and service in WEB:
            return None  # kept while a download from it goes on
        if ":" not in packet.dst and ipaddress.ip_address(packet.dst) in ipaddress.ip_network(RANGE) and service == 443:
            return None
        if packet.dst in self.given and service in WEB:
            recent = packet.at <= self._answered_until(packet.dst, packet.at) + RETIRED
            return None if recent else f"{where}: DNS gave it {RETIRED:.0f} s ago or never"
        if packet.dst in self._owner and service in WEB:
            name = self._owner[packet.dst]
            listed = self.maybe[name].touch(packet.at - MARGIN, packet.at + MARGIN)
            return None if listed else f"{where}: {name} was not listed"
        return f"{where}: unlisted"

    def _answered_until(self, address: str, at: float) -> float:
        """When the guard can have answered with a rotating address last, as far as was known `at` that time.

        An outage that begins before it has asked again prolongs its last answer, and the next one may do so again.
        """
        until = max((min(end, at) for begin, end in self.given[address].spans if begin <= at), default=-math.inf)
        for begin, end in self.dns_bad.spans:
            if begin <= min(until + SETTLE, at):
                until = max(until, min(end, at) + STALE)
        return until

    def leaked_question(self, query: Logged) -> str | None:
        """Why a question should not have gone upstream, or None."""
        if query.name in {SITE, PORTS, ROTATING, DOWNLOADS} or query.name.endswith(f".{WILD}"):
            return None
        if query.name in self.maybe and self.maybe[query.name].touch(query.at - MARGIN, query.at + MARGIN):
            return None
        return f"DNS question for {query.name} {query.type}: not listed"

    def expected(self, target: Target, begin: float, end: float) -> bool | None:
        """Whether an attempt in that time had to succeed (True), to fail (False), or may do either (None)."""
        name = target[1]
        if target in ALWAYS_REFUSED:
            return False
        if name in self.surely:
            if not self.maybe[name].touch(begin, end):
                return False
            if not self.surely[name].cover(begin, end):
                return None
        if name != IN_RANGE and self.dns_bad.touch(begin - SETTLE, end):
            return None
        return True

    def wrong(self, target: Target, outcome: Attempt, *, begin: float, end: float) -> str | None:
        """What was wrong with an attempt, or None. A late one is wrong here, too; whoever asks tries again."""
        expected = self.expected(target, begin, end)
        if expected is True and outcome.error is not None:
            return f"refused although listed: {' '.join(map(str, target))}: {outcome.error} after {outcome.ms:.0f} ms"
        if expected is False and outcome.error is None:
            return f"answered although not listed: {' '.join(map(str, target))} from {outcome.address}"
        return None
