"""Runs: warden, after the lockdown: policy, enforce, guard, resolve, verify, armed; then upkeep until told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from initd import logs, verify
from initd.control import Control
from initd.core.leases import Terms
from initd.dnsguard import DnsGuard
from initd.enforce import Enforcer
from initd.errors import EnforcementError
from initd.feeds import GithubFeed
from initd.keeping import Keeping
from initd.live import Live, Parts, literal_names
from initd.loading import Loaded, guard_options, load_policy
from initd.operations import Operations
from initd.resolvconf import ResolvConf
from initd.upkeep import Upkeep

if TYPE_CHECKING:
    from initd.handover import Handover
    from initd.kernel.base import Backend
    from initd.settings import Settings


def serve(settings: Settings, handover: Handover, backend: Backend) -> int:
    """Bring the box up and keep it so; returns 0 when told to stop. InitdErrors before `armed` end the start."""
    return asyncio.run(_serve(settings, handover, backend))


async def _serve(settings: Settings, handover: Handover, backend: Backend) -> int:
    log = logs.configure(settings)
    log.info("warden.lockdown" if not handover.resuming else "warden.resumes", backend=backend.name)
    keeping = Keeping(handover, log=log)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, keeping.stopping.set)

    saved = Upkeep.saved(settings, log=log)
    loaded = saved.in_force() if handover.resuming else load_policy(settings)
    log.info("policy.read", source=loaded.source)

    resolv = ResolvConf(handover.resolv, saved=saved.upstreams)
    guard = DnsGuard(
        upstreams=resolv.upstreams,
        decide=loaded.policy.lookup().decide,
        backend=backend,
        options=guard_options(settings, loaded.policy),
        log=log,
    )
    live = Live(Parts(backend, Enforcer(backend), guard, os.getuid(), log), resolv.upstreams)
    await live.put(loaded.policy, loaded.source)
    guard.restore(saved.leases, elapsed=saved.age)
    await guard.start(handover.sockets)
    resolv.point_to_guard()

    operations = Operations(settings, live, keeping)
    control = Control(operations.handle, log=log)
    await control.start(handover.sockets["control"])
    feed = GithubFeed(settings, live)
    if not handover.resuming:
        await asyncio.gather(feed.start(), live.resolve(literal_names(loaded.policy), within=settings.resolve_timeout))
        await _verify(settings, operations, log=log)
    keeping.tell("armed")
    log.info("warden.armed", names=len(loaded.policy.names), learned=len(guard.leases))

    upkeep = Upkeep(settings, live, resolv, keeping)
    await upkeep.run(feed)
    await control.stop()
    await guard.stop()
    resolv.restore()
    return 0
