"""A lease is the time for which an address may be reached because a name resolved to it.

Lifetime: max(TTL, floor) + grace, from the latest answer that held the address (`Terms.lifetime`). An address that
several names hold lives as long as the longest of them. All times are seconds of one monotonic clock, given by the
caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from typing import TYPE_CHECKING, Any

from initd.core.ruleset import LEARNED_MOST, Element
from initd.core.wire import MAX_TTL

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from initd.core.policy import Service
    from initd.core.ruleset import IPAddress

WILD_MOST = LEARNED_MOST // 4
"""What names below wildcards may hold together: a lease counts one, and each of its services one more.

Whoever owns such a zone can make up names and addresses without end. What is left of the kernel's set is for names
that are listed literally; of those the policy bounds the number and `Terms.cap` the addresses.
"""

MAX_SAVED = LEARNED_MOST
"""Addresses that are taken from a saved state."""


class Lease:
    """`services` of one address for one name, until `expires`; `literal` as in `Held`, `left` as in `answered`."""

    __slots__ = ("address", "expires", "left", "literal", "name", "services")

    def __init__(self, name: str, address: IPAddress, expires: float, *, literal: bool) -> None:
        self.name = name
        self.address = address
        self.services: frozenset[Service] = frozenset()
        self.expires = expires
        self.literal = literal
        self.left = False


class _Use:
    """How many leases use one service of an address, and until when at most: no lease has to be asked for that."""

    __slots__ = ("leases", "until")

    def __init__(self) -> None:
        self.leases = 0
        self.until = 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """What `name` may open at some addresses; `literal` when it is listed by itself, not only by a wildcard."""

    name: str
    addresses: tuple[IPAddress, ...]
    services: frozenset[Service]
    literal: bool


@dataclass(frozen=True, slots=True)
class Grant:
    """What an answer would change. `insert` must be in the kernel before `Leases.commit`."""

    held: Held
    expires: float
    insert: list[tuple[Element, int]]


@dataclass(frozen=True, slots=True)
class Terms:
    """`floor` and `grace` in seconds; `cap` addresses a name; `sweep` seconds pass at most between two sweeps."""

    floor: float = 60.0
    grace: float = 30.0
    cap: int = 512
    sweep: float = 15.0

    @property
    def longest(self) -> float:
        """Seconds that any lease lasts at most."""
        return self.lifetime(MAX_TTL)

    def lifetime(self, ttl: float) -> float:
        """Seconds that an address of an answer with this (remaining) TTL may be reached."""
        return max(ttl, self.floor) + self.grace


class Leases:
    """Who may be reached, because of which name, until when. Not thread-safe."""

    def __init__(self, terms: Terms | None = None) -> None:
        self.terms = terms or Terms()
        self._by_name: dict[str, dict[IPAddress, Lease]] = {}  # inner: least recently answered first
        self._by_address: dict[IPAddress, dict[str, Lease]] = {}
        self._uses: dict[IPAddress, dict[Service, _Use]] = {}
        self._in_use: Collection[IPAddress] = frozenset()
        self._count = 0
        self._wild = 0  # as WILD_MOST counts

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Lease]:
        return (lease for held in self._by_name.values() for lease in held.values())

    def names(self) -> tuple[str, ...]:
        """Names that hold a lease."""
        return tuple(self._by_name)

    def of(self, address: IPAddress) -> tuple[Lease, ...]:
        """The leases on `address`; those without services were only looked up, in audit mode."""
        return tuple(self._by_address.get(address, {}).values())

    def addresses_of(self, name: str) -> tuple[IPAddress, ...]:
        """Addresses that `name` holds, least recently answered first."""
        return tuple(self._by_name.get(name, ()))

    def answered(self, name: str, version: int, addresses: Iterable[IPAddress]) -> None:
        """DNS says that `name` has these addresses of IPv4 or IPv6; others, still open for now, it has left."""
        addresses = frozenset(addresses)
        for lease in self._by_name.get(name, {}).values():
            if lease.address.version == version:
                lease.left = lease.address not in addresses

    def last_answer(self, name: str) -> tuple[IPAddress, ...]:
        """Addresses that `name` holds and has not left."""
        return tuple(lease.address for lease in self._by_name.get(name, {}).values() if not lease.left)

    def has_room(self, held: Held) -> bool:
        """Whether the leases that an answer adds stay within `WILD_MOST`; one that adds none always does."""
        known = self._by_name.get(held.name, ())
        fresh = sum(address not in known for address in held.addresses)
        return held.literal or not fresh or self._wild + fresh * (1 + len(held.services)) <= WILD_MOST

    def grant(self, held: Held, *, lifetime: float, now: float) -> Grant:
        """What an answer must put into the kernel; changes nothing. Addresses beyond the cap are left out.

        Its services are those that the name's other leases have: a policy that changes them goes through `reconsider`.
        An element's time-out never goes below what another lease on it needs.
        """
        held = replace(held, addresses=held.addresses[: self.terms.cap])
        expires = now + lifetime
        insert: list[tuple[Element, int]] = []
        for address in held.addresses:
            insert += self._elements(address, held.services, expires=expires, now=now)
        return Grant(held, expires, insert)

    def commit(self, grant: Grant) -> list[Element]:
        """Record `grant`, now that the kernel holds it; returns what to forget, because the name is over its cap."""
        name, addresses = grant.held.name, grant.held.addresses
        leases = self._by_name.setdefault(name, {})
        for address in addresses:
            lease = leases.pop(address, None)
            if lease is None:
                lease = Lease(name, address, grant.expires, literal=grant.held.literal)
                self._by_address.setdefault(address, {})[name] = lease
                self._count += 1
                self._wild += not lease.literal
            lease.expires = max(lease.expires, grant.expires)
            self._use(lease, grant.held.services)
            leases[address] = lease
        excess = len(leases) - self.terms.cap
        if excess <= 0:
            return []
        kept = set(addresses).union(self._in_use)
        unused = [lease for address, lease in leases.items() if address not in kept]
        return self._remove(unused[:excess])

    def reconsider(
        self, services_of: Callable[[str, IPAddress], frozenset[Service]], *, now: float
    ) -> tuple[list[Element], list[tuple[Element, int]]]:
        """Hold every lease to a new policy: elements that nobody may use any more, and elements to add."""
        removed: list[Lease] = []
        before: list[Element] = []
        gained: list[tuple[Element, int]] = []
        for lease in self:
            services = services_of(lease.name, lease.address)
            if services == lease.services:
                continue
            before += [_element(lease.address, service) for service in lease.services - services]
            if lease.expires > now:  # a time-out of 0 would mean for ever (ipset(8))
                gained += self._elements(lease.address, services - lease.services, expires=lease.expires, now=now)
            self._use(lease, services)
            if not services:
                removed.append(lease)
        self._remove(removed)
        return [element for element in dict.fromkeys(before) if not self.needs(element)], gained

    def sweep(self, now: float, in_use: Collection[IPAddress]) -> tuple[list[tuple[Element, int]], list[Element]]:
        """Extend what ends before the next sweep and has an open connection; end what is over.

        Returns elements to refresh (with seconds to live) and elements to forget.
        """
        self._in_use = in_use
        extend: list[tuple[Element, int]] = []
        over: list[Lease] = []
        longer = now + max(self.terms.floor + self.terms.grace, 2 * self.terms.sweep)
        for lease in self:
            if lease.address in in_use and lease.expires <= now + self.terms.sweep:
                lease.expires = longer
                self._use(lease, lease.services)
                extend += self._elements(lease.address, lease.services, expires=longer, now=now)
            elif lease.expires <= now:
                over.append(lease)
        return list(dict(extend).items()), self._remove(over)

    def to_state(self, now: float) -> dict[str, dict[str, int]]:
        """Name → address → remaining seconds, as TOML can hold it."""
        return {
            name: {str(address): math.ceil(lease.expires - now) for address, lease in held.items()}
            for name, held in self._by_name.items()
        }

    def needs(self, element: Element) -> bool:
        """Whether some lease needs `element` in the kernel."""
        uses = self._uses.get(element.network.network_address, {})
        return any(service.port == element.port and service.proto == element.proto for service in uses)

    def _use(self, lease: Lease, services: frozenset[Service]) -> None:
        """Let `lease` have `services`, until it expires."""
        uses = self._uses.setdefault(lease.address, {})
        for service in lease.services - services:
            uses[service].leases -= 1
            if not uses[service].leases:
                del uses[service]
        for service in services - lease.services:
            uses.setdefault(service, _Use()).leases += 1
        for service in services:
            uses[service].until = max(uses[service].until, lease.expires)
        if not uses:
            del self._uses[lease.address]
        if not lease.literal:
            self._wild += len(services) - len(lease.services)
        lease.services = services

    def _elements(
        self, address: IPAddress, services: Iterable[Service], *, expires: float, now: float
    ) -> list[tuple[Element, int]]:
        uses = self._uses.get(address, {})
        network = _network(address)
        elements = []
        for service in services:
            last = max(expires, uses[service].until) if service in uses else expires
            elements.append((Element(network, service.proto, service.port), math.ceil(last - now)))
        return elements

    def _remove(self, leases: list[Lease]) -> list[Element]:
        """Drop `leases`; the elements that no other lease needs."""
        elements: dict[Element, None] = {}
        for lease in leases:
            held = self._by_name[lease.name]
            del held[lease.address]
            if not held:
                del self._by_name[lease.name]
            holders = self._by_address[lease.address]
            del holders[lease.name]
            if not holders:
                del self._by_address[lease.address]
            self._count -= 1
            self._wild -= not lease.literal
            elements.update((_element(lease.address, service), None) for service in lease.services)
            self._use(lease, frozenset())
        return [element for element in elements if not self.needs(element)]


def from_state(data: Any) -> dict[str, dict[IPAddress, int]]:
    """`Leases.to_state`, read back: name → address → remaining seconds when it was saved.

    What is not of that form is left out: a saved state is a convenience and opens nothing by itself, since every
    name is judged by the policy again.
    """
    saved: dict[str, dict[IPAddress, int]] = {}
    left = MAX_SAVED
    for name, held in data.items() if isinstance(data, dict) else ():
        if not isinstance(name, str) or not isinstance(held, dict):
            continue
        good: dict[IPAddress, int] = {}
        for text, seconds in held.items():
            if left == 0:
                break
            try:
                address = ip_address(text)
            except ValueError:
                continue
            if isinstance(seconds, int) and not isinstance(seconds, bool):
                good[address] = seconds
                left -= 1
        if good:
            saved[name] = good
    return saved


def _network(address: IPAddress) -> IPv4Network | IPv6Network:
    # By number: from an address object it would be made through text, which takes three times as long.
    return IPv4Network(int(address)) if isinstance(address, IPv4Address) else IPv6Network(int(address))


def _element(address: IPAddress, service: Service) -> Element:
    return Element(_network(address), service.proto, service.port)
