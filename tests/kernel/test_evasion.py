"""Packets made to slip past: fragments, extension headers, look-alike interfaces, families that come and go."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from ipaddress import ip_address

import pytest

from initd.core.ruleset import Endpoint, Ruleset
from tests.kernel.test_contract import (
    LISTED4,
    LISTED6,
    SPECIAL,
    UNLISTED,
    UPSTREAM4,
    apart,
    armed,
    tries,
    wire_far,
)
from tests.kernel.wire import BOX4, BOX6, SESSION, WARDEN, as_user, attempt, run

pytestmark = pytest.mark.kernel

IP_PKTINFO, IPV6_PKTINFO = 8, 50  # linux/in.h, linux/in6.h
UNLISTED4, UNLISTED6 = "203.0.113.77", "2001:db8:2::77"
_SYN = struct.pack("!HHIIBBHHH", 40000, 443, 1, 0, 5 << 4, 2, 1024, 0, 0)
_DATAGRAM = struct.pack("!HHHH", 40000, 443, 8 + 32, 0) + b"x" * 32


def send4(target: str, payload: bytes, *, proto: int, offset: int = 0, more: bool = False, number: int = 7) -> str:
    """A raw IPv4 packet (offset in bytes); the kernel fills in checksum and source. How it was taken."""
    flags = (0x2000 if more else 0) | offset // 8
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), number, flags, 64, proto, 0,
        socket.inet_aton(BOX4), socket.inet_aton(target),
    )  # fmt: skip
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        return _sent(sock, header + payload, (target, 0))


def send6(target: str, payload: bytes, first: int) -> str:
    """A raw IPv6 packet whose payload begins with extension header `first`."""
    header = struct.pack("!IHBB", 6 << 28, len(payload), first, 64)
    header += socket.inet_pton(socket.AF_INET6, BOX6) + socket.inet_pton(socket.AF_INET6, target)
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        return _sent(sock, header + payload, (target, 0))


def _sent(sock: socket.socket, packet: bytes, target) -> str:
    try:
        sock.sendto(packet, target)
    except OSError as error:
        return str(error.errno)
    return "sent"


def extended(target: str, kind: int) -> str:
    """A SYN behind an options header: hop-by-hop 0, destination 60 (RFC 8200, 4.3 and 4.6)."""
    return send6(target, bytes([6, 0, 1, 4, 0, 0, 0, 0]) + _SYN, kind)


def source_routed4(target: str) -> str:
    """To `target`, which is to pass it on to an unlisted address (loose source route, RFC 791); only root may."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([131, 7, 4]) + socket.inet_aton(target) + b"\0")
        return _sent(sock, b"x", (UNLISTED4, 443))


def source_routed6(target: str) -> str:
    """The same by a segment routing header (RFC 8754), which IPv6 lets everybody set."""
    segments = b"".join(socket.inet_pton(socket.AF_INET6, one) for one in (UNLISTED6, target))
    with as_user(SESSION):
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RTHDR, bytes([0, 4, 4, 1, 1, 0, 0, 0]) + segments)
    with sock:
        return _sent(sock, b"x", (UNLISTED6, 443))


def fragmented6(target: str, *, offset: int, more: bool) -> str:
    part = _DATAGRAM[offset : offset + 24] if more else _DATAGRAM[offset:]
    return send6(target, struct.pack("!BBHI", 17, 0, offset | more, 99) + part, 44)


CRAFTED = {
    "hop-by-hop": lambda four, six: extended(six, 0),
    "destination options": lambda four, six: extended(six, 60),
    "source route 4": lambda four, six: source_routed4(four),
    "source route 6": lambda four, six: source_routed6(six),
    "whole fragments 4": lambda four, six: (
        send4(four, _DATAGRAM[:24], proto=17, more=True),
        send4(four, _DATAGRAM[24:], proto=17, offset=24),
    ),
    "whole fragments 6": lambda four, six: (
        fragmented6(six, offset=0, more=True),
        fragmented6(six, offset=24, more=False),
    ),
}
ALONE = {
    "first fragment 4": lambda four, six: send4(four, _DATAGRAM[:24], proto=17, more=True, number=8),
    "later fragment 4": lambda four, six: send4(four, _DATAGRAM[24:], proto=17, offset=24, number=9),
    "tiny fragment 4": lambda four, six: send4(four, _DATAGRAM[:8], proto=6, more=True, number=10),
    "later fragment 6": lambda four, six: fragmented6(six, offset=24, more=False),
    "another protocol 4": lambda four, six: send4(four, b"x" * 16, proto=47),
    "another protocol 6": lambda four, six: send6(six, b"x" * 16, 47),
}


