"""Every IP packet that leaves the box is counted here, at the far end of its only cable.

Neighbour discovery, router solicitation and multicast listener reports are the kernel's own and left out.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from dataclasses import dataclass

ETH_P_ALL = 3
PACKET_STATISTICS, PACKET_IGNORE_OUTGOING = 6, 23  # linux/if_packet.h
SOL_PACKET, SO_RCVBUFFORCE, SO_TIMESTAMPNS = 263, 33, 35  # linux/socket.h, asm-generic/socket.h
_SNAP = 128  # bytes kept of a frame: Ethernet, IPv6 with a hop-by-hop header, TCP
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6"}
_FLAGS = "FSRPAU"  # bit 0 upwards (RFC 9293, 3.1)
_CHATTER = frozenset({130, 131, 132, 133, 134, 135, 136, 137, 143})  # ICMPv6: listener and neighbour discovery
_HOP_BY_HOP = 0


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet from the box. `at` is monotonic seconds; ports are 0 and the ICMP type `kind` -1 where there is none."""

    at: float
    family: int  # 4 or 6
    src: str
    dst: str
    proto: str  # tcp, udp, icmp, icmp6 or the number
    sport: int
    dport: int
    flags: str  # of TCP, such as S, SA, PA
    kind: int


class Sniffer:
    """A raw socket on an interface; frames are stored as they come and only parsed when asked for."""

    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self.socket.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.socket.bind((interface, ETH_P_ALL))
        self._frames: deque[tuple[float, bytes]] = deque()

    def drain(self) -> None:
        """Take what the kernel holds."""
        offset = time.monotonic() - time.time()
        while True:
            try:
                frame, ancillary, _, _ = self.socket.recvmsg(_SNAP, 64)
            except BlockingIOError:
                return
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
            self._frames.append((seconds + nanoseconds / 1e9 + offset, frame))

    def clear(self) -> None:
        self.drain()
        self.forget()

    def forget(self) -> None:
        """Drop what `packets` has told; what the kernel holds since then stays for the next time."""
        self._frames.clear()

    def packets(self) -> list[Packet]:
        """All packets since the last `clear`; raises RuntimeError if the kernel had to drop one."""
        self.drain()
        # The counters restart at zero with each read (packet(7)).
        _, dropped = struct.unpack("II", self.socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        if dropped:
            raise RuntimeError(f"the packet log lost {dropped} packets")
        parsed = (parse(at, frame) for at, frame in self._frames)
        return [packet for packet in parsed if packet is not None]


def parse(at: float, frame: bytes) -> Packet | None:
    """The packet in an Ethernet frame; None for what is not IP or is the kernel's own IPv6 chatter."""
    ethertype = frame[12:14]
    if ethertype == b"\x08\x00" and len(frame) >= 34:
        start = 14 + (frame[14] & 15) * 4
        fragment = int.from_bytes(frame[20:22]) & 0x1FFF
        number, src, dst = frame[23], frame[26:30], frame[30:34]
        family, af = 4, socket.AF_INET
    elif ethertype == b"\x86\xdd" and len(frame) >= 54:
        number, src, dst, start, fragment = frame[20], frame[22:38], frame[38:54], 54, 0
        family, af = 6, socket.AF_INET6
        if number == _HOP_BY_HOP and len(frame) >= 56:
            number, start = frame[54], 54 + 8 + frame[55] * 8
    else:
        return None
    proto = _PROTOCOLS.get(number, str(number))
    body = b"" if fragment else frame[start:]
    sport = dport = 0
    flags, kind = "", -1
    if proto in {"tcp", "udp"} and len(body) >= 4:
        sport, dport = struct.unpack_from("!HH", body)
    if proto == "tcp" and len(body) >= 14:
        flags = "".join(letter for bit, letter in enumerate(_FLAGS) if body[13] >> bit & 1)
    if proto in {"icmp", "icmp6"} and body:
        kind = body[0]
        if proto == "icmp6" and kind in _CHATTER:
            return None
    return Packet(at, family, socket.inet_ntop(af, src), socket.inet_ntop(af, dst), proto, sport, dport, flags, kind)
