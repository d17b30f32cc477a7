"""Runs: warden, on demand. What would happen to a connection, and which line of the policy decides."""

from __future__ import annotations

import re
from dataclasses import asdict
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from initd.core.names import NameFaultError, to_ascii
from initd.core.policy import Service, Verdict
from initd.core.ruleset import ENGINE_DNS
from initd.core.special import special_of
from initd.errors import UsageError

if TYPE_CHECKING:
    from initd.core.membership import Membership
    from initd.core.policy import Lookup, Origin
    from initd.core.ruleset import IPAddress

_PORT = re.compile("[0-9]{0,5}")

OWN = "the box itself: loopback is open, and needs no line"

LONGEST = 300
"""Characters of a target: a name has 253 at most."""

REASONS = {
    Verdict.DENIED: "an exception line says never",
    Verdict.PARENT: "not listed, only names below it are",
    Verdict.UNLISTED: "not listed",
}


def explain(target: str, lookup: Lookup, allowed: Membership) -> dict[str, Any]:
    """The decision on HOST[:PORT][/PROTO] as a dictionary: target, allowed, reason, lines.

    `allowed` is what the kernel holds (static, private and learned), so that an address learned from a name counts.
    Raises UsageError for a target that cannot be read.
    """
    host, service = parse_target(target)
    try:
        address = ip_address(host)
    except ValueError:
        return _name(host, service, lookup)
    return _address(address, service, lookup, allowed)


def parse_target(target: str) -> tuple[str, Service]:
    """HOST[:PORT][/PROTO], IPv6 in brackets when a port follows; TCP 443 when nothing is said."""
    rest, _, proto = target.strip().partition("/")
    host, port = rest, ""
    if rest.startswith("["):
        host, _, port = rest[1:].partition("]")
        port = port.removeprefix(":")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    wrong = proto not in {"", "tcp", "udp"} or not host or not _PORT.fullmatch(port)
    if wrong or len(target) > LONGEST:
        raise UsageError(
            f"{target[:LONGEST]!r} is not HOST[:PORT]", hint="for example github.com:443, [2001:db8::1]:22, db:53/udp"
        )
    number = int(port or 443)
    if not 0 < number < 65536:
        raise UsageError(f"{target!r}: a port is 1 to 65535")
    host = host.lower().rstrip(".")
    try:
        return (host if host.isascii() else to_ascii(host)), Service(proto or "tcp", number)
    except NameFaultError as error:
        raise UsageError(f"{target!r}: {error.reason}", hint=error.hint) from error


def _name(host: str, service: Service, lookup: Lookup) -> dict[str, Any]:
    if host == "localhost" or host.endswith(".localhost"):  # the guard's own answer, RFC 6761
        return _answer(host, service, allowed=True, reason=OWN, lines=())
    decision = lookup.decide(host)
    if decision.verdict is not Verdict.LISTED:
        return _answer(host, service, reason=REASONS[decision.verdict], lines=decision.origins)
    if service not in decision.services:
        ports = ", ".join(sorted(f"{one.port}/{one.proto}" for one in decision.services))
        return _answer(host, service, reason=f"listed, but only for {ports}", lines=decision.origins)
    return _answer(host, service, allowed=True, reason="listed", lines=decision.origins)


def _address(address: IPAddress, service: Service, lookup: Lookup, allowed: Membership) -> dict[str, Any]:
    if address.is_loopback and address != ENGINE_DNS:  # the one that is not for everybody
        return _answer(str(address), service, allowed=True, reason=OWN, lines=())
    origins = lookup.decide_address(address, service)
    if allowed.holds(address, service.proto, service.port):
        reason = "listed" if origins else "an address of a listed name or feed"
        return _answer(str(address), service, allowed=True, reason=reason, lines=origins)
    special = special_of(address)
    reason = f"in the special range {special}, and not listed" if special else "not listed"
    return _answer(str(address), service, reason=reason, lines=origins)


def _answer(
    host: str, service: Service, *, allowed: bool = False, reason: str, lines: tuple[Origin, ...]
) -> dict[str, Any]:
    shown = f"[{host}]" if ":" in host else host
    return {
        "target": f"{shown}:{service.port}/{service.proto}",
        "allowed": allowed,
        "reason": reason,
        "lines": [asdict(origin) for origin in lines],
    }