@pytest.mark.parametrize("name", [*CRAFTED, *ALONE])
def test_crafted_packets_do_not_leave(backend, wire, name):
    craft = (CRAFTED | ALONE)[name]
    wire.do(craft, UNLISTED4, UNLISTED6)
    assert wire.arriving(), "negative control: without rules it arrives"
    wire.do(lambda: armed(backend) and None)
    wire.arrived()
    wire.do(craft, UNLISTED4, UNLISTED6)
    time.sleep(0.05)
    assert wire.arrived() == []
    wire.do(craft, LISTED4, LISTED6)
    if name in CRAFTED:
        went = {where for where, _ in wire.arriving()}
        assert went, "and to what is listed it goes through"
        assert went <= {LISTED4, LISTED6}
    else:
        time.sleep(0.05)
        assert wire.arrived() == [], "a part alone has no port to be judged by; no other protocol is ever listed"


def test_an_interface_whose_name_resembles_loopback(backend, wire):
    """tun0 and lo agree in the lowest bit of each letter, which is all that python-iptables would compare."""
    for command in ("add tun0 type veth peer name tun1", "set tun1 up", "set tun0 up"):
        wire.shell("ip", "link", *command.split())
    wire.shell("ip", "address", "add", "2001:db8:77::1/64", "dev", "tun0", "nodad")
    wire.shell("ip", "neigh", "add", "2001:db8:77::2", "lladdr", "02:00:00:00:00:02", "dev", "tun0")
    wire.shell("ip", "address", "add", "192.0.2.65/30", "dev", "tun0")
    wire.shell("ip", "neigh", "add", "192.0.2.66", "lladdr", "02:00:00:00:00:02", "dev", "tun0")
    targets = [("tcp", "2001:db8:77::2"), ("tcp", "192.0.2.66")]

    def slowly():
        return [attempt(*target, timeout=0.2) for target in targets]

    assert [one.outcome for one in wire.do(slowly)] == ["timeout"] * 2, "negative control: sent into the void"
    for step in (lambda: backend().lockdown(WARDEN), lambda: armed(backend) and None):
        wire.do(step)
        assert apart(wire.do(slowly), "refused") == []


@pytest.mark.parametrize("family", ["v4", "v6", "sysctl"])
def test_whatever_family_the_box_has(backend, make_wire, family):
    wire = make_wire(family)
    has = [":" in target[1] for target in UNLISTED]
    wanted = [target for target, six in zip(UNLISTED, has, strict=True) if six is (family == "v6")]
    special = [target for target in SPECIAL if (":" in target[1]) is (family == "v6")]
    absent = [target for target, six in zip(UNLISTED, has, strict=True) if six is not (family == "v6")]
    assert apart(wire.do(tries, wanted + special), "open") == [], "negative control"
    wire.do(lambda: armed(backend) and None)
    wire.arrived()
    assert apart(wire.do(tries, wanted + special), "refused") == []
    assert "open" not in {one.outcome for one in wire.do(tries, absent)}
    assert wire.arrived() == []
    listed = LISTED6 if family == "v6" else LISTED4
    assert wire.do(tries, [("tcp", listed)])[0].outcome == "open"


def test_ipv6_that_is_switched_on_later_is_refused_too(backend, make_wire):
    wire = make_wire("sysctl")
    wire.do(lambda: armed(backend) and None)
    wire.shell("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")
    for line in ("addr add 2001:db8:1::2/64 dev eth0 nodad", "-6 route add default via 2001:db8:1::1"):
        wire.shell("ip", *line.split())
    run("ip", "-n", wire.far, "addr", "add", "2001:db8:1::1/64", "dev", "eth0", "nodad")
    wire.arrived()
    assert apart(wire.do(tries, [one for one in UNLISTED if ":" in one[1]]), "refused") == []
    assert wire.arrived() == []
    assert wire.do(tries, [("tcp", LISTED6)])[0].outcome == "open", "negative control: the family works"


def test_a_session_cannot_use_the_warden_s_ports_by_binding_its_source(backend, wire):
    """Source port 53 or the upstream's port opens nothing."""

    def body():
        armed(backend, Ruleset(WARDEN))
        outcomes = []
        for source in (53, 443):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((BOX4, source))
                try:
                    sock.sendto(b"x", (UNLISTED4, 53))
                    outcomes.append("sent")
                except OSError as error:
                    outcomes.append(error.errno)
        return outcomes

    wire.do(lambda: attempt("udp", UNLISTED4, 53, uid=SESSION))
    assert wire.arriving(), "negative control"
    outcomes = wire.do(body)
    assert "sent" not in outcomes
    assert wire.arrived() == []


def spoofing(peer: str, *, answered: bool = False) -> None:
    """As a session: from UNLISTED6, which is not ours, to `peer`; with `answered` `peer` is ourselves and answers.

    IPV6_FREEBIND (78, ipv6(7)) needs no privilege. The answer to a flow that came from there would be established.
    """
    with as_user(SESSION):
        sock, server = (socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) for _ in range(2))
    with sock, server:
        server.bind((BOX6, 5000))
        sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)
        sock.bind((UNLISTED6, 8443))
        _sent(sock, b"secret", (peer, 5000 if answered else 443))
        if answered:
            _sent(server, b"secret", (UNLISTED6, 8443))


