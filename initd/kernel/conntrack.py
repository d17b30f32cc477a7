"""Runs: warden. Open connections: which there are, and how one that was revoked ends at once.

A rule that goes does not end a connection that "established" lets through. Cutting one takes its conntrack entry, so
that the next packet is judged anew, and first destroys the local TCP socket (SOCK_DESTROY, net/ipv4/tcp_diag.c),
because a client that only reads sends no next packet. Layout: linux/netfilter/nfnetlink_conntrack.h, inet_diag.h.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING

from initd.errors import KernelError, PrivilegeError
from initd.kernel.netlink import NETFILTER, SOCK_DIAG, Netlink, NetlinkRefusal, attribute, attributes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from initd.core.ruleset import IPAddress

_GET, _DELETE = 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8
_ORIGINAL, _STATUS, _PROTOINFO, _ID, _ZONE = 1, 3, 4, 12, 18
_NESTED = 0x8000
_SEEN_REPLY = 1 << 1  # IPS_SEEN_REPLY
_OPEN_STATES = frozenset({2, 3, 4, 5})  # SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT (nf_conntrack_tcp.h)
_PROTO = {6: "tcp", 17: "udp"}

_SOCK_DESTROY = 21
_TARGET = struct.Struct("=BBBBI2s2s16s16sIII")  # inet_diag_req_v2; ports and addresses in network order
_NO_COOKIE = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Flow:
    """One tracked flow as its first packet went. `live`: both sides have spoken and none has closed.

    `proto` is tcp, udp or another protocol's number; what has no ports has 0.
    """

    proto: str
    source: IPAddress
    sport: int
    destination: IPAddress
    dport: int
    live: bool = field(compare=False)
    key: bytes = field(compare=False, repr=False)  # attributes that tell the kernel exactly this entry


@dataclass(frozen=True, slots=True)
class Cut:
    """What was ended: `flows` no longer tracked, and of them `sockets` whose process was told at once."""

    flows: tuple[Flow, ...]
    sockets: int
    destroys: bool  # False: the kernel has no CONFIG_INET_DIAG_DESTROY, a client learns it from its next packet


def flows() -> list[Flow]:
    """Every tracked flow of this namespace, both families. Raises KernelError."""
    with Netlink(NETFILTER) as link:
        try:
            return [_flow(payload) for payload in link.dump(_GET, b"\0\0\0\0")]
        except NetlinkRefusal as refusal:
            raise _trouble(refusal, "listing connections") from refusal


def destinations() -> set[tuple[IPAddress, str, int]]:
    """(address, protocol, port) that something is connected to right now."""
    return {(flow.destination, flow.proto, flow.dport) for flow in flows() if flow.live}


def cut_where(revoked: Callable[[Flow], bool]) -> Cut:
    """Cut every flow that `revoked` picks."""
    return cut(flow for flow in flows() if revoked(flow))


def cut(chosen: Iterable[Flow]) -> Cut:
    """End these flows; one that has ended by itself is left out of the answer. Raises KernelError."""
    gone: list[Flow] = []
    sockets, refused = 0, False
    with Netlink(NETFILTER) as tracker, Netlink(SOCK_DIAG) as diag:
        for flow in chosen:
            ended = False
            # The socket first: its reset still counts as established and tells the far end.
            if flow.proto == "tcp":
                try:
                    ended = _destroy(diag, flow)
                except NetlinkRefusal as refusal:
                    if refusal.code != errno.EOPNOTSUPP:
                        raise _trouble(refusal, "ending a connection") from refusal
                    refused = True  # older kernels refuse that for TIME_WAIT (tcp_abort() in net/ipv4/tcp.c)
            if _untrack(tracker, flow) or ended:
                gone.append(flow)
            sockets += ended
    return Cut(tuple(gone), sockets, destroys=sockets > 0 or not refused)


def _destroy(diag: Netlink, flow: Flow) -> bool:
    near = (flow.sport, flow.source), (flow.dport, flow.destination)
    for (here, address), (there, peer) in (near, near[::-1]):  # the second: somebody connected to us
        body = _TARGET.pack(
            AF_INET if address.version == 4 else AF_INET6, 6, 0, 0, 0xFFFFFFFF,
            here.to_bytes(2, "big"), there.to_bytes(2, "big"), address.packed, peer.packed, 0, _NO_COOKIE, _NO_COOKIE,
        )  # fmt: skip
        try:
            diag.request(_SOCK_DESTROY, body)
        except NetlinkRefusal as refusal:
            if refusal.code != errno.ENOENT:
                raise
        else:
            return True
    return False


def _untrack(tracker: Netlink, flow: Flow) -> bool:
    family = AF_INET if flow.source.version == 4 else AF_INET6
    try:
        tracker.request(_DELETE, struct.pack("=BBH", family, 0, 0) + flow.key)
    except NetlinkRefusal as refusal:
        if refusal.code != errno.ENOENT:
            raise _trouble(refusal, "forgetting a connection") from refusal
        return False
    return True


def _flow(payload: bytes) -> Flow:
    tuple_at = (0, 0)
    status, state, key = 0, -1, b""
    for kind, start, end in attributes(payload, 4):
        if kind == _ORIGINAL:
            tuple_at = (start, end)
            key += attribute(_ORIGINAL | _NESTED, payload[start:end])
        elif kind == _STATUS:
            status = int.from_bytes(payload[start:end], "big")
        elif kind in {_ID, _ZONE}:
            key += attribute(kind, payload[start:end])
        elif kind == _PROTOINFO:
            state = _tcp_state(payload, start, end)
    proto, numbers, addresses = _tuple(payload, *tuple_at)
    name = _PROTO.get(proto) or str(proto)
    live = state in _OPEN_STATES if name == "tcp" else bool(status & _SEEN_REPLY)
    return Flow(name, addresses[0], numbers[0], addresses[1], numbers[1], live, key)


def _tcp_state(payload: bytes, start: int, end: int) -> int:
    for _, first, last in attributes(payload, start, end):
        for kind, at, _ in attributes(payload, first, last):
            if kind == 1:  # CTA_PROTOINFO_TCP_STATE
                return payload[at]
    return -1


def _tuple(payload: bytes, start: int, end: int) -> tuple[int, list[int], list[IPAddress]]:
    proto, ports = 0, [0, 0]
    addresses: list[IPAddress] = []
    for kind, first, last in attributes(payload, start, end):
        for inner, at, stop in attributes(payload, first, last):
            if kind == 1:  # CTA_TUPLE_IP: source, then destination
                number = int.from_bytes(payload[at:stop], "big")
                addresses.append(IPv4Address(number) if stop - at == 4 else IPv6Address(number))
            elif kind == 2 and inner == 1:  # CTA_PROTO_NUM
                proto = payload[at]
            elif kind == 2 and inner in {2, 3}:  # CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT
                ports[inner - 2] = int.from_bytes(payload[at:stop], "big")
    return proto, ports, addresses


def _trouble(refusal: NetlinkRefusal, doing: str) -> KernelError | PrivilegeError:
    if refusal.code == errno.EPERM:
        return PrivilegeError(f"conntrack: {doing}: not permitted", hint="grant the container NET_ADMIN (cap_add)")
    word = errno.errorcode.get(refusal.code, str(refusal.code))
    hint = "load nf_conntrack_netlink on the host" if refusal.code in {errno.EINVAL, errno.EOPNOTSUPP} else None
    return KernelError(f"conntrack: {doing}: {word}", hint=hint)
