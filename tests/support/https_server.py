"""Web, echo and download servers that answer on every address of the lab.

Paths: `/` greets, `/drip?rate=N` sends N bytes a second for ever, `/bytes?n=N` sends N bytes, `/status/N` answers N;
what a test has put there is served on every host.
Hosts `to--NAME` redirect to https://NAME/, hosts `wrong--…` show another name's certificate.
The host api.github.com serves `/meta` in the manner that the test sets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections import deque
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.support.dns_server import packet_destination, send_from, udp_socket

if TYPE_CHECKING:
    from tests.support.authority import Authority

ANY = ("0.0.0.0", "::")
HTTPS = (443, 4443)
TCP_ECHO = (7, 22, 5000, 8443)
UDP_ECHO = (7, 443, 5000)
META_HOST = "api.github.com"
META = {
    "verifiable_password_authentication": False,
    "hooks": ["192.0.2.128/28"],
    "web": ["192.0.2.96/27", "2001:db8:2:6::/64"],
    "api": ["192.0.2.64/27"],
    "git": ["192.0.2.32/28", "2001:db8:2:7::/64"],
    "packages": ["192.0.2.48/29"],
    "actions": ["192.0.2.192/27"],
}
_TICK = 0.02  # seconds between two pieces of a slow download
_HUGE = 64 << 20


class Meta(StrEnum):
    """What api.github.com/meta answers."""

    GOOD = "good"
    MALFORMED = "malformed"  # cut in the middle of a string
    SILENT = "silent"
    HUGE = "huge"  # 64 MiB of valid JSON
    ERROR = "error"  # status 500
    CUSTOM = "custom"  # the text that the test gave


class Request(NamedTuple):
    """One request; `at` is monotonic seconds."""

    at: float
    host: str
    path: str
    scheme: str
    source: str
    server: str


class WebServer:
    """HTTP on 80, HTTPS with a certificate for whatever name is asked for, echo on TCP_ECHO and UDP_ECHO."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.meta = Meta.GOOD
        self.meta_text = json.dumps(META)
        self.files: dict[str, tuple[str, bytes]] = {}  # path: content type, content
        self.log: deque[Request] = deque(maxlen=100_000)
        self._keep: list[object] = []

    async def start(self) -> None:
        context = self.authority.context("lab.invalid", addresses=[f"203.0.113.{n}" for n in range(256)])
        context.sni_callback = self._choose
        loop = asyncio.get_running_loop()
        self._keep.append(await asyncio.start_server(self._http, ANY, 80, backlog=1024))
        for port in HTTPS:
            self._keep.append(await asyncio.start_server(self._http, ANY, port, ssl=context, backlog=1024))
        for port in TCP_ECHO:
            self._keep.append(await asyncio.start_server(_echo, ANY, port, backlog=512))
        for port in UDP_ECHO:
            for family in (socket.AF_INET, socket.AF_INET6):
                sock = udp_socket(family, port)
                loop.add_reader(sock.fileno(), _echo_datagrams, sock)
                self._keep.append(sock)

    def _choose(self, connection: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        if name is not None:
            connection.context = self.authority.context("lab.invalid" if name.startswith("wrong--") else name)

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        scheme = "https" if writer.get_extra_info("ssl_object") else "http"
        server, source = writer.get_extra_info("sockname")[0], writer.get_extra_info("peername")[0]
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.SSLError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                target = head[0].split(" ")[1]
                fields = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
                host = fields.get("host", "")
                self.log.append(Request(time.monotonic(), host, target, scheme, source, server))
                await self._respond(writer, host=host, target=target)
                if fields.get("connection", "").lower() == "close":
                    break
        writer.close()

    async def _respond(self, writer: asyncio.StreamWriter, *, host: str, target: str) -> None:
        parts = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.path == "/meta" and host.partition(":")[0] == META_HOST:
            await self._respond_meta(writer)
        elif host.startswith("to--"):
            place = f"https://{host.removeprefix('to--')}/"
            writer.write(f"HTTP/1.1 302 Lab\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
        elif parts.path in self.files:
            kind, body = self.files[parts.path]
            await _send(writer, 200, body, kind)
        elif parts.path == "/drip":
            await _drip(writer, float(query.get("rate", "1000")))
        elif parts.path == "/bytes":
            await _send(writer, 200, b"x" * int(query.get("n", "1000")))
        elif parts.path.startswith("/status/"):
            await _send(writer, int(parts.path.rpartition("/")[2]), b"as asked\n")
        else:
            await _send(writer, 200, f"hello from {host}\n".encode())

    async def _respond_meta(self, writer: asyncio.StreamWriter) -> None:
        match self.meta:
            case Meta.SILENT:
                await asyncio.sleep(3600)
            case Meta.ERROR:
                await _send(writer, 500, b"out of order\n")
            case Meta.MALFORMED:
                await _send(writer, 200, json.dumps(META).encode()[:60])
            case Meta.HUGE:
                await _send(writer, 200, b'{"web": ["' + b"x" * _HUGE + b'"]}')
            case _:
                await _send(writer, 200, self.meta_text.encode())


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "text/plain") -> None:
    head = f"HTTP/1.1 {status} Lab\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def _drip(writer: asyncio.StreamWriter, rate: float) -> None:
    writer.write(b"HTTP/1.1 200 Lab\r\nConnection: close\r\n\r\n")
    piece = b"." * max(1, round(rate * _TICK))
    while not writer.is_closing():
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(len(piece) / rate)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


def _echo_datagrams(sock: socket.socket) -> None:
    try:
        data, ancillary, _, peer = sock.recvmsg(65536, 64)
    except BlockingIOError:
        return
    send_from(sock, data, peer, packet_destination(ancillary))
