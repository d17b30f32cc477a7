"""Runs: warden, at start and at reload. What the kernel says about this namespace's own networks.

Read from /proc/net: route and fib_trie (net/ipv4/fib_trie.c, fib_route_seq_show and fib_trie_seq_show), ipv6_route
(net/ipv6/route.c, rt6_native_seq_show) and if_inet6 (net/ipv6/addrconf.c, if6_seq_show).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initd.core.ruleset import IPAddress, IPNetwork

RTF_UP = 0x1
RTF_GATEWAY = 0x2
RTF_LOCAL = 0x8000_0000


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """`subnets`: directly connected networks. `gateways`: next hops of default routes, as /32 and /128.

    `addresses`: this namespace's own, loopback included.
    """

    subnets: tuple[IPNetwork, ...]
    gateways: tuple[IPNetwork, ...]
    addresses: frozenset[IPAddress]


def neighbourhood(proc: Path = Path("/proc/net")) -> Neighbourhood:
    """The namespace's networks now; a family that is absent contributes nothing."""
    subnets: list[IPNetwork] = []
    gateways: list[IPNetwork] = []
    for network, gateway in [*_routes4(_lines(proc / "route")), *_routes6(_lines(proc / "ipv6_route"))]:
        if gateway is None:
            if network.prefixlen:
                subnets.append(network)
        elif network.prefixlen == 0:
            gateways.append(_host(gateway))
    own = [*_local4(_lines(proc / "fib_trie")), *_local6(_lines(proc / "if_inet6"))]
    return Neighbourhood(tuple(dict.fromkeys(subnets)), tuple(dict.fromkeys(gateways)), frozenset(own))


def _host(address: IPAddress) -> IPNetwork:
    return IPv4Network(address) if isinstance(address, IPv4Address) else IPv6Network(address)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _routes4(lines: list[str]) -> list[tuple[IPNetwork, IPAddress | None]]:
    routes: list[tuple[IPNetwork, IPAddress | None]] = []
    for line in lines[1:]:
        interface, destination, gateway, flags, *_, mask = line.split()[:8]
        if interface == "lo" or not int(flags, 16) & RTF_UP:
            continue
        bits = int(mask, 16).bit_count()
        network = IPv4Network((_address4(destination), bits))
        routes.append((network, _address4(gateway) if int(flags, 16) & RTF_GATEWAY else None))
    return routes


def _address4(text: str) -> IPv4Address:
    # The kernel prints the big-endian word as a host integer (fib_route_seq_show).
    return IPv4Address(int(text, 16).to_bytes(4, sys.byteorder))


def _routes6(lines: list[str]) -> list[tuple[IPNetwork, IPAddress | None]]:
    routes: list[tuple[IPNetwork, IPAddress | None]] = []
    for line in lines:
        destination, bits, _source, _sbits, gateway, _metric, _refs, _use, flags, interface = line.split()
        network = IPv6Network((bytes.fromhex(destination), int(bits, 16)))
        ordinary = not (network.is_link_local or network.is_multicast or network.prefixlen == 128)
        if interface == "lo" or int(flags, 16) & RTF_LOCAL or not int(flags, 16) & RTF_UP or not ordinary:
            continue
        routes.append((network, IPv6Address(bytes.fromhex(gateway)) if int(flags, 16) & RTF_GATEWAY else None))
    return routes


def _local4(lines: list[str]) -> list[IPAddress]:
    """A leaf names an address, the line below it says what it is for."""
    return [
        IPv4Address(leaf.split()[-1])
        for leaf, kind in pairwise(lines)
        if "|--" in leaf and kind.split() == ["/32", "host", "LOCAL"]
    ]


def _local6(lines: list[str]) -> list[IPAddress]:
    return [IPv6Address(bytes.fromhex(line.split()[0])) for line in lines]
