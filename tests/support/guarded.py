"""A DNS guard on loopback with an upstream that does as it is told: real sockets, one event loop, no root.

async with Guarded({"site.example": ["203.0.113.1"]}, policy="site.example\n") as lab:
    assert (await lab.ask("site.example")).addresses == ["203.0.113.1"]
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Self

import dns.message
import dns.rcode
import dns.rdatatype

from initd.core import wire
from initd.core.dnsfilter import escape, name_wire
from initd.core.policy import parse
from initd.core.ruleset import Element, Endpoint
from initd.dnsguard import DnsGuard, GuardOptions
from initd.errors import KernelError

Handler = Callable[[bytes, str], "list[bytes] | None"]


class MemorySet:
    """What a backend's learned set is to the guard; `broken` makes the kernel refuse, `room` is what it can hold."""

    def __init__(self, events: list[tuple[Any, ...]]) -> None:
        self.elements: dict[Element, float] = {}
        self.broken = False
        self.room = 65536
        self.calls = 0
        self._events = events

    def learn(self, elements: Iterable[tuple[Element, int]]) -> None:
        self.calls += 1
        if self.broken:
            raise KernelError("Hash is full, cannot add more elements")
        for element, seconds in elements:
            assert seconds > 0
            if element not in self.elements and len(self.elements) >= self.room:
                raise KernelError("Hash is full, cannot add more elements")
            self.elements[element] = time.monotonic() + seconds
            self._events.append(("learn", str(element.network.network_address)))

    def forget(self, elements: Iterable[Element]) -> None:
        for element in elements:
            self.elements.pop(element, None)

    def addresses(self) -> set[str]:
        return {str(element.network.network_address) for element in self.elements}


class Log:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def _add(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    debug = info = warning = error = exception = _add

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.events if event == name]


def paired() -> tuple[socket.socket, socket.socket]:
    """A listening TCP socket and a UDP socket on one port of 127.0.0.1 that nobody has of either kind."""
    while True:
        listener = socket.create_server(("127.0.0.1", 0))
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            datagram.bind(listener.getsockname())
        except OSError:  # somebody's, and free for TCP all the same
            listener.close()
            datagram.close()
        else:
            return listener, datagram


