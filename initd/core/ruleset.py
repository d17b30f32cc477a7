"""A `Ruleset` is everything the kernel is to hold, as plain data; a backend receives nothing else.

Addresses learned from DNS are not part of it: they live in sets with time-outs that `apply` creates and never
empties (see `initd.kernel.base.Backend`).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING, NamedTuple

from initd.core.special import SPECIAL4, SPECIAL6

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from initd.core.policy import Feed, FeedRule, RangeRule, Service

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An upstream resolver: TCP and UDP to `address`:`port`."""

    address: IPAddress
    port: int = 53

    def __lt__(self, other: Endpoint) -> bool:
        """IPv4 first: addresses of two families do not compare by themselves."""
        mine, theirs = ((one.address.version, int(one.address), one.port) for one in (self, other))
        return mine < theirs


class Element(NamedTuple):
    """One member of a set: packets to `network` with this protocol ("tcp", "udp") and destination port.

    A tuple and not a dataclass: policies with 100,000 ranges make 300,000 of them.
    """

    network: IPNetwork
    proto: str
    port: int


ENGINE_DNS = IPv4Address("127.0.0.11")
"""Docker's embedded resolver, in the network namespace of each container of a user-defined network (resolver.go)."""

LEARNED_MOST = 1 << 18
"""Elements that a learned set must have room for (`core.leases.WILD_MOST` says why so many); nothing is reserved."""


@dataclass(frozen=True, slots=True)
class Ruleset:
    """What OUTPUT, INPUT and FORWARD are to do, in the order of docs/architecture.md ("Rules").

    `warden_uid` may reach `upstreams` on TCP and UDP; nobody else may.
    `engine_dns` lets UID 0 reach port 53 anywhere: Docker's embedded resolver (127.0.0.11) forwards from inside
    the container's namespace as root. `static` holds public elements, `private` those inside `SPECIAL` ranges.
    `subnets` may open connections to the box (INPUT). `log` turns on the rate-limited NFLOG rules. Until `audit`,
    monotonic seconds, what is merely unlisted is let go, logged with a prefix of its own; special ranges and other
    resolvers stay shut. The kernel itself ends that, by the time-out of a set; it knows no end for infinity.
    """

    warden_uid: int
    upstreams: frozenset[Endpoint] = frozenset()
    engine_dns: bool = False
    static: frozenset[Element] = frozenset()
    private: frozenset[Element] = frozenset()
    subnets: frozenset[IPNetwork] = frozenset()
    log: bool = field(default=True)
    audit: float | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a ruleset needs to know that no policy says; the fields are those of `Ruleset`."""

    warden_uid: int
    upstreams: frozenset[Endpoint] = frozenset()
    engine_dns: bool = False
    subnets: frozenset[IPNetwork] = frozenset()
    log: bool = True
    audit: float | None = None


def compile_ruleset(
    ranges: Iterable[RangeRule],
    feeds: Iterable[FeedRule],
    *,
    networks: Mapping[Feed, Sequence[IPNetwork]],
    around: Surroundings,
) -> Ruleset:
    """The ruleset of a policy's ranges and of what its feeds yielded; a feed that `networks` lacks yields nothing.

    Networks are merged for each service, public and special ones apart: a range that only touches special ones
    stays `static`, so that its special part is refused, also beside a neighbour that is listed.
    """
    wanted: dict[Service, set[_Key]] = {}
    for rule in ranges:
        key = _key(rule.network)
        for service in rule.services:
            wanted.setdefault(service, set()).add(key)
    for feed in feeds:
        for service in feed.services:
            wanted.setdefault(service, set()).update(map(_key, networks.get(feed.feed, ())))
    alike: dict[frozenset[_Key], list[Service]] = {}
    for service, keys in wanted.items():
        alike.setdefault(frozenset(keys), []).append(service)
    static: list[Element] = []
    private: list[Element] = []
    for members, services in alike.items():
        special = {key for key in members if _inside_special(key)}
        for chosen, elements in ((members - special, static), (special, private)):
            for network in map(_network, _merged(chosen)):
                elements.extend([Element(network, service.proto, service.port) for service in services])
    return Ruleset(
        around.warden_uid,
        upstreams=around.upstreams,
        engine_dns=around.engine_dns,
        static=frozenset(static),
        private=frozenset(private),
        subnets=around.subnets,
        log=around.log,
        audit=around.audit,
    )


_Key = tuple[int, int, int]  # version, first address, prefix length: 100,000 networks are handled as numbers
_BITS = {4: 32, 6: 128}


def _key(network: IPNetwork) -> _Key:
    return network.version, int(network.network_address), network.prefixlen


def _network(key: _Key) -> IPNetwork:
    version, first, prefix = key
    return IPv4Network((first, prefix)) if version == 4 else IPv6Network((first, prefix))


_SPECIAL: list[tuple[int, int, int]] = sorted(
    (network.version, int(network.network_address), int(network.broadcast_address)) for network in SPECIAL4 + SPECIAL6
)


def _inside_special(key: _Key) -> bool:
    """True when every address is special, found by bisection: the special ranges do not overlap."""
    version, first, prefix = key
    index = bisect_right(_SPECIAL, (version, first, 1 << 128)) - 1
    if index < 0 or _SPECIAL[index][0] != version:
        return False
    return first + (1 << (_BITS[version] - prefix)) - 1 <= _SPECIAL[index][2]


def _merged(keys: Iterable[_Key]) -> list[_Key]:
    """The fewest networks that hold the same addresses, as `ipaddress.collapse_addresses` finds them.

    Never a /0, which no ipset can hold (net/netfilter/ipset/ip_set_hash_netport.c): that stays two halves.
    """
    kept: list[_Key] = []
    for network in sorted(half for key in keys for half in _halves(key)):
        version, first, prefix = network
        bits = _BITS[version]
        if kept and kept[-1][0] == version and kept[-1][1] >> (bits - kept[-1][2]) == first >> (bits - kept[-1][2]):
            continue  # inside the one before; sorting puts the wider of two with one start first
        kept.append(network)
        while prefix > 1 and len(kept) > 1 and kept[-2] == (version, first ^ (1 << (bits - prefix)), prefix):
            prefix -= 1
            first &= ~(1 << (bits - prefix - 1))
            kept[-2:] = [(version, first, prefix)]
    return kept


def _halves(key: _Key) -> tuple[_Key, ...]:
    version, first, prefix = key
    return (key,) if prefix else ((version, first, 1), (version, 1 << (_BITS[version] - 1), 1))
