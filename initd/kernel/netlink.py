"""Runs: warden. Netlink by hand where a library call an element is too slow: framing, acknowledgements, dumps.

Layout: include/uapi/linux/netlink.h. Integers are in host order unless a subsystem says otherwise.
"""

from __future__ import annotations

import socket
import struct
from itertools import count
from typing import TYPE_CHECKING, Self

from initd.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator

NETFILTER = 12  # NETLINK_NETFILTER
SOCK_DIAG = 4  # NETLINK_SOCK_DIAG

REQUEST, ACK, DUMP = 0x01, 0x04, 0x300
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_RECEIVE = 1 << 18  # the kernel fills at most 32 KiB of one datagram, whatever is asked (af_netlink.c)

NESTED = 0x8000
NETWORK_ORDER = 0x4000
_TYPE_MASK = 0x3FFF
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkRefusal(Exception):  # noqa: N818 - an answer, often an expected one
    """The kernel answered with an error; `code` is an errno or, from 4096 on, a subsystem's own number."""

    def __init__(self, code: int) -> None:
        super().__init__(f"netlink error {code}")
        self.code = code


def attribute(kind: int, payload: bytes) -> bytes:
    """One nlattr, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


def attributes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(type without flags, start, end) of each attribute's payload in data[start:end]."""
    stop = len(data) if end is None else end
    while start + 4 <= stop:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4:
            return
        yield kind & _TYPE_MASK, start + 4, start + length
        start += (length + 3) & ~3


class Netlink:
    """A netlink socket of one protocol, for one thread. Raises KernelError when the socket itself fails."""

    def __init__(self, protocol: int) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
            self._socket.bind((0, 0))
        except OSError as error:
            raise KernelError(f"netlink: no socket of protocol {protocol}: {error.strerror}") from error
        self._socket.settimeout(10.0)  # the kernel answers inside send(); silence is a lost datagram
        self._sequence = count(1)

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def request(self, kind: int, body: bytes, *, flags: int = 0) -> None:
        """Send one message and return when the kernel has acknowledged it, or raise NetlinkRefusal."""
        sequence = self._send(kind, REQUEST | ACK | flags, body)
        while True:
            data = self._receive()
            _, reply, _, number, _ = _HEADER.unpack_from(data)
            if number == sequence and reply == _ERROR:
                (code,) = struct.unpack_from("=i", data, 16)
                if code:
                    raise NetlinkRefusal(-code)
                return

    def ask(self, kind: int, body: bytes) -> bytes:
        """Send one request for one object and return its payload, or raise NetlinkRefusal."""
        sequence = self._send(kind, REQUEST, body)
        while True:
            data = self._socket.recv(_RECEIVE)
            length, reply, _, number, _ = _HEADER.unpack_from(data)
            if number == sequence:
                if reply == _ERROR:
                    raise NetlinkRefusal(-struct.unpack_from("=i", data, 16)[0])
                return data[16:length]

    def dump(self, kind: int, body: bytes) -> Iterator[bytes]:
        """Payloads of a multi-part answer, in order. Raises NetlinkRefusal for an error at either end of it."""
        sequence = self._send(kind, REQUEST | DUMP, body)
        while True:
            data = self._receive()
            position = 0
            while position < len(data):
                length, reply, _, number, _ = _HEADER.unpack_from(data, position)
                if number == sequence:
                    if reply in {_ERROR, _DONE}:
                        (code,) = struct.unpack_from("=i", data, position + 16)
                        if code < 0:
                            raise NetlinkRefusal(-code)
                        return
                    yield data[position + 16 : position + length]
                position += (length + 3) & ~3

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        sequence = next(self._sequence)
        try:
            self._socket.send(_HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body)
        except OSError as error:
            raise KernelError(f"netlink: not sent: {error.strerror or error}") from error
        return sequence

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE)
        except OSError as error:
            raise KernelError(f"netlink: no answer: {error.strerror or error}") from error
