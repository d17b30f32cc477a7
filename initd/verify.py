"""Runs: warden, before armed and on `fwctl verify`. The plan a session user's probe tries, and the judgement on it.

Behaviour, not listings: what is unlisted must be refused at once over IPv4, IPv6 and DNS, and something listed must
answer. The probe runs as the session user (`initd.probe`, started by the keeper); this module is pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from initd.core.policy import Service, Verdict
from initd.core.special import special_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from initd.core.policy import Lookup, Policy
    from initd.core.ruleset import Endpoint

UNLISTED = ("192.0.2.1", "198.51.100.251", "203.0.113.251", "2001:db8::1", "2001:db8:ffff::1")
"""Documentation addresses (RFC 5737, RFC 3849): nobody answers there, so only our own reset can refuse at once."""

METADATA = "169.254.169.254"
"""Cloud metadata: the special range that hurts most."""

UNLISTED_NAMES = ("example.com", "example.org", "example.net")
"""Names that every real resolver answers: NXDOMAIN for one of them can only come from the guard."""

PROBE_TIMEOUT = 2.0
"""Seconds for each single attempt."""

REFUSAL_LIMIT_MS = 1000.0
"""A refusal later than this did not come from a rule of ours on this host."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried: `ok`, and in words what was expected and seen. `fatal` when it is about refusal."""

    name: str
    ok: bool
    detail: str
    fatal: bool


NOTHING_RESOLVES = Check("reach", ok=False, detail="no listed name has an address: is DNS up?", fatal=False)
"""In place of trying, when there is nothing to try."""


def plan(
    policy: Policy, lookup: Lookup, upstreams: Iterable[Endpoint], *, guard: str, resolved: Collection[str]
) -> dict[str, Any]:
    """What to try under `policy`; `guard` is the address sessions resolve at.

    Only `resolved` names are to be reached: one without an answer would hold a start up for as long as libc waits.
    """
    https = Service("tcp", 443)
    bare = [text for text in UNLISTED if not lookup.decide_address(ip_address(text), https)]
    v4, v6 = ([text for text in bare if (":" in text) == six][:1] for six in (False, True))
    metadata = [METADATA] if not lookup.decide_address(ip_address(METADATA), Service("tcp", 80)) else []
    unlisted = [n for n in UNLISTED_NAMES if lookup.decide(n).verdict in {Verdict.UNLISTED, Verdict.DENIED}][:1]
    listed = [
        [rule.name, min(service.port for service in tcp)]
        for rule in policy.names
        if not rule.wildcard
        and (tcp := [s for s in rule.services if s == https] or [s for s in rule.services if s.proto == "tcp"])
        and lookup.decide(rule.name).verdict is Verdict.LISTED
    ]
    return {
        "timeout": PROBE_TIMEOUT,
        "connect": [[text, 443] for text in v4 + v6] + [[text, 80] for text in metadata],
        "datagram": [[str(e.address), e.port] for e in list(upstreams)[:2]] + [[text, 53] for text in v4 + v6],
        "ask": [[guard, name] for name in unlisted],
        "reach": [one for one in listed if one[0] in resolved][:5],
    }


def in_audit(plan: dict[str, Any]) -> dict[str, Any]:
    """What of a plan holds in audit mode too: special ranges, other resolvers, and what is listed."""
    special = [target for target in plan["connect"] if special_of(ip_address(target[0]))]
    return {**plan, "connect": special, "ask": []}


def judge(outcomes: dict[str, list[dict[str, Any]]]) -> tuple[Check, ...]:
    """One `Check` for each outcome, and one for the listed names together: one that answers is enough."""
    checks = [_refusal("tcp", one) for one in outcomes["connect"]]
    checks += [_refusal("udp", one) for one in outcomes["datagram"]]
    checks += [
        Check(
            f"dns {one['target'][1]}",
            one["outcome"] == "nxdomain",
            f"unlisted name: {one['outcome']} in {one['ms']} ms",
            fatal=True,
        )
        for one in outcomes["ask"]
    ]
    if reach := outcomes["reach"]:
        checks.append(_reachable(reach))
    return tuple(checks)


def failed(checks: Sequence[Check], *, fatal: bool) -> tuple[Check, ...]:
    """The checks that failed, of the fatal or of the other kind."""
    return tuple(check for check in checks if not check.ok and check.fatal is fatal)


def _refusal(proto: str, one: dict[str, Any]) -> Check:
    address, port = one["target"]
    absent = one["outcome"] == "unreachable"
    refused = one["outcome"] == "refused" and one["ms"] <= REFUSAL_LIMIT_MS
    words = "no route, nothing to refuse" if absent else f"{one['outcome']} in {one['ms']} ms"
    return Check(f"{proto} {address} port {port}", refused or absent, f"unlisted address: {words}", fatal=True)


def _reachable(reach: list[dict[str, Any]]) -> Check:
    good = [one for one in reach if one["outcome"] == "open"]
    one = good[0] if good else reach[0]
    name, port = one["target"]
    others = "" if good or len(reach) == 1 else f" (and {len(reach) - 1} more listed names did not answer)"
    detail = f"listed name: {one['outcome']} in {one['ms']} ms{others}"
    return Check(f"reach {name}:{port}", bool(good), detail, fatal=False)
