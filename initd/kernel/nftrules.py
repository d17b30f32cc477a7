"""A `Ruleset` as nftables rules, in the canonical words that `initd.kernel.nftlisting` gives back for them. Pure.

Order and meaning: docs/architecture.md, "Rules". Protocols are numbers, because names need /etc/protocols, which slim
images lack. An `accept` ends only our own chain, and nobody else's `accept` undoes our `reject` (nft(8), "verdict").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from initd.core.ruleset import ENGINE_DNS, LEARNED_MOST
from initd.core.special import SPECIAL4, SPECIAL6

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from initd.core.ruleset import Element, IPAddress, IPNetwork, Ruleset

COUNTERS = ("dns", "input", "special", "unlisted")
CHAINS: Mapping[str, str] = {
    "output": "type filter hook output priority 0; policy drop;",
    "input": "type filter hook input priority 0; policy drop;",
    "forward": "type filter hook forward priority 0; policy drop;",
    "refuse": "",
}
"""Chain → its declaration. The policy is reached only when somebody empties the chain: then the box is shut."""

_FAMILIES = ((4, "ip"), (6, "ip6"))
_NEIGHBOUR = "icmpv6 type { nd-neighbor-advert, nd-neighbor-solicit, nd-router-advert, nd-router-solicit } accept"
_OURS = ('oifname "lo" tcp flags rst accept', 'fib saddr type != local counter name "unlisted" drop')
"""A source that is not ours, which IPv6 lets everybody have (IPV6_FREEBIND; ipv6_can_nonlocal_bind()).

Sent to ourselves it would have connection tracking know a flow from there, and what we answer would be established.
Dropped: a refusal would go to that source, and quote what was sent. But the resets with which we refuse come from where
the refused went, and no reset begins a flow (nf_conntrack_proto_tcp.c, tcp_conntracks)."""
_STAND_IN = f'ip saddr {ENGINE_DNS} ct direction original counter name "dns" drop'
"""The engine's resolver only answers, and from another port than 53. Whoever sent from 127.0.0.11:53 to ports that the
warden will ask from would have connection tracking take its questions for answers to that: they would not be rewritten
to the engine's port, and reach him."""
_ESTABLISHED = ("ct state established accept", "ct state related meta l4proto { 1, 58 } accept")
_GOING_ON = (
    "ct state established tcp flags ack accept",
    "ct state established tcp flags rst accept",
    "ct state established udp dport != 53 accept",
    "ct state established meta l4proto { 1, 58 } accept",
)
"""A connection's first packet, and UDP to port 53, is judged each time. Connection tracking knows a flow by addresses
and ports alone, also after its end: for 30 s after UDP's last packet, and for 10 s or more after a reset. Whoever takes
the source port of a question that the warden, or Docker's resolver, has just asked would count as established."""
_LOOPBACK = 'oifname "lo" fib daddr type != unicast accept'
"""Whoever names lo as the way out (IP_PKTINFO, SO_BINDTODEVICE) gets there with any IPv4 address, which the kernel
takes for a neighbour's (ip_route_output_key_hash_rcu()). It leads nowhere, but would begin a flow that the outside can
answer."""
_RESET = "ct state related tcp flags rst accept"
"""The reset with which INPUT refuses: nf_send_reset() ties it to the connection that never came to be (nf_ct_attach).
Nothing else of TCP is related where no conntrack helper is assigned, and that takes NET_ADMIN."""
_REFUSE = ("meta l4proto 6 reject with tcp reset", "reject with icmpx admin-prohibited")
_LOG = 'limit rate 10/second burst 20 packets log prefix "{}" group 1'
AUDIT = "initd-audit"
"""The set that holds the IP versions that audit mode is on for, each for as long as it lasts."""
_AUDITED = f"meta nfproto @{AUDIT}"
_RESOLVERS = "meta l4proto { 6, 17 } th dport 53"

Rules = dict[str, tuple[str, ...]]


def set_types() -> Iterator[tuple[str, str]]:
    """Set name → its definition, as nft(8) reads it."""
    for version, _ in _FAMILIES:
        key = f"type ipv{version}_addr . inet_proto . inet_service;"
        yield f"initd{version}-static", f"{key} flags interval;"
        yield f"initd{version}-private", f"{key} flags interval;"
        yield f"initd{version}-special", f"type ipv{version}_addr; flags interval;"
        yield f"initd{version}-learned", f"{key} size {LEARNED_MOST}; flags timeout;"
    yield AUDIT, "type nf_proto; flags timeout;"


def special_sets() -> dict[str, tuple[str, ...]]:
    """What the special sets hold, always."""
    return {
        "initd4-special": tuple(sorted(map(str, SPECIAL4))),
        "initd6-special": tuple(sorted(map(str, SPECIAL6))),
    }


