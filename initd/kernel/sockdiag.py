"""Runs: warden. Whose socket is this? One socket by its addresses and ports, asked of sock_diag(7).

Layout: include/uapi/linux/inet_diag.h. A lookup of a UDP socket takes the two ends the other way round than one of a
TCP socket (net/ipv4/udp_diag.c, udp_dump_one).
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING

from initd.kernel.netlink import SOCK_DIAG, Netlink, NetlinkRefusal

if TYPE_CHECKING:
    from initd.core.ruleset import IPAddress

_BY_FAMILY = 20
_REQUEST = struct.Struct("=BBBBI2s2s16s16sIII")  # inet_diag_req_v2; ports and addresses in network order
_PROTO = {"tcp": 6, "udp": 17}
_NO_COOKIE = 0xFFFFFFFF
_UID_AT = 4 + 48 + 12  # inet_diag_msg: four bytes, idiag_sockid, expires, rqueue, wqueue

End = tuple["IPAddress", int]


@dataclass(frozen=True, slots=True)
class Owned:
    """`uid` of the socket's creator; `inode` is 0 when no process holds it any more."""

    uid: int
    inode: int


class Sockets(Netlink):
    """Raises KernelError when sock_diag cannot be opened."""

    def __init__(self) -> None:
        super().__init__(SOCK_DIAG)

    def owner(self, proto: str, near: End, far: End) -> Owned | None:
        """The socket that talks from `near` to `far` (or, for UDP, is bound to `near`); None when there is none."""
        if proto not in _PROTO:
            return None
        one, other = (far, near) if proto == "udp" else (near, far)
        body = _REQUEST.pack(
            AF_INET if near[0].version == 4 else AF_INET6, _PROTO[proto], 0, 0, 0xFFFFFFFF,
            one[1].to_bytes(2, "big"), other[1].to_bytes(2, "big"), one[0].packed, other[0].packed,
            0, _NO_COOKIE, _NO_COOKIE,
        )  # fmt: skip
        try:
            answer = self.ask(_BY_FAMILY, body)
        except NetlinkRefusal as refusal:
            if refusal.code in {errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL}:
                return None
            raise
        return Owned(*struct.unpack_from("=II", answer, _UID_AT))
