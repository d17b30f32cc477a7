"""Runs: PID 1, when NOTIFY_SOCKET is set. Tells the service manager what sd_notify(3) tells it."""

from __future__ import annotations

import socket


class Notifier:
    """Connects at once, because after the drop the socket may be out of reach; silent when nobody listens."""

    def __init__(self, address: str | None) -> None:
        self._sock: socket.socket | None = None
        if not address or address[0] not in "/@":
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            sock.close()
            return
        self._sock = sock

    def fileno(self) -> int:
        """-1 when there is nobody to tell."""
        return -1 if self._sock is None else self._sock.fileno()

    def tell(self, state: str) -> None:
        """Send one state, such as READY=1."""
        if self._sock is not None:
            try:
                self._sock.send(state.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                return
