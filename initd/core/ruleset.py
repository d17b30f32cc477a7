"""A `Ruleset` is everything the kernel is to hold, as plain data; a backend receives nothing else.

Addresses learned from DNS are not part of it: they live in sets with time-outs that `apply` creates and never
empties (see `initd.kernel.base.Backend`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NamedTuple

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """An upstream resolver: TCP and UDP to `address`:`port`."""

    address: IPAddress
    port: int = 53


class Element(NamedTuple):
    """One member of a set: packets to `network` with this protocol ("tcp", "udp") and destination port.

    A tuple and not a dataclass: policies with 100,000 ranges make 300,000 of them.
    """

    network: IPNetwork
    proto: str
    port: int


@dataclass(frozen=True, slots=True)
class Ruleset:
    """What OUTPUT, INPUT and FORWARD are to do, in the order of docs/architecture.md ("Rules").

    `warden_uid` may reach `upstreams` on TCP and UDP, and `fetch` on TCP 443; nobody else may.
    `engine_dns` lets UID 0 reach port 53 anywhere: Docker's embedded resolver (127.0.0.11) forwards from inside
    the container's namespace as root. `static` holds public elements, `private` those inside `SPECIAL` ranges.
    `subnets` may open connections to the box (INPUT). `log` turns on the rate-limited NFLOG rule.
    """

    warden_uid: int
    upstreams: frozenset[Endpoint] = frozenset()
    fetch: frozenset[IPAddress] = frozenset()
    engine_dns: bool = False
    static: frozenset[Element] = frozenset()
    private: frozenset[Element] = frozenset()
    subnets: frozenset[IPNetwork] = frozenset()
    log: bool = field(default=True)
