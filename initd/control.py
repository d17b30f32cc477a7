"""Runs: warden, always. A UNIX socket around `initd.core.messages`: who is asking is known before a byte is parsed.

The peer's UID comes from SO_PEERCRED (unix(7)). One request and one answer at a time on a connection; anything
malformed is answered once and the connection closed. Connections, bytes and seconds are bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from initd.core import messages
from initd.core.throttle import Throttle
from initd.errors import InitdError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from initd.logs import Log

MAX_CONNECTIONS = 32
"""At the same time, for each UID: a session that holds all of its own must not lock root out."""

IDLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel vouches for it at connect time."""

    pid: int
    uid: int
    gid: int


class Control:
    """Serves requests on an inherited listening socket; `handle` does the work and may raise InitdError."""

    def __init__(self, handle: Callable[[messages.Request, Peer], Awaitable[dict[str, Any]]], *, log: Log) -> None:
        self._handle = handle
        self._log = log
        self._loud = Throttle(10, 20)
        self._open: Counter[int] = Counter()
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._server: asyncio.Server | None = None

    async def start(self, listener: socket.socket) -> None:
        """Begin to accept on `listener` (bound and listening)."""
        listener.setblocking(False)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=messages.MAX_MESSAGE)

    async def stop(self) -> None:
        """Stop accepting; the socket file stays, the keeper owns it."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _peer(writer)
        self._open[peer.uid] += 1
        try:
            if self._open[peer.uid] > MAX_CONNECTIONS:
                writer.write(messages.failure("too many connections", hint="try again in a moment"))
                return
            await self._converse(reader, writer, peer)
        except (ConnectionError, TimeoutError):
            pass
        finally:
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(_close(writer), IDLE_SECONDS)
            writer.transport.abort()  # close() waits for ever for a peer that does not read; nothing when it is closed
            self._open[peer.uid] -= 1

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: Peer) -> None:
        while True:
            try:
                frame = await asyncio.wait_for(reader.readline(), IDLE_SECONDS)
            except ValueError:  # StreamReader's word for a line beyond its limit
                writer.write(messages.failure(f"message longer than {messages.MAX_MESSAGE} bytes", code=64))
                return
            if not frame:
                return
            try:
                request = messages.parse_request(frame)
            except messages.ProtocolError as error:
                if self._loud.allows(time.monotonic()):
                    self._log.warning("control.rejected", pid=peer.pid, uid=peer.uid, reason=str(error))
                writer.write(messages.failure(str(error), code=64))
                return
            writer.write(await self._answer(request, peer))
            await asyncio.wait_for(writer.drain(), IDLE_SECONDS)

    async def _answer(self, request: messages.Request, peer: Peer) -> bytes:
        """A session's requests take turns: with a large policy 32 that read the rules are half a minute's work."""
        try:
            async with self._turns[peer.uid] if peer.uid else contextlib.nullcontext():
                return messages.result(await self._handle(request, peer))
        except InitdError as error:
            return messages.failure(error.message, hint=error.hint, code=error.code)
        except messages.ProtocolError as error:
            return messages.failure(str(error))
        except Exception:  # noqa: BLE001 - a bug in one request must not end the warden
            if self._loud.allows(time.monotonic()):
                self._log.exception("control.failed", op=request.op)
            return messages.failure(f"{request.op} failed inside the warden", hint="see the box's log")


async def _close(writer: asyncio.StreamWriter) -> None:
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def _peer(writer: asyncio.StreamWriter) -> Peer:
    sock = writer.get_extra_info("socket")
    return Peer(*struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
