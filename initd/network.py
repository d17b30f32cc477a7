"""Runs: warden, at start and at reload. What the kernel says about this namespace's own networks.

Read from /proc/net/route and /proc/net/ipv6_route (Documentation/networking/proc_net_tcp.rst's neighbours;
field order in net/ipv4/fib_trie.c fib_route_seq_show and net/ipv6/route.c rt6_native_seq_show).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initd.core.ruleset import IPAddress, IPNetwork

RTF_UP = 0x1
RTF_GATEWAY = 0x2
RTF_LOCAL = 0x8000_0000


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """`subnets`: directly connected networks. `gateways`: next hops of default routes, as /32 and /128."""

    subnets: tuple[IPNetwork, ...]
    gateways: tuple[IPNetwork, ...]

    def connects(self, address: IPAddress) -> bool:
        """Whether `address` lies in a directly connected network."""
        return any(address in network for network in self.subnets)


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
    return Neighbourhood(tuple(dict.fromkeys(subnets)), tuple(dict.fromkeys(gateways)))


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
