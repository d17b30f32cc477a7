"""Runs: warden, on request. What each operation of the control socket does; who may do it is decided here."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from initd import __version__, audit, verify, why
from initd.core.spans import show_span
from initd.errors import PrivilegeError, UsageError
from initd.explain import explain
from initd.health import examine, workspace
from initd.live import literal_names
from initd.loading import DEFAULTS, load_policy, writable_by
from initd.report import size_of
from initd.settings import READ_FROM

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from initd.control import Peer
    from initd.core.messages import Request
    from initd.dnsguard import GuardStats
    from initd.keeping import Keeping
    from initd.live import Live
    from initd.recorder import Recorder
    from initd.settings import Settings

RESOLVE_SECONDS = 5.0
"""How long a reload waits for the addresses of new names; they go on being tried afterwards."""

SHOWN = 200
"""Entries of one list in an answer; the totals are always complete."""


class Operations:
    """Carries out requests against `live`; `keeping` runs probes as the session user."""

    def __init__(self, settings: Settings, live: Live, keeping: Keeping, recorder: Recorder) -> None:
        self._settings = settings
        self._settings_file = Path(read) if (read := os.environ.get(READ_FROM)) else None
        self._live = live
        self._keeping = keeping
        self.recorder = recorder
        self._reading = asyncio.Lock()
        self._started = time.monotonic()
        self._operations: dict[str, Callable[[Request, Peer], Awaitable[dict[str, Any]]]] = {
            "status": self._status,
            "reload": self._reload,
            "test": self._test,
            "verify": self._verify,
            "health": self._health,
            "log": self._log,
            "why": self._why,
            "suggest": self._suggest,
            "audit": self._audit,
        }

    async def handle(self, request: Request, peer: Peer) -> dict[str, Any]:
        """Carry out one validated request. While audit mode is on, every answer says so."""
        answer = await self._operations[request.op](request, peer)
        if not self._live.auditing:
            return answer
        left = self._live.audit.left(time.monotonic()) if self._live.audit else 0.0
        return {**answer, "audit": {"seconds_left": None if left is None else round(left, 1)}}

    def warnings(self) -> list[str]:
        """What the operator should know, in words."""
        found = [
            f"a session can change its own {what}: {how}; mount it read-only"
            for what, path in (("policy", self._settings.policy), ("settings", self._settings_file))
            if path and (how := self._writable(path))
        ]
        if self._live.in_force.loaded.source == DEFAULTS:
            found.append(f"there is no {self._settings.policy}: the built-in defaults are in force")
        if self._live.auditing:
            found.insert(0, "AUDIT MODE: nothing is enforced, what is not listed is let through and recorded")
        if reason := self._live.unwritten:
            found.append(f"what is in force is not written down: a restart of the warden undoes the reload ({reason})")
        if reason := self._live.unrevoked:
            found.append(f"open connections to what is not listed any more may go on ({reason})")
        if not (place := workspace(self._settings))["ok"]:
            found.append(f"sessions cannot write: {place['detail']}")
        if not self.recorder.figures().listening:
            found.append("refused connections are counted but not explained: the kernel has no NFLOG for us")
        return found + self._keeping.warnings(time.monotonic())

    def _writable(self, path: Path) -> str | None:
        return writable_by(path, self._settings.claude_uid, self._settings.claude_gid)

    async def _status(self, _request: Request, _peer: Peer) -> dict[str, Any]:
        return await self.figures()

    async def figures(self) -> dict[str, Any]:
        """Everything that `fwctl status` shows."""
        live = self._live
        now, guard = live.in_force, live.parts.guard.stats()
        learned = await live.in_worker(live.parts.backend.learned)
        counters = await live.in_worker(live.parts.backend.counters)
        last = live.last_reload
        return {
            "version": __version__,
            "ready": (self._settings.run_dir / "ready").exists(),
            "mode": "audit" if live.auditing else "enforce",
            "backend": live.parts.backend.name,
            "capabilities": dict(live.parts.probe.capabilities),
            "missing": list(live.parts.probe.missing),
            "uptime": round(time.monotonic() - self._started, 1),
            "generation": self._keeping.generation,
            "ended": [
                {"ago": round(ago, 1), "code": code} for ago, code in self._keeping.recent_ends(time.monotonic())
            ],
            "keeper": not self._keeping.lost,
            "user": {"uid": self._settings.claude_uid, "gid": self._settings.claude_gid},
            "policy": {"file": str(self._settings.policy), "source": now.loaded.source, **size_of(now.policy)},
            "rules": {
                "static": len(now.ruleset.static),
                "private": len(now.ruleset.private),
                "learned": len(learned),
            },
            "guard": _guard(guard),
            "refused": dict(counters.refused),
            "refusals": self.recorder.summary(time.time()),
            "last_reload": last
            and {
                "ago": round(time.monotonic() - last.at, 1),
                "added": len(last.added),
                "removed": len(last.removed),
                "closed": len(last.closed),
            },
            "warnings": self.warnings(),
        }

    async def _reload(self, _request: Request, peer: Peer) -> dict[str, Any]:
        async with self._reading:  # one at a time, and not on the loop: a session may have written what takes seconds
            # Before the file is read: see `writable_by`.
            may_widen = peer.uid == 0 or self._writable(self._settings.policy) is None
            loaded = await asyncio.to_thread(load_policy, self._settings)
        if peer.uid and loaded.source == DEFAULTS != self._live.in_force.loaded.source:
            # An editor that saves takes the file away for a moment.
            raise PrivilegeError(
                f"{self._settings.policy} is not there, and only root may put the defaults in its place",
                hint="ask a person to run `docker compose exec claude fwctl reload` from the host",
            )
        done = await self._live.reload(loaded, may_widen=may_widen, within=RESOLVE_SECONDS)
        lists = {key: getattr(done, key) for key in ("added", "removed", "closed")}
        return {
            "policy": {"source": loaded.source, **size_of(loaded.policy)},
            "ms": round(done.seconds * 1000, 1),
            **{key: list(value[:SHOWN]) for key, value in lists.items()},
            **{f"{key}_total": len(value) for key, value in lists.items()},
            "warnings": [
                *(f"{name} does not resolve: {reason}" for name, reason in list(done.failed.items())[:SHOWN]),
                *self.warnings(),
            ],
        }

    async def _test(self, request: Request, _peer: Peer) -> dict[str, Any]:
        held = await self._live.held()
        return explain(request.fields["target"], self._live.in_force.lookup, held)

    async def _log(self, request: Request, _peer: Peer) -> dict[str, Any]:
        return why.rows_after(self.recorder, request.fields["after"])

    async def _why(self, request: Request, _peer: Peer) -> dict[str, Any]:
        return await why.why(request.fields["target"], self._live, self.recorder, self._settings)

    async def _suggest(self, _request: Request, _peer: Peer) -> dict[str, Any]:
        return why.suggestions(self._live, self.recorder, self._settings)

    async def _audit(self, request: Request, peer: Peer) -> dict[str, Any]:
        seconds = request.fields["seconds"]
        if peer.uid != 0:
            raise PrivilegeError(
                "only root may switch audit mode", hint="run it from the host: docker compose exec claude fwctl audit"
            )
        if not 0 <= seconds <= audit.LONGEST:
            raise UsageError(f"audit mode lasts {show_span(audit.LONGEST)} at most, not {show_span(seconds)}")
        closed = await self._live.set_audit(audit.Audit(time.monotonic() + seconds) if seconds else None)
        return {"mode": "audit" if self._live.auditing else "enforce", "closed": list(closed[:SHOWN])}

    async def _verify(self, _request: Request, _peer: Peer) -> dict[str, Any]:
        checks = await self.verify()
        return {
            "verified": not verify.failed(checks, fatal=True),
            "checks": [{"name": one.name, "ok": one.ok, "detail": one.detail, "fatal": one.fatal} for one in checks],
        }

    async def verify(self) -> tuple[verify.Check, ...]:
        """Try as the session user; EnforcementError when the probe itself could not run."""
        now = self._live.in_force
        resolved = self._live.parts.guard.leases.names()
        plan = verify.plan(now.policy, now.lookup, sorted(self._live.upstreams), guard="127.0.0.1", resolved=resolved)
        if self._live.auditing:
            plan = verify.in_audit(plan)
        with self.recorder.unrecorded(plan):
            checks = verify.judge(await self._keeping.probe(plan))
        return checks if plan["reach"] or not literal_names(now.policy) else (*checks, verify.NOTHING_RESOLVES)

    async def _health(self, _request: Request, _peer: Peer) -> dict[str, Any]:
        checks = await examine(self._settings, self._live, self._keeping)
        return {"healthy": all(one["ok"] for one in checks), "checks": checks}


def _guard(stats: GuardStats) -> dict[str, Any]:
    """Counts and figures side by side; latencies in milliseconds, rounded to what is worth reading."""
    figures = asdict(stats)
    return {
        **figures.pop("counts"),
        **figures,
        "upstream_p50": round(stats.upstream_p50, 2),
        "upstream_p99": round(stats.upstream_p99, 2),
    }
