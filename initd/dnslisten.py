"""Runs: warden, always. The guard's doors: UDP and TCP on loopback, on sockets that the keeper holds.

A `Port` gives each message to the guard's `answer` and sends what comes back, at once or later, in any order.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_CONNECTIONS = 128
IDLE_SECONDS = 10.0
"""RFC 7766, 6.2.3: "on the order of a few seconds"; long enough for a client that reuses its connection."""

UNSENT = 1 << 18
"""Bytes that a client may leave unread before its connection is closed."""

DRAIN = 64
"""Datagrams taken before the loop gets its turn."""


class Port(Protocol):
    """Where an answer goes. `stream` lifts the size limit of UDP."""

    stream: bool

    def send(self, data: bytes, peer: Any) -> None:
        """Deliver to `peer`; never raises for a client that has gone."""


class DatagramPort:
    """A UDP socket without a transport: asyncio's costs more than the rest of a cached answer."""

    stream = False

    def __init__(self, sock: socket.socket, answer: Callable[[bytes, Port, Any], bytes | None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._answer = answer
        asyncio.get_running_loop().add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        """Stop reading; the socket is the keeper's and stays."""
        asyncio.get_running_loop().remove_reader(self._sock.fileno())

    def send(self, data: bytes, peer: Any) -> None:
        """A full buffer or a vanished client loses the datagram, as UDP may."""
        try:
            self._sock.sendto(data, peer)
        except OSError:
            return

    def _readable(self) -> None:
        receive, answer = self._sock.recvfrom, self._answer
        for _ in range(DRAIN):
            try:
                data, peer = receive(4096)
            except OSError:  # nothing left, or an ICMP error of an earlier send
                return
            reply = answer(data, self, peer)
            if reply is not None:
                self.send(reply, peer)


class StreamPort(asyncio.Protocol):
    """One TCP connection: any number of queries, answered as they come to be known (RFC 7766, 6.2.1.1)."""

    stream = True

    def __init__(self, answer: Callable[[bytes, Port, Any], bytes | None], connections: set[StreamPort]) -> None:
        self._answer = answer
        self._connections = connections
        self._buffer = b""
        self._peer: tuple[Any, ...] = ()
        self._transport: asyncio.Transport | None = None
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a seat, or be turned away when all are taken."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport
        self._peer = transport.get_extra_info("peername")
        if len(self._connections) >= MOST_CONNECTIONS:
            transport.abort()
            return
        self._connections.add(self)
        self._rest()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Give the seat back."""
        self._connections.discard(self)
        self._transport = None
        if self._idle is not None:
            self._idle.cancel()

    def data_received(self, data: bytes) -> None:
        """Whole messages are answered, a part is kept."""
        self._rest()
        buffer, position = self._buffer + data, 0
        while len(buffer) - position >= 2:
            end = position + 2 + int.from_bytes(buffer[position : position + 2])
            if end > len(buffer):
                break
            reply = self._answer(buffer[position + 2 : end], self, self._peer)
            if reply is not None:
                self.send(reply, self._peer)
            position = end
        self._buffer = buffer[position:]

    def send(self, data: bytes, peer: Any) -> None:  # noqa: ARG002 - a connection has one peer
        """Queue for the client; one that does not read is closed."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(len(data).to_bytes(2) + data)
        if self._transport.get_write_buffer_size() > UNSENT:
            self._transport.abort()

    def close(self) -> None:
        """Close after what is already written."""
        if self._transport is not None:
            self._transport.close()

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.close)


class Doors:
    """All ports of the guard."""

    def __init__(self) -> None:
        self._datagram: list[DatagramPort] = []
        self._servers: list[asyncio.Server] = []
        self._connections: set[StreamPort] = set()

    async def open(self, sockets: list[socket.socket], answer: Callable[[bytes, Port, Any], bytes | None]) -> None:
        """Serve on bound sockets; stream sockets are listening already."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            if sock.type == socket.SOCK_DGRAM:
                self._datagram.append(DatagramPort(sock, answer))
            else:
                sock.setblocking(False)
                server = await loop.create_server(lambda: StreamPort(answer, self._connections), sock=sock)
                self._servers.append(server)

    def close(self) -> None:
        """Stop serving."""
        for port in self._datagram:
            port.close()
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.close()
        self._datagram, self._servers = [], []
