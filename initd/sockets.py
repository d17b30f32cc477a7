"""Runs: keeper, once. Opens what outlives the warden: DNS sockets, the control socket, resolv.conf, the pulse.

The names are those of docs/architecture.md; a descriptor opened here is never reopened, so a query that arrives
while there is no warden waits in the socket's queue.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from initd import drop
from initd.errors import KernelError, PrivilegeError
from initd.journal import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from initd.settings import Settings

BACKLOG = 128
_BEAT = struct.Struct("d")
RESOLV = "/etc/resolv.conf"


def open_all(settings: Settings) -> dict[str, int]:
    """Name → descriptor. PrivilegeError (77) or KernelError (71) when a needed one cannot be had."""
    held: dict[str, int] = {}
    for family, address, names in (
        (socket.AF_INET, "127.0.0.1", ("dns4-udp", "dns4-tcp")),
        (socket.AF_INET6, "::1", ("dns6-udp", "dns6-tcp")),
    ):
        for name, kind in zip(names, (socket.SOCK_DGRAM, socket.SOCK_STREAM), strict=True):
            sock = _dns(family, kind, address)
            if sock is not None:
                held[name] = sock.detach()
    held["control"] = _control(os.path.join(settings.run_dir, "control.sock")).detach()
    try:
        held["resolv"] = os.open(RESOLV, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        say("warning", "resolv.unwritable", path=RESOLV, error=error.strerror)
    held["pulse"] = os.memfd_create("initd-pulse")
    os.ftruncate(held["pulse"], _BEAT.size)
    return held


def last_beat(pulse: int) -> float:
    """When the warden last showed that it lives, in monotonic seconds; 0.0 when it never has."""
    beat: float = _BEAT.unpack(os.pread(pulse, _BEAT.size, 0))[0]
    return min(beat, time.monotonic()) if beat > 0 else 0.0


def _dns(family: socket.AddressFamily, kind: socket.SocketKind, address: str) -> socket.socket | None:
    """Port 53 of a loopback address, or None where the namespace has no ::1."""
    where = f"port 53 of {address}"
    try:
        sock = socket.socket(family, kind)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, 53))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError as error:
        if family == socket.AF_INET6 and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return None
        if error.errno == errno.EACCES:
            raise PrivilegeError(
                f"{where} may not be bound",
                hint="cap_add: [NET_BIND_SERVICE], or sysctl net.ipv4.ip_unprivileged_port_start=53",
            ) from error
        if error.errno == errno.EADDRINUSE:
            raise KernelError(
                f"{where} is in use", hint="stop the other resolver in this network namespace (ss -lnup sport = 53)"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise KernelError(f"no address {address} here", hint="bring the loopback up: ip link set lo up") from error
        raise KernelError(f"{where} cannot be opened: {error.strerror}") from error
    return sock


def _control(path: str) -> socket.socket:
    """A listening UNIX socket that everybody may connect to; who it is, SO_PEERCRED says, unix(7)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with drop.as_owner(os.path.dirname(path)):
            if os.path.lexists(path):  # a predecessor's: nobody listens on it now
                os.unlink(path)
            sock.bind(path)
            os.chmod(path, 0o666)  # noqa: S103  # SO_PEERCRED decides, not the mode
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise KernelError(f"{path} cannot be made: {error.strerror}", hint="INITD_RUN_DIR names its folder") from error
    return sock


def publish(run_dir: str, name: str, text: str) -> None:
    """Write `name` in `run_dir` so that a reader sees it whole or not at all.

    The warden may write there, too: no file is opened that is there already, or a link in its place would be followed.
    """
    path = os.path.join(run_dir, name)
    try:
        with drop.as_owner(run_dir):
            if os.path.lexists(f"{path}.new"):
                os.unlink(f"{path}.new")
            with open(f"{path}.new", "x", encoding="utf-8") as file:
                file.write(text)
            os.replace(f"{path}.new", path)
    except OSError as error:
        raise KernelError(f"{path} cannot be written: {error.strerror}") from error


def retract(run_dir: str, name: str) -> None:
    """Remove `name` from `run_dir`, if it is there."""
    path = os.path.join(run_dir, name)
    with drop.as_owner(run_dir):
        if os.path.lexists(path):
            os.unlink(path)