@dataclass
class Upstream(asyncio.DatagramProtocol):
    """Answers from `zone` (name → addresses), or as `handler` says; `asked` holds (name, type, transport)."""

    zone: dict[str, list[str]]
    ttl: int = 60
    handler: Handler | None = None
    delay: float = 0.0
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    port: int = 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        listener, datagram = paired()
        self.port = listener.getsockname()[1]
        self.server = await asyncio.start_server(self._stream, sock=listener)
        self.transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=datagram)

    def stop(self) -> None:
        self.transport.close()
        self.server.close()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        for reply in self._replies(data, "udp"):
            asyncio.get_running_loop().call_later(self.delay, self.transport.sendto, reply, addr)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                data = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
                for reply in self._replies(data, "tcp"):
                    writer.write(len(reply).to_bytes(2) + reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _replies(self, data: bytes, transport: str) -> list[bytes]:
        question = wire.scan_query(data)
        self.asked.append((escape(question.name), dns.rdatatype.to_text(question.type), transport))
        self.raw.append(data)
        if self.handler is not None:
            told = self.handler(data, transport)
            if told is not None:
                return told
        return [self.answer(data)]

    def answer(self, data: bytes, *, flags: int = 0x8180, ttl: int | None = None) -> bytes:
        """The honest answer, in the question's case, whatever its size."""
        question = wire.scan_query(data)
        known = self.zone.get(escape(question.name))
        width = 4 if question.type == 1 else 16
        found = [ip_address(one).packed for one in known or () if len(ip_address(one).packed) == width]
        seconds = self.ttl if ttl is None else ttl
        head = b"\xc0\x0c" + question.type.to_bytes(2) + b"\0\1" + seconds.to_bytes(4) + width.to_bytes(2)
        rcode = 0 if known is not None else 3
        header = data[:2] + struct.pack("!5H", flags | rcode, 1, len(found), 0, 0)
        return header + data[12 : question.end] + b"".join(head + one for one in found)


@dataclass
class Got:
    """An answer as a client sees it."""

    message: dns.message.Message
    seconds: float

    @property
    def addresses(self) -> list[str]:
        return [str(one) for rrset in self.message.answer if rrset.rdtype in (1, 28) for one in rrset]

    @property
    def rcode(self) -> str:
        return dns.rcode.to_text(self.message.rcode())


class Client(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if not self.arrived.done():
            self.arrived.set_result(data)


class Guarded:
    """The guard, its upstreams, its set and its log; `events` tells in which order learning and answering happened."""

    def __init__(
        self, zone: dict[str, list[str]], *, policy: str, upstreams: int = 1, more: Iterable[Endpoint] = (), **how: Any
    ) -> None:
        self.upstreams = [Upstream(zone) for _ in range(upstreams)]
        self.upstream = self.upstreams[0]
        self.events: list[tuple[Any, ...]] = []
        self.kernel = MemorySet(self.events)
        self.log = Log()
        self._more = tuple(more)
        self._options = GuardOptions(**how)
        self._policy = policy

    async def __aenter__(self) -> Self:
        for upstream in self.upstreams:
            await upstream.start()
        listener, datagram = paired()
        self.port = listener.getsockname()[1]
        self._sockets = {"dns4-udp": datagram, "dns4-tcp": listener, "control": datagram}
        self.guard = DnsGuard(
            upstreams=[*self._more, *(Endpoint(ip_address("127.0.0.1"), one.port) for one in self.upstreams)],
            decide=parse(self._policy).lookup().decide,
            backend=self.kernel,
            options=self._options,
            log=self.log,
        )
        await self.guard.start(self._sockets)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.guard.stop()
        for upstream in self.upstreams:
            upstream.stop()
        for sock in self._sockets.values():
            sock.close()

    def decide_by(self, policy: str, **options: Any) -> tuple[Element, ...]:
        return self.guard.set_policy(parse(policy).lookup().decide, **options)

    async def ask(self, name: str, kind: str = "A", *, within: float = 5.0, **how: Any) -> Got:
        query = dns.message.make_query(name, kind, **how)
        begin = time.monotonic()
        data = await self.exchange(query.to_wire(), within=within)
        assert data is not None, "no answer"
        self.events.append(("answer", name))
        message = dns.message.from_wire(data)
        assert query.is_response(message)
        return Got(message, time.monotonic() - begin)

    async def exchange(self, data: bytes, *, within: float = 1.0) -> bytes | None:
        """What comes back for `data` over UDP; None when nothing does."""
        loop = asyncio.get_running_loop()
        transport, client = await loop.create_datagram_endpoint(Client, remote_addr=("127.0.0.1", self.port))
        try:
            transport.sendto(data)
            return await asyncio.wait_for(client.arrived, within)
        except TimeoutError:
            return None
        finally:
            transport.close()

    async def stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def holds(self, addresses: set[str]) -> None:
        """Wait until exactly these are in the set; AssertionError after twenty seconds."""
        until = time.monotonic() + 20
        while self.kernel.addresses() != addresses:
            assert time.monotonic() < until, self.kernel.addresses()
            await asyncio.sleep(0.02)

    def held(self, name: str) -> set[str]:
        return {str(address) for address in self.guard.leases.addresses_of(name)}


async def read_message(reader: asyncio.StreamReader, *, within: float = 5.0) -> dns.message.Message:
    async def read() -> bytes:
        return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))

    return dns.message.from_wire(await asyncio.wait_for(read(), within))


def framed(query: dns.message.Message) -> bytes:
    data = query.to_wire()
    return len(data).to_bytes(2) + data


def question_of(name: str, kind: int = 1) -> bytes:
    """Bytes of a plain query for `name`, which may be anything."""
    return b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + name_wire(name) + kind.to_bytes(2) + b"\0\1"
