"""The line of a policy that would allow what was refused, in its narrowest form; or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

from initd.core.policy import PolicyError, Service, Verdict, parse
from initd.core.special import special_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from initd.core.events import Row
    from initd.core.policy import Lookup

HTTPS = Service("tcp", 443)
METADATA = frozenset(
    map(
        ip_address,
        (
            "169.254.169.254",  # most clouds
            "169.254.170.2", "169.254.170.23", "fd00:ec2::254", "fd00:ec2::23",  # Amazon's EC2, ECS and EKS
            "168.63.129.16",  # Azure's WireServer
            "100.100.100.200",  # Alibaba
            "fd20:ce::254",  # Google
        ),
    )
)  # fmt: skip
"""Cloud metadata services: their credentials are never what an agent should have."""

DNS_PORT = 53

_CARRIED = frozenset({"A", "AAAA"})


@dataclass(frozen=True, slots=True)
class Proposal:
    """Either the `line` to add, or in `reason` why none is proposed; `guessed` when nobody came so far as to a port."""

    line: str | None
    reason: str | None = None
    guessed: bool = False


@dataclass(slots=True)
class Suggestion:
    """One subject of refusals: how often, when last, by whom, and what would allow it."""

    subject: str
    proposal: Proposal
    count: int = 0
    last: float = 0.0
    by: dict[str, None] = field(default_factory=dict)  # an ordered set


def propose(host: str, services: Iterable[Service], lookup: Lookup) -> Proposal:
    """What to write so that `host`, a name or an address, may be reached with `services`."""
    wanted = sorted(services)
    decision = lookup.decide(host)
    if decision.verdict is Verdict.DENIED:
        lines = ", ".join(f"line {one.line}: {one.text}" for one in decision.origins)
        return Proposal(None, f"an exception says never ({lines}); a person would have to take it away")
    shown = host
    try:
        address = ip_address(host)
    except ValueError:
        missing = [one for one in wanted if one not in decision.services]
    else:
        if address in METADATA:
            return Proposal(None, "a cloud's metadata service, which hands out the host's credentials")
        if address.is_multicast or address.is_unspecified or address.is_loopback:
            return Proposal(None, f"inside {special_of(address)}, where nobody to talk to can be")
        shown = f"[{host}]" if address.version == 6 else host
        wanted, resolver = [one for one in wanted if one.port != DNS_PORT], wanted
        if resolver and not wanted:
            return Proposal(None, "another resolver, through which anything could leave; the box has one of its own")
        missing = [one for one in wanted if not lookup.decide_address(address, one)]
    if not missing:
        return Proposal(None, "it is listed by now")
    made: list[str] = []
    for proto, suffix in (("tcp", ""), ("udp", "/udp")):
        if ports := ",".join(str(one.port) for one in missing if one.proto == proto):
            made.append(f"{shown}:{ports}{suffix}")
    line = "\n".join(made)
    trouble = _trouble(line, host)
    return Proposal(None, f"no line can allow it: {trouble}") if trouble else Proposal(line)


def _trouble(line: str, host: str) -> str | None:
    """Why `line` does not allow `host` and nothing else: a label may hold any byte, and spell `10.0.0.0/8`."""
    try:
        policy = parse(line)
    except PolicyError as error:
        return error.issues[0].reason
    ranges = any(rule.network.prefixlen < rule.network.max_prefixlen for rule in policy.ranges)
    names = any(rule.wildcard or rule.name != host for rule in policy.names)
    return "it is no host name" if ranges or names or policy.feeds or policy.denials else None


def suggest(rows: Iterable[Row], lookup: Lookup) -> list[Suggestion]:
    """One suggestion a subject, most frequent first."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.event.subject, []).append(row)
    found = [_suggestion(subject, members, lookup) for subject, members in grouped.items()]
    return sorted(found, key=lambda one: (-one.count, one.subject))


def _suggestion(subject: str, rows: list[Row], lookup: Lookup) -> Suggestion:
    made = Suggestion(subject, _proposal(subject, rows, lookup))
    for row in rows:
        made.count += row.count
        made.last = max(made.last, row.last)
        actor = row.event.actor
        program = (actor.command or "").partition(" ")[0].rpartition("/")[2]  # arguments may hold secrets
        made.by[program or actor.user or ("unknown" if actor.uid is None else f"uid {actor.uid}")] = None
    return made


def _proposal(subject: str, rows: list[Row], lookup: Lookup) -> Proposal:
    connections = [row.event for row in rows if row.event.kind == "connection"]
    services = {Service(one.proto, one.port) for one in connections if one.port and one.proto in {"tcp", "udp"}}
    if connections and not services:
        return Proposal(None, "neither TCP nor UDP: no line can allow it")
    if private := [row.event.address for row in rows if row.event.kind == "name" and row.event.reason == "special"]:
        return Proposal(None, f"it resolves to {private[-1]}, in a special range; list that address if it is right")
    if not connections:
        asked = [row.event for row in rows if row.event.proto in _CARRIED]
        if not asked:
            kinds = ", ".join(sorted({row.event.proto for row in rows}))
            return Proposal(None, f"only {kinds} records were asked for, which the guard carries for nobody")
        if all(one.allowed for one in asked):
            return Proposal(None, "looked up, but never connected to")
        if lookup.decide(subject).verdict is Verdict.LISTED:
            return Proposal(None, "it is listed by now")
        # A question has no port; the most likely one alone is the narrowest guess.
        return replace(propose(subject, {HTTPS}, lookup), guessed=True)
    return propose(subject, services, lookup)
