"""Runs: warden, always. Refused packets as the kernel reports them: an NFLOG group on a raw netlink socket.

Layout: include/uapi/linux/netfilter/nfnetlink_log.h. A message that the kernel could not deliver shows as a gap in
the sequence numbers (nfnetlink_log.c, __build_packet_message) and is counted in `lost`.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from initd.kernel.netlink import NETFILTER, Netlink, attribute, attributes

if TYPE_CHECKING:
    from initd.core.ruleset import IPAddress

_PACKET, _CONFIG = 0x400, 0x401  # NFNL_SUBSYS_ULOG << 8
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH, _CFG_FLAGS = 1, 2, 5, 6
_BIND, _COPY_PACKET, _SEQUENCE = 1, 2, 1
_PAYLOAD, _PREFIX, _UID, _SEQ = 9, 10, 11, 12

COPIED = 128
"""Bytes of each packet: enough for IPv6 with extension headers, and for the ports behind them."""

AT_ONCE = 64
BUFFER = 1 << 20

_PROTO = {6: "tcp", 17: "udp"}
_EXTENSIONS = frozenset({0, 43, 60})  # hop-by-hop, routing, destination options (RFC 8200, 4)


@dataclass(frozen=True, slots=True)
class Packet:
    """`uid` is of the socket's creator (NFULA_UID); `proto` tcp, udp or a number; ports None where there are none."""

    prefix: str
    uid: int | None
    proto: str
    source: IPAddress
    sport: int | None
    destination: IPAddress
    dport: int | None


class PacketLog(Netlink):
    """A bound group. KernelError, OSError or NetlinkRefusal: somebody else has it, or the kernel has no NFLOG."""

    def __init__(self, group: int) -> None:
        super().__init__(NETFILTER)
        self.lost = 0
        self._expected: int | None = None
        head = struct.pack("!BBH", socket.AF_UNSPEC, 0, group)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            for body in (
                attribute(_CFG_CMD, bytes([_BIND])),
                attribute(_CFG_MODE, struct.pack("!IBx", COPIED, _COPY_PACKET)),
                attribute(_CFG_QTHRESH, struct.pack("!I", 1)) + attribute(_CFG_FLAGS, struct.pack("!H", _SEQUENCE)),
            ):
                self.request(_CONFIG, head + body)
        except BaseException:
            self.close()
            raise
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """For an event loop: readable means that `read` has something."""
        return self._socket.fileno()

    def read(self) -> list[Packet]:
        """What is there now, at most 64 datagrams of it; what is no packet of a known form is left out."""
        found: list[Packet] = []
        for _ in range(AT_ONCE):
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue  # how many were lost, the next sequence number says
            position = 0
            while position + 16 <= len(data):
                length, kind = struct.unpack_from("=IH", data, position)
                if kind == _PACKET and (packet := self._message(data[position + 20 : position + length])):
                    found.append(packet)
                position += max((length + 3) & ~3, 16)
        return found

    def _message(self, body: bytes) -> Packet | None:
        parts = {kind: body[start:end] for kind, start, end in attributes(body)}
        number = int.from_bytes(parts.get(_SEQ, b""), "big")
        if self._expected is not None:
            self.lost += (number - self._expected) & 0xFFFFFFFF
        self._expected = number + 1 & 0xFFFFFFFF
        prefix = parts.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
        uid = int.from_bytes(parts[_UID], "big") if _UID in parts else None
        return parse(parts.get(_PAYLOAD, b""), prefix=prefix, uid=uid)


def parse(data: bytes, *, prefix: str, uid: int | None) -> Packet | None:
    """An IP packet's beginning; None when it is not one."""
    try:
        if data[0] >> 4 == 4:
            addresses: tuple[IPAddress, IPAddress] = (IPv4Address(data[12:16]), IPv4Address(data[16:20]))
            number, start = data[9], (data[0] & 15) * 4
            whole = not int.from_bytes(data[6:8], "big") & 0x1FFF  # a later fragment has no ports
        elif data[0] >> 4 == 6:
            addresses = (IPv6Address(data[8:24]), IPv6Address(data[24:40]))
            number, start, whole = data[6], 40, True
            while number in _EXTENSIONS:
                number, start = data[start], start + 8 + data[start + 1] * 8
        else:
            return None
    except (IndexError, ValueError):
        return None
    name = _PROTO.get(number)
    ports: tuple[int | None, int | None] = (None, None)
    if name and whole and len(data) >= start + 4:
        ports = struct.unpack_from("!HH", data, start)
    return Packet(prefix, uid, name or str(number), addresses[0], ports[0], addresses[1], ports[1])
