"""Runs: warden, after the lockdown: policy, enforce, guard, resolve, verify, armed; then upkeep until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from typing import TYPE_CHECKING

from initd import audit, logs, memory, verify
from initd.control import Control
from initd.core.leases import from_state
from initd.dnsguard import DnsGuard
from initd.enforce import Enforcer
from initd.errors import EnforcementError, InitdError, KernelError
from initd.feeds import GithubFeed
from initd.keeping import Keeping
from initd.kernel import conntrack
from initd.live import Live, Parts, literal_names
from initd.loading import Loaded, load_policy
from initd.operations import Operations
from initd.recorder import Recorder
from initd.report import size_of
from initd.resolvconf import ResolvConf
from initd.resolve import guard_options
from initd.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Collection

    from initd.core.ruleset import IPAddress
    from initd.handover import Handover
    from initd.kernel.base import Backend, Probe
    from initd.logs import Log
    from initd.settings import Settings


def serve(settings: Settings, handover: Handover, *, backend: Backend, probe: Probe) -> int:
    """Bring the box up and keep it so; returns 0 when told to stop. An InitdError before `armed` ends the start."""
    log = logs.configure(settings)
    log.info("warden.resumes" if handover.resuming else "lockdown.applied", backend=backend.name)
    return asyncio.run(_serve(settings, handover, backend=backend, probe=probe, log=log))


async def _serve(settings: Settings, handover: Handover, *, backend: Backend, probe: Probe, log: Log) -> int:
    keeping = Keeping(handover, log=log)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, keeping.stopping.set)
    saved = _remembered(settings, handover, log=log)
    loaded = _resume(saved, settings) if handover.resuming else load_policy(settings)
    log.info("policy.read", source=loaded.source, **size_of(loaded.policy))

    resolv = ResolvConf(handover.resolv, saved=saved.upstreams if saved else ())
    guard = DnsGuard(
        upstreams=resolv.upstreams,
        decide=loaded.lookup.decide,
        backend=backend,
        options=guard_options(settings, loaded.policy, ()),
        log=log,
    )
    recorder = Recorder(settings.state_dir, guard.leases.of, log=log)
    guard.on_refused, guard.on_stripped = recorder.question, recorder.stripped
    live = Live(Parts(backend, probe, Enforcer(backend), guard, settings, log), resolv.upstreams)
    live.audit = audit.begin(settings, resuming=handover.resuming, now=time.monotonic())
    feed = GithubFeed(settings, live)
    if not handover.resuming:
        # A namespace may outlive a box: what the last one learned is not ours.
        backend.forget(backend.learned())
    elif saved:
        live.feeds = dict(saved.feeds)  # the ranges stay where they are until they are fetched again
    await live.start(loaded, resuming=handover.resuming)
    if saved:
        _take_up(saved, guard, resuming=handover.resuming)
    recorder.start()
    await guard.start(handover.sockets)
    resolv.point_to_guard()

    operations = Operations(settings, live, keeping, recorder)
    control = Control(operations.handle, log=log)
    await control.start(handover.sockets["control"])
    if not handover.resuming:
        names = live.resolve(literal_names(loaded.policy), within=settings.resolve_timeout)
        resolution, _ = await asyncio.gather(names, feed.start())
        _fall_back(saved, resolution.unanswered, guard, log=log)
        await live.close_strangers()
        await _verify(settings, operations, log=log)
    for warning in operations.warnings():
        log.warning("box.warning", text=warning)
    await _commit(live, resuming=handover.resuming)
    keeping.tell("armed")
    log.info("warden.armed", generation=handover.generation, leases=len(guard.leases))

    await Upkeep(settings, live, resolv, keeping, operations).run(feed)
    await control.stop()
    await guard.stop()
    recorder.stop()
    resolv.restore()
    log.info("warden.stopped", effect="the rules stay")
    return 0


def _remembered(settings: Settings, handover: Handover, *, log: Log) -> memory.State | None:
    """A predecessor's state of this run, or at the first start the last run's; None when it cannot be believed."""
    directory = settings.run_dir if handover.resuming else settings.state_dir
    try:
        return memory.load(directory / memory.FILE)
    except ValueError as error:
        log.warning("state.unusable", path=str(directory / memory.FILE), reason=str(error))
        return None


async def _commit(live: Live, *, resuming: bool) -> None:
    """Write down what is in force: from here on we may be killed. A later warden has what the first one wrote."""
    if resuming:
        await live.try_to_write_down()
        return
    try:
        await live.write_down()
    except OSError as error:
        run_dir = live.parts.settings.run_dir
        raise KernelError(f"{run_dir} cannot be written: {error.strerror}", hint="free space there") from error


def _resume(saved: memory.State | None, settings: Settings) -> Loaded:
    """The policy that was in force, not the file: what is in the file has not been asked for by anybody yet."""
    if saved is None:
        return load_policy(settings)
    return Loaded.parse(saved.policy, saved.source)


def _take_up(saved: memory.State, guard: DnsGuard, *, resuming: bool) -> None:
    """The leases of a predecessor; also those that are over as far as it wrote down, when something is connected."""
    known, elapsed = from_state(saved.leases), saved.age(time.time())
    guard.restore(known, elapsed=elapsed)
    if resuming:
        in_use: set[IPAddress] = set()
        with contextlib.suppress(InitdError):  # `Upkeep` says it
            in_use = {address for address, _, _ in conntrack.destinations()}
        used = {name: {one: left for one, left in held.items() if one in in_use} for name, held in known.items()}
        guard.restore(used, elapsed=elapsed, least=guard.leases.terms.lifetime(0))


def _fall_back(saved: memory.State | None, names: Collection[str], guard: DnsGuard, *, log: Log) -> None:
    """Take up the last run's addresses of names that no resolver says anything about now."""
    known = from_state(saved.leases) if saved else {}
    stale = {name: dict(known[name]) for name in names if name in known}
    if taken := guard.restore(stale, elapsed=0.0, least=guard.leases.terms.lifetime(0)):
        log.warning("names.remembered", names=len(stale), addresses=taken, reason="no resolver answers")


async def _verify(settings: Settings, operations: Operations, *, log: Log) -> None:
    """Try it as a session would. With `strict` an unlisted thing that is not refused is fatal."""
    if settings.verify == "off":
        log.warning("verify.off")
        return
    checks = await operations.verify()
    leaks = verify.failed(checks, fatal=True)
    for check in (*leaks, *verify.failed(checks, fatal=False)):
        log.warning("verify.failed", check=check.name, detail=check.detail)
    if leaks and settings.verify == "strict":
        raise EnforcementError(
            "verification failed:\n" + "\n".join(f"  {check.name}: {check.detail}" for check in leaks),
            hint="the network is not refusing what it must; INITD_VERIFY=warn starts the box all the same",
        )
    log.info("verify.done", checks=len(checks), failed=sum(not check.ok for check in checks))