SPOOFED = {
    "answered by ourselves": (BOX6, True, UNLISTED6),
    "reflected by a listed server": (LISTED6, False, LISTED6),
    "quoted by our own refusal": ("2001:db8:2::78", False, "2001:db8:2::78"),
}


@pytest.mark.parametrize("name", SPOOFED)
def test_a_source_that_is_not_ours_leads_nowhere(backend, wire, name):
    peer, answered, control = SPOOFED[name]
    wire.do(lambda: attempt("udp", LISTED6))  # finds the neighbour by our own address
    wire.arrived()
    wire.do(lambda: spoofing(peer, answered=answered))
    seen, until = set(), time.monotonic() + 5
    while control not in seen and time.monotonic() < until:
        seen |= {where for where, _ in wire.arriving()}
    assert control in seen, "negative control: without rules it arrives"
    wire.do(lambda: armed(backend) and None)
    wire.arrived()
    wire.do(lambda: spoofing(peer, answered=answered))
    time.sleep(0.05)
    assert wire.arrived() == []


def out_by_loopback(how: str) -> socket.socket:
    """A session's socket that has sent to UNLISTED by lo, which begins a flow there if the rules let it."""
    family = socket.AF_INET6 if how.endswith("6") else socket.AF_INET
    own, peer = (BOX6, UNLISTED6) if family == socket.AF_INET6 else (BOX4, UNLISTED4)
    lo = socket.if_nametoindex("lo")
    with as_user(SESSION):
        sock, named = (socket.socket(family, socket.SOCK_DGRAM) for _ in range(2))
    for one in (sock, named):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((own, 5555))
    with named, contextlib.suppress(OSError):
        if how.startswith("device"):
            with as_user(SESSION):  # asks for no privilege since Linux 5.7
                named.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
            named.sendto(b"begin", (peer, 9443))
        elif family == socket.AF_INET:
            named.sendmsg([b"begin"], [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i8x", lo))], 0, (peer, 9443))
        else:
            where = bytes(16) + struct.pack("=i", lo)
            named.sendmsg([b"begin"], [(socket.IPPROTO_IPV6, IPV6_PKTINFO, where)], 0, (peer, 9443))
    return sock


def called_from_outside(how: str) -> bool:
    """Whether a session at port 5555 answers somebody who calls from UNLISTED."""
    family = socket.AF_INET6 if how.endswith("6") else socket.AF_INET
    own, peer = (BOX6, UNLISTED6) if family == socket.AF_INET6 else (BOX4, UNLISTED4)
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(*((41, 78) if family == socket.AF_INET6 else (0, 15)), 1)  # IPV6_FREEBIND, IP_FREEBIND
        sock.bind((peer, 9443))
        sock.settimeout(1.5)
        sock.sendto(b"call", (own, 5555))
        try:
            return sock.recv(16) == b"call"
        except OSError:
            return False


@pytest.mark.parametrize("how", ["device", "message", "device 6", "message 6"])
def test_a_way_out_by_loopback_lets_nobody_in(backend, wire, how):
    def answering():
        sock = out_by_loopback(how)

        def loop():
            while True:
                sock.sendto(*sock.recvfrom(16))

        return loop

    wire.do(lambda: attempt("udp", LISTED6))  # finds the neighbour by our own address
    wire.background(answering)
    assert wire_far(wire, lambda: called_from_outside(how)), "negative control: without rules it is answered"
    wire.do(lambda: armed(backend) and None)
    wire.shell("conntrack", "-F")
    wire.do(lambda: out_by_loopback(how) and None)
    assert not wire_far(wire, lambda: called_from_outside(how))


def test_a_connection_that_was_reset_is_no_way_in_for_the_next(backend, wire):
    """Whoever takes its port sends a SYN that connection tracking takes for a part of what was there."""
    ruleset = Ruleset(WARDEN, upstreams=frozenset({Endpoint(ip_address(UPSTREAM4))}))

    def connect(uid: int) -> socket.socket:
        with as_user(uid):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((BOX4, 41000))
        sock.settimeout(5)
        sock.connect((UPSTREAM4, 53))
        return sock

    def ride() -> str:
        with connect(WARDEN) as sock:
            sock.send(b"reset")
            with contextlib.suppress(ConnectionResetError):
                sock.recv(16)
        try:
            with connect(SESSION) as sock:
                sock.send(b"hello")
                return sock.recv(16).decode()
        except ConnectionRefusedError:
            return "refused"

    assert wire.do(ride) == "hello", "negative control"
    wire.do(lambda: armed(backend, ruleset) and None)
    assert wire.do(ride) == "refused"
