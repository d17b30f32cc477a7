"""A policy is a frozen value; parsing it either succeeds whole or names every bad line.

The grammar is documented in docs/policy.md. Nothing here resolves, reads or logs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import TYPE_CHECKING

from initd.core.entries import (
    DEFAULT_SERVICES,
    Decision,
    Denial,
    Feed,
    FeedRule,
    IPNetwork,
    Issue,
    NameRule,
    Origin,
    PolicyError,
    RangeRule,
    Service,
    Verdict,
)
from initd.core.grammar import FaultError, parse_entry
from initd.core.lookup import Lookup
from initd.core.presets import DEFAULT_POLICY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from initd.core.grammar import Entry

__all__ = [
    "DEFAULT_POLICY",
    "DEFAULT_SERVICES",
    "MAX_BYTES",
    "MAX_LINES",
    "Decision",
    "Denial",
    "Feed",
    "FeedRule",
    "IPNetwork",
    "Issue",
    "Lookup",
    "NameRule",
    "Origin",
    "Policy",
    "PolicyChange",
    "PolicyError",
    "RangeRule",
    "Service",
    "Verdict",
    "changes",
    "decode",
    "dump",
    "parse",
    "widens",
]

FILE = "allowed-domains.txt"

MAX_BYTES = 1 << 20
MAX_LINES = 100_000


@dataclass(frozen=True, slots=True)
class Policy:
    """What may be reached. Each tuple is sorted and free of duplicates.

    Of rules that say the same, the one written first is kept; the others are in `repeats`, so that a decision can
    name every line it comes from.
    """

    names: tuple[NameRule, ...] = ()
    ranges: tuple[RangeRule, ...] = ()
    denials: tuple[Denial, ...] = ()
    feeds: tuple[FeedRule, ...] = ()
    repeats: tuple[Entry, ...] = ()

    def lookup(self) -> Lookup:
        """Prepare decisions; costs microseconds a rule, so make it once a policy."""
        rules = [*self.names, *self.denials, *self.ranges, *self.repeats]
        return Lookup(
            [rule for rule in rules if isinstance(rule, NameRule)],
            [rule for rule in rules if isinstance(rule, Denial)],
            [rule for rule in rules if isinstance(rule, RangeRule)],
        )


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """Entries in canonical text, sorted: what a new policy has and an old one has not, and the reverse."""

    added: tuple[str, ...]
    removed: tuple[str, ...]


def decode(raw: bytes, *, file: str = FILE) -> str:
    """The text of a policy file: UTF-8 with or without a BOM. Raises PolicyError with line and column."""
    if len(raw) > MAX_BYTES:
        raise _whole(file, f"larger than {MAX_BYTES >> 20} MiB", "list ranges or wildcards instead of single entries")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _whole(file, "UTF-16, not UTF-8", "save the file as UTF-8")
    if raw.count(b"\n") >= MAX_LINES and raw.rstrip(b"\n").count(b"\n") >= MAX_LINES:
        raise _whole(file, f"more than {MAX_LINES} lines", "list ranges or wildcards instead of single entries")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offsets of utf-8-sig do not count the BOM.
        good = error.object[: error.start].decode("utf-8-sig", "replace")
        raise _at(file, good, f"byte 0x{error.object[error.start]:02x} is not UTF-8") from error
    if "\0" in text:
        raise _at(file, text[: text.index("\0")], "NUL byte: this is not a text file")
    return text


def _whole(file: str, reason: str, hint: str) -> PolicyError:
    return PolicyError((Issue(file, 1, 1, reason, hint),))


def _at(file: str, before: str, reason: str) -> PolicyError:
    line = before.count("\n") + 1
    column = len(before) - (before.rfind("\n") + 1) + 1
    return PolicyError((Issue(file, line, column, reason, "save the file as plain UTF-8 text"),))


def parse(text: str, *, file: str = FILE) -> Policy:
    """The policy that `text` describes. Raises PolicyError with an Issue for every bad line; never half a policy."""
    entries: list[Entry] = []
    issues: list[Issue] = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        content = line.partition("#")[0]
        if not (entry := content.strip(" \t\r")):
            continue
        try:
            entries += parse_entry(entry, Origin(number, entry))
        except FaultError as fault:
            column = content.index(entry) + fault.offset_in(entry) + 1
            issues.append(Issue(file, number, column, fault.reason, fault.hint))
    if issues:
        raise PolicyError(tuple(issues))
    return _policy(entries)


def _policy(entries: Iterable[Entry]) -> Policy:
    first: dict[tuple[str, frozenset[Service]], Entry] = {}
    repeats = [one for one in entries if first.setdefault((subject(one), services_of(one)), one) is not one]
    rules = first.values()
    return Policy(
        names=tuple(
            sorted(
                (rule for rule in rules if isinstance(rule, NameRule)),
                key=lambda rule: (rule.name, rule.wildcard, sorted(rule.services)),
            )
        ),
        ranges=tuple(
            sorted(
                (rule for rule in rules if isinstance(rule, RangeRule)),
                key=lambda rule: (rule.network.version, rule.network, sorted(rule.services)),
            )
        ),
        denials=tuple(
            sorted(
                (rule for rule in rules if isinstance(rule, Denial)),
                key=lambda rule: (rule.name, rule.wildcard),
            )
        ),
        feeds=tuple(
            sorted(
                (rule for rule in rules if isinstance(rule, FeedRule)),
                key=lambda rule: (rule.feed.value, sorted(rule.services)),
            )
        ),
        repeats=tuple(repeats),
    )


def dump(policy: Policy) -> str:
    """The policy in canonical text, one entry a line; `parse` makes an equivalent policy of it.

    A feed's rules stay apart, each as it was written: the name of a preset stands for more than the feed, so that
    `@github:8443` beside `@github` is not `@github` with four ports.
    """
    feeds = (line for rule in policy.feeds for line in _entry(subject(rule), rule.services))
    lines = (*_lines(_grants(replace(policy, feeds=()))), *feeds)
    return "".join(f"{line}\n" for line in sorted(lines))


def changes(old: Policy, new: Policy) -> PolicyChange:
    """What differs, entry by entry, exceptions included; an entry with one more port shows that port alone."""
    before, after = _grants(old), _grants(new)
    return PolicyChange(added=_lines(_minus(after, before)), removed=_lines(_minus(before, after)))


def widens(old: Policy, new: Policy) -> tuple[str, ...]:
    """What `new` lets through and `old` does not, as entries; empty when `new` only narrows.

    Exact for names: every name is judged like one that either policy mentions, or like any other name directly
    below the nearest of these, and both kinds are compared. A feed's ranges are unknown here, so a feed covers
    nothing but itself.
    """
    before, after = old.lookup(), new.lookup()
    wider: dict[str, frozenset[Service]] = {}
    mentioned = {rule.name for policy in (old, new) for rule in policy.names}
    mentioned |= {rule.name for policy in (old, new) for rule in policy.denials}
    for name in mentioned:
        for one in (name, f"*.{name}"):
            was, now = before.decide(one).services, after.decide(one).services
            if now is not was and (extra := now - was):
                wider[one] = extra
    wider |= _wider_ranges(old, new)
    known = {(rule.feed, service) for rule in old.feeds for service in rule.services}
    for feed in new.feeds:
        if extra := frozenset(one for one in feed.services if (feed.feed, one) not in known):
            wider[subject(feed)] = wider.get(subject(feed), frozenset()) | extra
    return _lines(wider)


def _wider_ranges(old: Policy, new: Policy) -> dict[str, frozenset[Service]]:
    """Costs one look a service of a rule, and one a prefix length where the old policy lists that service at all."""
    held: dict[Service, list[IPNetwork]] = {}
    for rule in old.ranges:
        for service in rule.services:
            held.setdefault(service, []).append(rule.network)
    covered = {service: frozenset(map(_key, _collapsed(networks))) for service, networks in held.items()}
    wider: dict[str, frozenset[Service]] = {}
    for rule in new.ranges:
        extra = {one for one in rule.services if one not in covered or not _covered(rule.network, covered[one])}
        if extra:
            wider[subject(rule)] = wider.get(subject(rule), frozenset()) | extra
    return wider


def _collapsed(networks: Iterable[IPNetwork]) -> Iterable[IPNetwork]:
    every = list(networks)
    four = collapse_addresses(one for one in every if isinstance(one, IPv4Network))
    six = collapse_addresses(one for one in every if isinstance(one, IPv6Network))
    return (*four, *six)


def _key(network: IPNetwork) -> tuple[int, int, int]:
    return network.version, network.prefixlen, int(network.network_address) >> network.max_prefixlen - network.prefixlen


def _covered(network: IPNetwork, by: frozenset[tuple[int, int, int]]) -> bool:
    """Whether `network` or one that holds it is in `by`; as numbers, since there are up to 129 of them."""
    version, length, first = _key(network)
    return any((version, length - less, first >> less) in by for less in range(length + 1))


# ---- canonical text


def subject(rule: Entry) -> str:
    """What a rule is about, without its services: `*.example.org`, `192.0.2.1`, `[2001:db8::/32]`, `@host`, `!name`."""
    if isinstance(rule, RangeRule):
        network = rule.network
        text = str(network.network_address if network.prefixlen == network.max_prefixlen else network)
        return text if network.version == 4 else f"[{text}]"
    if isinstance(rule, FeedRule):
        return f"@{rule.feed.value}"
    name = f"*.{rule.name}" if rule.wildcard else rule.name
    return f"!{name}" if isinstance(rule, Denial) else name


def services_of(rule: Entry) -> frozenset[Service]:
    """The services of a rule; none for an exception."""
    return frozenset() if isinstance(rule, Denial) else rule.services


def _grants(policy: Policy) -> dict[str, frozenset[Service]]:
    grants: dict[str, frozenset[Service]] = {}
    rules: list[Entry] = [*policy.names, *policy.ranges, *policy.feeds, *policy.denials]
    for rule in rules:
        about = subject(rule)
        grants[about] = grants.get(about, frozenset()) | services_of(rule)
    return grants


def _minus(
    grants: Mapping[str, frozenset[Service]], other: Mapping[str, frozenset[Service]]
) -> dict[str, frozenset[Service]]:
    return {
        about: services - other.get(about, frozenset())
        for about, services in grants.items()
        if about not in other or services - other[about]
    }


def _lines(grants: Mapping[str, frozenset[Service]]) -> tuple[str, ...]:
    return tuple(sorted(line for about, services in grants.items() for line in _entry(about, services)))


def _entry(about: str, services: frozenset[Service]) -> list[str]:
    if about.startswith("!") or services == DEFAULT_SERVICES:
        return [about]
    ports = {proto: sorted(one.port for one in services if one.proto == proto) for proto in ("tcp", "udp")}
    return [
        f"{about}:{','.join(map(str, numbers))}{'' if proto == 'tcp' else '/udp'}"
        for proto, numbers in ports.items()
        if numbers
    ]
