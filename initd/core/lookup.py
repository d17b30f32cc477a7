"""What a policy says about one name or one address, prepared once so that a query costs a few dictionary lookups.

The DNS guard asks for every query. A name that the policy mentions, and every parent of one, has its decision ready;
any other name has the decision of the nearest mentioned name above it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from initd.core.entries import Decision, Denial, NameRule, Origin, Service, Verdict
from initd.core.names import ancestors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from ipaddress import IPv4Address, IPv6Address

    from initd.core.entries import RangeRule

_NONE: frozenset[Service] = frozenset()
UNLISTED = Decision(Verdict.UNLISTED, _NONE, (), literal=False)
PARENT = Decision(Verdict.PARENT, _NONE, (), literal=False)


class Lookup:
    """Decisions of one policy; made by `Policy.lookup()`. Immutable after that."""

    __slots__ = ("_below", "_exact", "_ranges")

    def __init__(self, names: Iterable[NameRule], denials: Iterable[Denial], ranges: Iterable[RangeRule]) -> None:
        literal: defaultdict[str, list[NameRule]] = defaultdict(list)
        wild: defaultdict[str, list[NameRule]] = defaultdict(list)
        for rule in names:
            (wild if rule.wildcard else literal)[rule.name].append(rule)
        at: defaultdict[str, list[Denial]] = defaultdict(list)
        below: defaultdict[str, list[Denial]] = defaultdict(list)
        for denial in denials:
            below[denial.name].append(denial)
            if not denial.wildcard:
                at[denial.name].append(denial)
        self._ranges = tuple(ranges)
        from_above = _Inheritance(wild, below)
        self._below = {name: _decide([], *from_above.below(name)) for name in wild.keys() | below.keys()}
        self._exact = {
            name: _decide(literal.get(name, []), *from_above.of(name), at.get(name, []))
            for name in literal.keys() | at.keys()
        }
        self._mark_parents(literal, wild)

    def decide(self, name: str) -> Decision:
        """The decision on `name` (lower case, no trailing dot): exceptions win, then all rules that match together."""
        found = self._exact.get(name)
        if found is not None:
            return found
        below = self._below
        dot = name.find(".")
        while dot >= 0:
            found = below.get(name[dot + 1 :])
            if found is not None:
                return found
            dot = name.find(".", dot + 1)
        return UNLISTED

    def decide_address(self, address: IPv4Address | IPv6Address, service: Service) -> tuple[Origin, ...]:
        """The lines whose ranges hold `address` with `service`; none means refused, unless DNS has taught it.

        A v4-mapped address counts as the IPv4 address that the kernel sends to.
        """
        seen = address if address.version == 4 else (address.ipv4_mapped or address)
        return tuple(
            sorted({rule.origin for rule in self._ranges if service in rule.services and seen in rule.network})
        )

    def _mark_parents(self, literal: Iterable[str], wild: Iterable[str]) -> None:
        """A parent of something listed exists as far as a resolver is concerned (RFC 8020): never NXDOMAIN."""
        for name in literal:
            if self._exact[name].verdict is Verdict.LISTED:
                self._mark(ancestors(name))
        for name in wild:
            if self._below[name].verdict is Verdict.LISTED:
                self._mark([name, *ancestors(name)])

    def _mark(self, parents: Iterable[str]) -> None:
        for parent in parents:
            decision = self.decide(parent)
            if decision is PARENT:
                return  # and so are those above it
            if decision is UNLISTED:
                self._exact[parent] = PARENT


class _Inheritance:
    """What wildcards and exceptions above a name say about it; names with the same parent share the answer."""

    def __init__(self, wild: Mapping[str, list[NameRule]], below: Mapping[str, list[Denial]]) -> None:
        self._wild = wild
        self._below = below
        self._known: dict[str, tuple[list[NameRule], list[Denial]]] = {}

    def of(self, name: str) -> tuple[list[NameRule], list[Denial]]:
        """Rules at the proper parents of `name`, the nearest first."""
        return self.below(name.partition(".")[2])

    def below(self, name: str) -> tuple[list[NameRule], list[Denial]]:
        """Rules that hold for the names below `name`, the nearest first."""
        known = self._known.get(name)
        if known is None:
            chain = [name, *ancestors(name)]
            known = self._known[name] = (
                [rule for one in chain for rule in self._wild.get(one, ())],
                [rule for one in chain for rule in self._below.get(one, ())],
            )
        return known


def _decide(literal: list[NameRule], wild: list[NameRule], above: list[Denial], at: Iterable[Denial] = ()) -> Decision:
    if denied := [*at, *above]:
        origins = tuple(sorted({denial.origin for denial in denied}))
        return Decision(Verdict.DENIED, _NONE, origins, literal=False)
    rules = literal + wild
    services = rules[0].services if len(rules) == 1 else _NONE.union(*(rule.services for rule in rules))
    return Decision(
        Verdict.LISTED, services, tuple(dict.fromkeys(rule.origin for rule in rules)), literal=bool(literal)
    )
