"""Runs: warden, always. Takes refusals in from the kernel's packet log and from the DNS guard, and keeps them.

Nothing here can refuse or allow anything: when it fails the box goes on, and `fwctl status` says what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from initd.core.events import SUBJECT_LENGTH, Event, Ring, Row, from_dict
from initd.core.policy import Verdict
from initd.core.special import special_of
from initd.core.throttle import Throttle
from initd.errors import InitdError
from initd.kernel.netlink import NetlinkRefusal
from initd.kernel.nflog import PacketLog
from initd.owner import Owners

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from initd.core.leases import Lease
    from initd.core.ruleset import IPAddress
    from initd.dnsguard import Asked
    from initd.kernel.nflog import Packet
    from initd.logs import Log

FILE = "refusals.jsonl"
GROUP = 1
"""The NFLOG group of both backends (docs/architecture.md, "Rules")."""

FILE_MOST = 512 * 1024
"""Bytes; then the file becomes `refusals.jsonl.1`, and the one before goes."""

WRITTEN_AT_ONCE = 200
"""Rows written in one go: what a flood of them may cost the disk."""

GUARD_PORT = 53


@dataclass(frozen=True, slots=True)
class Figures:
    """`lost`: packets that the kernel had logged and could not deliver. `listening`: whether it logs to us at all."""

    packets: int
    questions: int
    lost: int
    listening: bool


class Recorder:
    """The ring, its file, and both sources. `leases_of` says by which names an address was learned."""

    def __init__(self, directory: Path, leases_of: Callable[[IPAddress], Sequence[Lease]], *, log: Log) -> None:
        self.ring = Ring()
        self._path = directory / FILE
        self._leases_of = leases_of
        self._log = log
        self._owners = Owners()
        self._loud = Throttle(10, 20)
        self._packets: PacketLog | None = None
        self._seen = {"packets": 0, "questions": 0}
        self._written = 0
        self._own: frozenset[tuple[str, int | None]] = frozenset()

    def start(self) -> None:
        """Begin to listen to the kernel; without NFLOG refused packets are counted by it and not explained."""
        self.ring.restore(load(self._path))
        self._written = self.ring.number
        try:
            self._packets = PacketLog(GROUP)
        except (InitdError, NetlinkRefusal, OSError) as error:
            self._log.warning("refusals.unseen", group=GROUP, reason=str(error))
            return
        asyncio.get_running_loop().add_reader(self._packets.fileno(), self._readable)

    def stop(self) -> None:
        """Stop listening, write down what is left."""
        if self._packets is not None:
            asyncio.get_running_loop().remove_reader(self._packets.fileno())
            self._packets.close()
            self._packets = None
        with contextlib.suppress(OSError):
            self.write()

    def figures(self) -> Figures:
        """For `fwctl status`."""
        lost = 0 if self._packets is None else self._packets.lost
        return Figures(self._seen["packets"], self._seen["questions"], lost, listening=self._packets is not None)

    def summary(self, now: float) -> dict[str, Any]:
        """The last hour's refusals and its three largest, how much was taken in, and what of it was lost."""
        busy: Counter[tuple[str, int | None]] = Counter()
        for row in reversed(list(self.ring)):  # of equals the newest comes first
            if not row.event.allowed and (count := row.within_hour(now)):
                busy[row.event.subject, row.event.port] += count
        return {
            **asdict(self.figures()),
            "rows": len(self.ring),
            "forgotten": self.ring.forgotten,
            "hour": busy.total(),
            "top": [{"count": count, "subject": name, "port": port} for (name, port), count in busy.most_common(3)],
        }

    @contextlib.contextmanager
    def unrecorded(self, plan: dict[str, Any]) -> Iterator[None]:
        """While a verification runs: what it tries on purpose is nobody's refusal."""
        tried = {(str(host), int(port)) for key in ("connect", "datagram") for host, port in plan[key]}
        self._own = frozenset(tried | {(str(name), None) for _, name in plan["ask"]})
        try:
            yield
        finally:
            self._readable()  # the last of them may still be waiting
            self._own = frozenset()

    def question(self, asked: Asked) -> None:
        """A question that the guard refused, or in audit mode would have; called before it is answered."""
        self._seen["questions"] += 1
        if (asked.name, None) in self._own:
            return
        actor = self._owners.of("tcp" if asked.stream else "udp", *_ends(asked.peer))
        reason = "denied" if asked.verdict is Verdict.DENIED else "unlisted"
        self._note(Event("name", asked.name[:SUBJECT_LENGTH], asked.type, reason, allowed=asked.allowed, actor=actor))

    def stripped(self, name: str, addresses: tuple[IPAddress, ...]) -> None:
        """An upstream's answer about a listed name, without the addresses in special ranges that are not listed."""
        for one in addresses:
            kind = "A" if one.version == 4 else "AAAA"
            self._note(Event("name", name[:SUBJECT_LENGTH], kind, "special", address=str(one)))

    def packet(self, packet: Packet) -> None:
        """A packet that the rules refused, or in audit mode would have."""
        self._seen["packets"] += 1
        address = str(packet.destination)
        kernels = packet.uid is None and packet.proto not in {"tcp", "udp"}  # its multicast reports, for example
        if kernels or (address, packet.dport) in self._own or packet.uid == os.getuid():
            return
        actor = self._owners.of(
            packet.proto, (packet.source, packet.sport or 0), (packet.destination, packet.dport or 0), uid=packet.uid
        )
        leases = self._leases_of(packet.destination)
        lease = next((one for one in leases if one.services), leases[0] if leases else None)
        listed = lease is not None and lease.services
        reason = "special" if special_of(packet.destination) else "port" if listed else "unlisted"
        subject = address if lease is None else lease.name
        allowed = packet.prefix.endswith("audit")
        self._note(
            Event("connection", subject, packet.proto, reason, address, packet.dport, allowed=allowed, actor=actor)
        )

    def write(self) -> None:
        """Append the rows that changed since the last time; raises OSError."""
        rows = self.ring.after(self._written)[-WRITTEN_AT_ONCE:]
        if not rows:
            return
        text = "".join(json.dumps(row.as_dict(), separators=(",", ":")) + "\n" for row in rows)
        append(self._path, text)
        self._written = self.ring.number

    def _note(self, event: Event) -> None:
        row = self.ring.add(event, time.time())
        if row.count == 1 and self._loud.allows(time.monotonic()):
            self._log.info("refused" if not event.allowed else "audit.allowed", **_shown(event))

    def _readable(self) -> None:
        if self._packets is None:
            return
        try:
            for packet in self._packets.read():
                self.packet(packet)
        except OSError as error:
            self._log.error("refusals.unseen", group=GROUP, reason=str(error))
            asyncio.get_running_loop().remove_reader(self._packets.fileno())
            self._packets.close()
            self._packets = None


