"""The lab's resolver: one wildcard socket per family and transport, so that every address of the lab answers DNS.

What an address does is set per address; what a name does is in the zone. Every query is logged before anything
else happens to it, those that are never answered too.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import dns.rdatatype

from tests.support.packets import SO_RCVBUFFORCE
from tests.support.zone import Fault, Reply, Zone

PORT = 53
SPOOF4, SPOOF6 = "203.0.113.66", "2001:db8:2::66"
_LOG_LIMIT = 500_000
_BURST = 64  # datagrams read before other work gets its turn
_ADVERTISED = 1232  # EDNS size (DNS flag day 2020)
_OPT = b"\0" + struct.pack("!HHIH", dns.rdatatype.OPT, _ADVERTISED, 0, 0)
IPV6_RECVPKTINFO, IPV6_PKTINFO, IPV6_FREEBIND, IP_PKTINFO = 49, 50, 78, 8  # linux/in6.h, linux/in.h


class Logged(NamedTuple):
    """One query as it arrived; `at` is monotonic seconds."""

    at: float
    name: str
    type: str
    transport: str
    source: str
    server: str


class Query(NamedTuple):
    """The parts of a query that an answer needs. `limit` is the size an UDP answer may have."""

    id: bytes
    recursion: int
    question: bytes
    name: str
    kind: int
    limit: int
    edns: bool


@dataclass(slots=True)
class Manner:
    """How one server address behaves towards everybody."""

    fault: Fault | None = None
    delay: float = 0.0  # seconds


class DnsServer:
    """Answers from `zone` in the manner set for the address that was asked."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.manners: dict[str, Manner] = {}
        self.latency = 0.0  # seconds, for every answer
        self.log: deque[Logged] = deque(maxlen=_LOG_LIMIT)
        self._keep: list[object] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        for family in (socket.AF_INET, socket.AF_INET6):
            udp = udp_socket(family, PORT)
            loop.add_reader(udp.fileno(), self._readable, udp)
            self._keep.append(udp)
        host = ("0.0.0.0", "::")
        self._keep.append(await asyncio.start_server(self._stream, host, PORT, backlog=512))

    def _readable(self, sock: socket.socket) -> None:
        for _ in range(_BURST):
            try:
                data, ancillary, _, peer = sock.recvmsg(4096, 64)
            except BlockingIOError:
                return
            query = parse(data)
            if query is not None:
                server = packet_destination(ancillary)
                self._note(query, "udp", peer[0], server)
                self._answer_datagram(sock, query, peer, server)

    def _answer_datagram(self, sock: socket.socket, query: Query, peer: tuple[str, int], server: str) -> None:
        reply, fault, delay = self._decide(query, server)
        if fault is Fault.SILENT:
            return
        wire = assemble(query, reply, limit=query.limit, fault=fault)
        source = server
        if fault is Fault.SPOOFED:
            source = SPOOF6 if ":" in server else SPOOF4
        if delay:
            asyncio.get_running_loop().call_later(delay, send_from, sock, wire, peer, source)
        else:
            send_from(sock, wire, peer, source)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server, source = writer.get_extra_info("sockname")[0], writer.get_extra_info("peername")[0]
        pending: set[asyncio.Task[None]] = set()
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(2))
                query = parse(await reader.readexactly(length))
                if query is None:
                    return
                self._note(query, "tcp", source, server)
                reply, fault, delay = self._decide(query, server)
                if fault is Fault.TRUNCATED_DEAD:
                    return
                if fault is not Fault.SILENT:
                    wire = assemble(query, reply, limit=65535, fault=None if fault is Fault.TRUNCATED else fault)
                    task = asyncio.create_task(_write_later(writer, wire, delay))
                    pending.add(task)
                    task.add_done_callback(pending.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            for task in pending:
                task.cancel()
            writer.close()

    def _note(self, query: Query, transport: str, source: str, server: str) -> None:
        kind = dns.rdatatype.to_text(dns.rdatatype.RdataType.make(query.kind))
        self.log.append(Logged(time.monotonic(), query.name, kind, transport, source, server))

    def _decide(self, query: Query, server: str) -> tuple[Reply, Fault | None, float]:
        reply = self.zone.answer(query.name, query.kind)
        manner = self.manners.get(server)
        if manner is None:
            return reply, reply.fault, self.latency + reply.delay
        if manner.fault in {Fault.SERVFAIL, Fault.REFUSED, Fault.NXDOMAIN, Fault.NODATA}:
            rcode = {Fault.SERVFAIL: 2, Fault.REFUSED: 5, Fault.NXDOMAIN: 3, Fault.NODATA: 0}[manner.fault]
            return Reply(rcode, 0, 0, b""), None, self.latency + manner.delay
        return reply, manner.fault or reply.fault, self.latency + manner.delay + reply.delay


async def _write_later(writer: asyncio.StreamWriter, wire: bytes, delay: float) -> None:
    if delay:
        await asyncio.sleep(delay)
    writer.write(len(wire).to_bytes(2) + wire)


def parse(data: bytes) -> Query | None:
    """A query's parts, or None for whatever is not a query with one question."""
    if len(data) < 17 or data[2] & 0x80 or data[4:6] != b"\0\1":
        return None
    end, labels = 12, []
    while end < len(data) and data[end]:
        length = data[end]
        if length > 63:
            return None
        labels.append(data[end + 1 : end + 1 + length])
        end += 1 + length
    end += 5
    if end > len(data):
        return None
    edns = data[10:12] != b"\0\0" and data[end : end + 3] == b"\0\0\x29" and len(data) >= end + 11
    size = int.from_bytes(data[end + 3 : end + 5]) if edns else 512
    name = b".".join(labels).decode("ascii", "backslashreplace").lower()
    kind = int.from_bytes(data[end - 4 : end - 2])
    return Query(data[:2], data[2] & 1, data[12:end], name, kind, max(512, size), edns)


def assemble(query: Query, reply: Reply, *, limit: int, fault: Fault | None) -> bytes:
    """The answer's wire bytes, truncated to `limit` as RFC 2181, 9 says: empty, with TC."""
    answers, authority, body = reply.answers, reply.authority, reply.body
    tail = _OPT if query.edns else b""
    too_long = 12 + len(query.question) + len(body) + len(tail) > limit
    truncated = too_long or fault in {Fault.TRUNCATED, Fault.TRUNCATED_DEAD}
    if truncated:
        answers, authority, body = 0, 0, b""
    flags = 0x8080 | query.recursion << 8 | truncated << 9 | reply.rcode
    question = query.question
    if fault is Fault.WRONG_QUESTION:
        question = b"\x05wrong\x07invalid\0" + question[-4:]
    wire = query.id + struct.pack("!5H", flags, 1, answers, authority, int(query.edns)) + question + body + tail
    if fault is Fault.WRONG_ID:
        return bytes(byte ^ 0xFF for byte in wire[:2]) + wire[2:]
    if fault is Fault.GARBAGE:
        return query.id + bytes(range(255, 215, -1))
    if fault is Fault.CUT:
        return wire[:-3]
    return wire


def udp_socket(family: int, port: int) -> socket.socket:
    """A non-blocking wildcard socket that tells to which address a datagram was sent."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        # A source that is only local by a route counts as foreign (net/ipv6/datagram.c).
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        sock.bind(("::", port))
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.bind(("0.0.0.0", port))
    return sock


def packet_destination(ancillary: list[tuple[int, int, bytes]]) -> str:
    """The address that a datagram was sent to (ip(7) IP_PKTINFO, ipv6(7) IPV6_PKTINFO)."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            return socket.inet_ntop(socket.AF_INET, data[8:12])
        if level == socket.IPPROTO_IPV6 and kind == IPV6_PKTINFO:
            return socket.inet_ntop(socket.AF_INET6, data[:16])
    raise AssertionError("datagram without packet information")


def send_from(sock: socket.socket, wire: bytes, peer: tuple[str, int], source: str) -> None:
    """Send a datagram from an address of choice; one that cannot be sent is lost, as on any network."""
    if ":" in source:
        info = (socket.IPPROTO_IPV6, IPV6_PKTINFO, socket.inet_pton(socket.AF_INET6, source) + b"\0\0\0\0")
    else:
        info = (socket.IPPROTO_IP, IP_PKTINFO, b"\0\0\0\0" + socket.inet_pton(socket.AF_INET, source) + b"\0\0\0\0")
    try:
        sock.sendmsg([wire], [info], 0, peer)
    except OSError:
        return
