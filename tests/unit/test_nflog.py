"""What a refused packet says of itself; hostile beginnings of packets break nothing."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from initd.kernel import nflog


def four(proto: int, rest: bytes, *, offset: int = 0, options: bytes = b"") -> bytes:
    head = struct.pack("!BBHHHBBH", 0x40 | (5 + len(options) // 4), 0, 0, 0, offset, 64, proto, 0)
    return head + ip_address("198.51.100.2").packed + ip_address("203.0.113.9").packed + options + rest


def six(proto: int, rest: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(rest), proto, 64)
    return head + ip_address("2001:db8::2").packed + ip_address("2001:db8::9").packed + rest


PORTS = struct.pack("!HH", 40000, 443) + b"\0" * 16
HOP = bytes([6, 0, 1, 4, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("data", "proto", "ports"),
    [
        (four(6, PORTS), "tcp", (40000, 443)),
        (four(17, PORTS), "udp", (40000, 443)),
        (four(6, PORTS, options=b"\1" * 8), "tcp", (40000, 443)),
        (four(17, PORTS, offset=100), "udp", (None, None)),
        (four(47, PORTS), "47", (None, None)),
        (four(6, b"\0"), "tcp", (None, None)),
        (six(6, PORTS), "tcp", (40000, 443)),
        (six(0, HOP + PORTS), "tcp", (40000, 443)),
        (six(58, PORTS), "58", (None, None)),
    ],
)
def test_packets(data, proto, ports):
    packet = nflog.parse(data, prefix="initd", uid=501)
    assert packet is not None
    assert (packet.proto, (packet.sport, packet.dport)) == (proto, ports)
    assert str(packet.destination) in {"203.0.113.9", "2001:db8::9"}


@pytest.mark.parametrize("data", [b"", b"\x45", four(6, b"")[:19], six(0, b""), b"\x70" * 60])
def test_what_is_no_packet_is_none(data):
    assert nflog.parse(data, prefix="", uid=None) is None


@given(st.binary(max_size=nflog.COPIED))
def test_any_bytes_are_taken(data):
    nflog.parse(data, prefix="", uid=None)