def merged(elements: Iterable[Element]) -> dict[str, frozenset[Element]]:
    """Set name suffix ("4", "6") → elements without those that lie inside another of the same service.

    The kernel refuses overlapping intervals in a set of concatenations (nft_pipapo_insert(), ENOTEMPTY).
    """
    groups: dict[tuple[int, str, int], list[tuple[int, int, Element]]] = {}
    for element in elements:
        network = element.network
        service = (network.version, element.proto, element.port)
        groups.setdefault(service, []).append((int(network.network_address), network.prefixlen, element))
    kept: dict[str, list[Element]] = {"4": [], "6": []}
    for (version, _, _), members in groups.items():
        bits = 32 if version == 4 else 128
        end = -1
        for first, prefix, element in sorted(members, key=lambda member: member[:2]):
            if first > end:
                end = first + (1 << bits - prefix) - 1
                kept[str(version)].append(element)
    return {version: frozenset(group) for version, group in kept.items()}


def _family(address: IPAddress | IPNetwork) -> str:
    return "ip" if address.version == 4 else "ip6"


def _warden(ruleset: Ruleset) -> Iterator[str]:
    """The warden's own ways out. Docker has rewritten port 53 of its resolver before this hook (nat, -100)."""
    who = f"meta skuid {ruleset.warden_uid}"
    if any(end.address == ENGINE_DNS for end in ruleset.upstreams):
        yield f"{who} ip daddr {ENGINE_DNS} accept"
    for end in sorted(ruleset.upstreams):
        if end.address != ENGINE_DNS:
            where = f"{_family(end.address)} daddr {end.address}"
            yield f"{who} {where} meta l4proto {{ 6, 17 }} th dport {end.port} accept"


def _listed(kind: str) -> Iterator[str]:
    for version, family in _FAMILIES:
        yield f"{family} daddr . meta l4proto . th dport @initd{version}-{kind} accept"


def _output(ruleset: Ruleset) -> Iterator[str]:
    yield _NEIGHBOUR
    yield from _OURS
    yield _STAND_IN
    yield from _warden(ruleset)
    if ruleset.engine_dns:
        yield "meta skuid 0 meta l4proto { 6, 17 } th dport 53 accept"
    yield f'ip daddr {ENGINE_DNS} counter name "dns" goto refuse'
    yield _LOOPBACK
    yield from _GOING_ON
    yield _ESTABLISHED[1]
    yield _RESET
    yield from _listed("private")
    yield from _listed("learned")
    for version, family in _FAMILIES:
        special = f"{family} daddr @initd{version}-special"
        if ruleset.log:
            yield f"{special} {_LOG.format('initd-special')}"
        yield f'{special} counter name "special" goto refuse'
    yield from _listed("static")
    yield from _unlisted(ruleset)


def _unlisted(ruleset: Ruleset) -> Iterator[str]:
    """Refuse the rest; audit mode lets it go, but to no resolver: names are asked of the guard, or none is recorded."""
    if ruleset.audit is not None:
        if ruleset.log:
            yield f"{_RESOLVERS} {_LOG.format('initd')}"
        yield f'{_RESOLVERS} counter name "unlisted" goto refuse'
        if ruleset.log:
            yield f"{_AUDITED} {_LOG.format('initd-audit')}"
        yield f"{_AUDITED} accept"
    if ruleset.log:
        yield _LOG.format("initd")
    yield 'counter name "unlisted" goto refuse'


def _input(subnets: Iterable[IPNetwork]) -> Iterator[str]:
    yield 'iifname "lo" accept'
    yield _NEIGHBOUR
    yield from _ESTABLISHED
    for network in sorted(subnets, key=lambda net: (net.version, int(net.network_address), net.prefixlen)):
        yield f"{_family(network)} saddr {_network(network)} accept"
    yield 'counter name "input" goto refuse'


def _network(network: IPNetwork) -> str:
    """A network as nft lists it: a host without its prefix length."""
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)


def enforcing(ruleset: Ruleset) -> Rules:
    """Chain → rules that enforce `ruleset`."""
    return {
        "output": tuple(_output(ruleset)),
        "input": tuple(_input(ruleset.subnets)),
        "forward": ("goto refuse",),
        "refuse": _REFUSE,
    }


def locked(warden_uid: int) -> Rules:
    """Chain → rules that refuse all but loopback and neighbour discovery."""
    return {
        "output": (
            _NEIGHBOUR,
            *_OURS,
            f"meta skuid {warden_uid} ip daddr {ENGINE_DNS} accept",
            f'ip daddr {ENGINE_DNS} counter name "dns" goto refuse',
            _LOOPBACK,
            'counter name "unlisted" goto refuse',
        ),
        "input": ('iifname "lo" accept', _NEIGHBOUR, 'counter name "input" goto refuse'),
        "forward": ("goto refuse",),
        "refuse": _REFUSE,
    }
