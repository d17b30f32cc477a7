"""Policy and what is known at run time → `Ruleset`; and whether a set of elements holds one destination."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from initd.core.ruleset import Element, Ruleset
from initd.core.special import inside_special

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from initd.core.policy import Feed, Policy
    from initd.core.ruleset import Endpoint, IPAddress, IPNetwork

ENGINE_DNS = "127.0.0.11"
"""Docker's embedded resolver (libnetwork's resolver.go)."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a ruleset needs besides the policy. `feeds` holds the networks that each feed yields now."""

    warden_uid: int
    upstreams: frozenset[Endpoint]
    subnets: frozenset[IPNetwork]
    feeds: Mapping[Feed, tuple[IPNetwork, ...]]


def compile_ruleset(policy: Policy, context: Context) -> Ruleset:
    """The ruleset of `policy`: elements wholly inside a special range are `private`, all others static.

    One that only touches a special range is static, so that the rule against special ranges still refuses that part.
    """
    private: set[Element] = set()
    static: set[Element] = set()
    granted = [(rule.network, rule.services) for rule in policy.ranges]
    granted += [(network, rule.services) for rule in policy.feeds for network in context.feeds.get(rule.feed, ())]
    for network, services in granted:
        target = private if inside_special(network) else static
        target.update(Element(network, service.proto, service.port) for service in services)
    return Ruleset(
        warden_uid=context.warden_uid,
        upstreams=context.upstreams,
        engine_dns=any(str(endpoint.address) == ENGINE_DNS for endpoint in context.upstreams),
        static=frozenset(static),
        private=frozenset(private),
        subnets=context.subnets,
    )


class Membership:
    """Answers "is this destination held" for a set of elements in one lookup per prefix length."""

    def __init__(self, elements: Iterable[Element]) -> None:
        self._held: set[tuple[int, int, int, str, int]] = set()
        lengths: defaultdict[int, set[int]] = defaultdict(set)
        for network, proto, port in elements:
            lengths[network.version].add(network.prefixlen)
            self._held.add((network.version, int(network.network_address), network.prefixlen, proto, port))
        self._lengths = {version: sorted(found, reverse=True) for version, found in lengths.items()}

    def holds(self, address: IPAddress, proto: str, port: int) -> bool:
        """Whether any element covers `address` with this protocol and port."""
        number, width = int(address), address.max_prefixlen
        return any(
            (address.version, number >> (width - length) << (width - length), length, proto, port) in self._held
            for length in self._lengths.get(address.version, ())
        )
