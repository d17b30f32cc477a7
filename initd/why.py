"""Runs: warden, on demand. Why something was refused, what is known of it, and the line that would allow it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from initd.core.special import special_of
from initd.core.suggest import propose, suggest
from initd.explain import explain, parse_target
from initd.loading import DEFAULTS

if TYPE_CHECKING:
    from initd.core.events import Row
    from initd.live import Live
    from initd.recorder import Recorder
    from initd.settings import Settings

SCHEMES = {"https": 443, "http": 80, "ssh": 22, "git": 9418, "wss": 443, "ws": 80, "ftp": 21}

ROWS = 40
"""Rows of one answer, at most 5 kB each."""

LAST = 5
SUGGESTED = 120

RELOAD = "docker compose exec claude fwctl reload"


def rows_after(recorder: Recorder, number: int) -> dict[str, Any]:
    """What happened after `number`, oldest first; ask again with the last row's number until nothing comes."""
    newest = recorder.ring.number
    return {
        "rows": [row.as_dict() for row in recorder.ring.after(number, ROWS)] if number < newest else [],
        "number": newest,
        "lost": recorder.figures().lost,
        "forgotten": recorder.ring.forgotten,
    }


async def why(target: str, live: Live, recorder: Recorder, settings: Settings) -> dict[str, Any]:
    """`explain` and more; UsageError for a target that cannot be read."""
    host, service, given = _read(target, recorder)
    held, now = await live.held(), live.in_force
    shown = f"[{host}]" if ":" in host else host
    answer = explain(f"{shown}:{service.port}/{service.proto}", now.lookup, held)
    rows, leases = _about(host, recorder), _leases(host, live)
    private = next(
        (row.event.address for row in reversed(rows) if row.event.kind == "name" and row.event.address), None
    )
    if answer["allowed"] and private and not leases and not now.lookup.decide_address(ip_address(private), service):
        reason = f"listed, but it resolves to {private}, in the special range {special_of(ip_address(private))}"
        answer |= {"allowed": False, "reason": f"{reason}, which is not listed"}
        host = private
    proposal = None if answer["allowed"] else asdict(propose(host, [service], now.lookup))
    return {
        **answer,
        "port_given": given,
        "leases": leases,
        "refusals": [row.as_dict() for row in rows[-LAST:]],
        "proposal": proposal,
        "file": str(settings.policy),
        "defaults": now.loaded.source == DEFAULTS,
        "command": RELOAD,
    }


def suggestions(live: Live, recorder: Recorder, settings: Settings) -> dict[str, Any]:
    """What would allow all that was refused; what no line is proposed for, and why."""
    now = live.in_force
    found = suggest(recorder.ring, now.lookup)
    made = [one for one in found if one.proposal.line]
    return {
        "lines": [
            {
                "line": one.proposal.line,
                "guessed": one.proposal.guessed,
                "count": one.count,
                "last": round(one.last, 3),
                "by": list(one.by)[:2],
            }
            for one in made[:SUGGESTED]
        ],
        "lines_total": len(made),
        "skipped": [
            {"subject": one.subject, "reason": one.proposal.reason, "count": one.count}
            for one in found
            if not one.proposal.line
        ][: SUGGESTED // 4],
        "file": str(settings.policy),
        "defaults": now.loaded.source == DEFAULTS,
        "command": RELOAD,
    }


def _read(target: str, recorder: Recorder) -> tuple[str, Any, bool]:
    """Host and service of HOST[:PORT][/PROTO] or a URL; without a port, the one that was refused last, or 443."""
    scheme, marked, rest = target.strip().partition("://")
    text = rest.partition("/")[0].rpartition("@")[2] if marked else target
    host, service = parse_target(text)
    bare = text.strip().strip("[]").lower().rstrip(".") == host
    with contextlib.suppress(ValueError):
        host = str(ip_address(host))
    if not bare:
        return host, service, True
    if marked and scheme.lower() in SCHEMES:
        return host, type(service)("tcp", SCHEMES[scheme.lower()]), True
    for row in reversed(_about(host, recorder)):
        if row.event.port and row.event.proto in {"tcp", "udp"}:
            return host, type(service)(row.event.proto, row.event.port), False
    return host, service, False


def _about(host: str, recorder: Recorder) -> list[Row]:
    return [row for row in recorder.ring if host in {row.event.subject, row.event.address}]


def _leases(host: str, live: Live) -> list[dict[str, Any]]:
    """Addresses that `host` may be reached at now because it resolved to them, or the names that led to it."""
    leases, now = live.parts.guard.leases, time.monotonic()
    try:
        address = ip_address(host)
    except ValueError:
        chosen = [one for one in leases if one.name == host]
    else:
        chosen = [one for one in leases if one.address == address]
    return [
        {"name": one.name, "address": str(one.address), "seconds": round(max(one.expires - now, 0.0))}
        for one in chosen[:20]
    ]