def _ends(peer: tuple[Any, ...]) -> tuple[tuple[IPAddress, int], tuple[IPAddress, int]]:
    """A client of the guard and the guard's door, which is on the loopback of the same family."""
    near = ip_address(peer[0])
    far = ip_address("127.0.0.1" if near.version == 4 else "::1")
    return (near, peer[1]), (far, GUARD_PORT)


def _shown(event: Event) -> dict[str, Any]:
    actor = event.actor
    every = {
        "subject": event.subject, "address": event.address, "port": event.port, "proto": event.proto,
        "reason": event.reason, "uid": actor.uid, "pid": actor.pid,
    }  # fmt: skip
    return {key: value for key, value in every.items() if value is not None}


def append(path: Path, text: str) -> None:
    """Append, turning the file over at `FILE_MOST` bytes. Sessions may not read it: command lines hold secrets."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size + len(text) > FILE_MOST:
            path.replace(path.with_name(f"{path.name}.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def load(path: Path) -> Iterator[Row]:
    """Rows that a predecessor wrote, oldest first; a line that is none is left out."""
    for one in (path.with_name(f"{path.name}.1"), path):
        try:
            lines = one.read_bytes()[: 2 * FILE_MOST].splitlines()
        except OSError:
            continue
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                yield from_dict(json.loads(line))
