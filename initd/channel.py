"""A pair of `AF_UNIX SOCK_SEQPACKET` ends, one JSON object a packet (docs/architecture.md, "How they talk").

Neither end ever blocks the other: a packet that does not fit is refused, and the caller decides.
"""

from __future__ import annotations

import json
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

MAX_PACKET = 128 * 1024
"""Bytes. A probe's result is at most 64 KiB; the default socket buffer (212,992) holds one packet of this size."""


class Channel:
    """One end. `open` turns False for good when the other end is closed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.open = True

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """Our end, and the raw socket to hand to a child."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    @classmethod
    def inherited(cls, number: int) -> Self:
        """The end that a parent named in our environment; not passed on to our own children."""
        sock = socket.socket(fileno=number)
        sock.set_inheritable(False)
        return cls(sock)

    @property
    def maker(self) -> int:
        """The PID of who made the pair, alive or not: SO_PEERCRED of a socketpair(2), unix(7)."""
        return int.from_bytes(self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)

    def fileno(self) -> int:
        """For poll."""
        return self._sock.fileno()

    def send(self, **message: Any) -> bool:
        """True when the packet was queued; False when it is too large, the other end is full or gone."""
        data = json.dumps(message).encode()
        if len(data) > MAX_PACKET:
            return False
        try:
            self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Every message that has arrived; one that is not a JSON object with an `event` is dropped."""
        messages = []
        while self.open:
            try:
                data = self._sock.recv(MAX_PACKET, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.open = False
                break
            try:
                message = json.loads(data)
            except (ValueError, RecursionError):  # the deeper one from a peer that means harm
                continue
            if isinstance(message, dict) and isinstance(message.get("event"), str):
                messages.append(message)
        return messages

    def close(self) -> None:
        """Give the descriptor back."""
        self.open = False
        self._sock.close()
