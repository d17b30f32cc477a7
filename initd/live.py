"""Runs: warden, always. What is in force now, and the only ways to change it.

Every change goes the same way: compile, enforce in the backend's own thread, tell the guard, take what was revoked out
of the learned set and out of open connections. Changes queue behind one lock; one that fails leaves the old policy in
force.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from initd import audit, memory
from initd.core.membership import Membership
from initd.core.policy import Feed, changes, widens
from initd.core.ruleset import ENGINE_DNS, Element, Ruleset, Surroundings, compile_ruleset
from initd.core.special import special_of
from initd.errors import EnforcementError, InitdError, PrivilegeError
from initd.kernel import conntrack
from initd.kernel.sockdiag import Sockets
from initd.network import neighbourhood
from initd.published import publish, text
from initd.published import replace as replace_file
from initd.resolve import Resolution, guard_options, resolve_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from initd.audit import Audit
    from initd.core.policy import Lookup, Policy
    from initd.core.ruleset import Endpoint, IPAddress, IPNetwork
    from initd.dnsguard import DnsGuard, GuardOptions
    from initd.enforce import Enforcer
    from initd.kernel.base import Backend, Probe
    from initd.loading import Loaded
    from initd.logs import Log
    from initd.settings import Settings

DNS = 53

NEVER = Ruleset(-1)
"""Equal to no ruleset that was ever compiled: whatever the kernel holds now, it is written again."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parts:
    """What `Live` works with; `probe` is what the backend found in this namespace."""

    backend: Backend
    probe: Probe
    enforcer: Enforcer
    guard: DnsGuard
    settings: Settings
    log: Log


@dataclass(frozen=True, slots=True)
class InForce:
    """One policy with what follows from it; replaced as a whole."""

    loaded: Loaded
    ruleset: Ruleset

    @property
    def policy(self) -> Policy:
        """The policy itself."""
        return self.loaded.policy

    @property
    def lookup(self) -> Lookup:
        """Its decisions."""
        return self.loaded.lookup


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did: canonical entries added and removed, connections closed, names without an answer."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    closed: tuple[str, ...]
    failed: dict[str, str]
    seconds: float
    at: float = field(default_factory=time.monotonic)


class Live:
    """The policy in force. `start`, `reload` and `refresh` change it; everything else only looks."""

    def __init__(self, parts: Parts, upstreams: Iterable[Endpoint]) -> None:
        self.parts = parts
        self.upstreams = frozenset(upstreams)
        self.feeds: dict[Feed, tuple[IPNetwork, ...]] = {}
        self.now: InForce | None = None
        self.last_reload: Reloaded | None = None
        self.audit: Audit | None = None
        self.unwritten: str | None = None
        self.unrevoked: str | None = None
        self._changing = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._audit_changed = asyncio.Event()
        self._forgetful = False
        self._options: GuardOptions | None = None
        # python-iptables must not be entered twice, and pyroute2's sync sockets not from a running loop.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netfilter")

    @property
    def in_force(self) -> InForce:
        """The policy in force; there is one from the first `put` on."""
        if self.now is None:
            raise PrivilegeError("no policy is in force yet", hint="the box is still starting")
        return self.now

    async def in_worker(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one backend call in the backend's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, lambda: step(*args, **kwargs))

    async def start(self, loaded: Loaded, *, resuming: bool) -> None:
        """Put the first policy into force; `resuming` keeps a predecessor's rules when they are the right ones."""
        enforcer = self.parts.enforcer
        async with self._changing:
            await self._put(loaded, enforcer.take_over if resuming else enforcer.enforce)

    async def refresh(self) -> tuple[str, ...]:
        """Compile and enforce again: upstream resolvers, feeds or the namespace's networks have changed."""
        async with self._changing:
            return await self._put(self.in_force.loaded, self.parts.enforcer.enforce)

    @property
    def auditing(self) -> bool:
        """Whether audit mode is on and not over."""
        return self.audit is not None and not self.audit.over(time.monotonic())

    async def audit_is_over(self) -> None:
        """Wait until audit mode, on now or later, has reached its end."""
        while self.audit is None or self.auditing:
            self._audit_changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if self.audit is None else self.audit.left(time.monotonic())):
                    await self._audit_changed.wait()

    async def set_audit(self, wanted: Audit | None) -> tuple[str, ...]:
        """Enter audit mode, or leave it; connections that end with it. An error enforces, whatever was asked for."""
        path = self.parts.settings.run_dir / audit.FILE
        async with self._changing:
            self.audit = None
            try:
                # First, so that the next warden ends it on time, or does not bring it back.
                audit.note(path, wanted)
                self.audit = wanted
                closed = await self._put(self.in_force.loaded, self.parts.enforcer.enforce)
            except (InitdError, OSError) as error:
                self.audit = None
                with contextlib.suppress(OSError):
                    audit.note(path, None)
                await self._put(self.in_force.loaded, self.parts.enforcer.enforce)
                if isinstance(error, OSError):
                    raise EnforcementError(f"{path} cannot be written: {error.strerror}") from error
                raise
            finally:
                self._audit_changed.set()
        left = wanted and wanted.left(time.monotonic())
        self.parts.log.warning("audit.entered" if wanted else "audit.ended", left=left, closed=len(closed))
        return closed

    async def reload(self, loaded: Loaded, *, may_widen: bool, within: float) -> Reloaded:
        """Put a policy into force and resolve what is new, which may take `within` seconds."""
        started = time.monotonic()
        async with self._changing:
            old, policy = self.in_force.policy, loaded.policy
            if wider := () if may_widen else widens(old, policy):
                raise PrivilegeError(
                    f"this session may write the policy file, so it may only narrow the policy; new: {wider[0]}",
                    hint="ask a person to run `docker compose exec claude fwctl reload` from the host",
                )
            change = changes(old, policy)
            try:
                closed = await self._put(loaded, self.parts.enforcer.enforce)
            except InitdError:
                with contextlib.suppress(InitdError):  # else `recheck` does it
                    await self._put(self.in_force.loaded, self.parts.enforcer.enforce)
                raise
            # Before anybody is told: a warden that is killed now must not bring the old policy back.
            await self.try_to_write_down()
            fresh = set(literal_names(policy)) - set(literal_names(old))
            resolution = await self.resolve(fresh, within=within)
            self.last_reload = Reloaded(
                added=change.added,
                removed=change.removed,
                closed=closed,
                failed=dict(resolution.failed),
                seconds=time.monotonic() - started,
            )
        self.parts.log.info(
            "policy.reloaded",
            added=len(change.added),
            removed=len(change.removed),
            closed=len(closed),
            ms=round(self.last_reload.seconds * 1000, 1),
        )
        return self.last_reload

    async def write_down(self) -> None:
        """Save what is in force, for people, the next warden and the next start. Raises OSError.

        The next start can do without: a session may have filled the disk that holds its copy.
        """
        settings = self.parts.settings
        async with self._writing:  # what was gathered later must not be overtaken by what was gathered earlier
            document = await asyncio.to_thread(memory.dump, memory.remember(self, now=time.time()))
            await asyncio.to_thread(replace_file, settings.run_dir / memory.FILE, document)
            try:
                await asyncio.to_thread(replace_file, settings.state_dir / memory.FILE, document)
            except OSError as error:
                if not self._forgetful:
                    self.parts.log.warning(
                        "state.unsaved", reason=str(error), effect="the next start remembers nothing"
                    )
                self._forgetful = True
            else:
                self._forgetful = False

    async def try_to_write_down(self) -> None:
        """The same with a warning for an error, which `unwritten` then names."""
        self.unwritten = None
        try:
            await self.write_down()
        except OSError as error:
            self.unwritten = str(error)
            self.parts.log.warning("state.unsaved", reason=str(error), effect="a restart of the warden forgets this")

    async def recheck(self) -> bool:
        """Whether the kernel still holds what was written; otherwise say what differs and write it again."""
        async with self._changing:
            differs = await self.in_worker(self.parts.enforcer.recheck)
            if differs:
                self.parts.log.error("rules.changed", by="somebody else", differs="; ".join(differs[:10]))
                self.now = replace(self.in_force, ruleset=NEVER)
                await self._put(self.in_force.loaded, self.parts.enforcer.enforce)
        return not differs

    async def resolve(self, names: Iterable[str], *, within: float) -> Resolution:
        """Resolve `names` through the guard, so that their addresses are in the learned set."""
        resolution = await resolve_names(names, self.parts.guard.resolve, within=within)
        for name, reason in sorted(resolution.failed.items()):
            self.parts.log.warning("name.unresolved", name=name, reason=reason)
        return resolution

    async def _put(self, loaded: Loaded, enforce: Callable[[Ruleset], None]) -> tuple[str, ...]:
        policy = loaded.policy
        ruleset = self._compile(policy)
        if self.now is None or ruleset != self.now.ruleset:
            started = time.monotonic()
            try:
                await self.in_worker(enforce, ruleset)
            except BaseException:
                if self.now is not None:
                    self.now = replace(self.now, ruleset=NEVER)  # nobody knows how far it came
                raise
            self.parts.log.info(
                "rules.applied",
                backend=self.parts.backend.name,
                entries=len(ruleset.static) + len(ruleset.private),
                ms=round((time.monotonic() - started) * 1000, 1),
            )
        before, self.now = self.now, InForce(loaded, ruleset)
        words = text(policy, loaded.source, audit=ruleset.audit is not None)
        publish(self.parts.settings.run_dir, words, log=self.parts.log)
        names = {lease.address: lease.name for lease in self.parts.guard.leases}
        options = guard_options(self.parts.settings, policy, chain.from_iterable(self._networks().values()))
        options = replace(options, audit=ruleset.audit is not None)
        self.parts.guard.set_policy(loaded.lookup.decide, options=None if options == self._options else options)
        self._options = options
        return () if before is None else await self._revoke(ruleset, names, strays=before.policy != policy)

    async def _revoke(self, ruleset: Ruleset, names: Mapping[IPAddress, str], *, strays: bool) -> tuple[str, ...]:
        """Take what is not allowed any more out of the learned set and out of open connections; see `_cut`.

        The new rules are in force by now. What cannot be taken is said, and `unrevoked` then says why; a host without
        nf_conntrack_netlink, which no container can load, lets nobody see its connections.
        """
        self.unrevoked = None
        try:
            if strays:
                self._forget_strays(await self.in_worker(self.parts.backend.learned))
            return await self.in_worker(self._cut, ruleset, names)
        except InitdError as error:
            self.unrevoked = error.message
            self.parts.log.warning("connections.left", reason=error.message)
            return ()

    def _forget_strays(self, learned: Iterable[Element]) -> None:
        """Forget learned elements without a lease: what a warden learned just before it was killed.

        Nobody knows any more which name they belong to, so no change of the policy would ever take them away. `learned`
        was read before this looks at the leases, and a lease is there before anything else runs.
        """
        leased = {
            (lease.address, service.proto, service.port)
            for lease in self.parts.guard.leases
            for service in lease.services
        }
        strays = [one for one in learned if (one.network.network_address, one.proto, one.port) not in leased]
        if strays:
            self.parts.backend.forget(strays)
            self.parts.log.info("strays.forgotten", elements=len(strays))

    def _compile(self, policy: Policy) -> Ruleset:
        around = Surroundings(
            warden_uid=os.getuid(),
            upstreams=self.upstreams,
            engine_dns=any(endpoint.address == ENGINE_DNS for endpoint in self.upstreams),
            subnets=frozenset(neighbourhood().subnets),
            log=self.parts.probe.capabilities["nflog"],
            audit=self.audit.end if self.audit is not None and self.auditing else None,
        )
        return compile_ruleset(policy.ranges, policy.feeds, networks=self._networks(), around=around)

    def _networks(self) -> dict[Feed, tuple[IPNetwork, ...]]:
        """Every feed's ranges as they are now."""
        around = neighbourhood()
        return {**self.feeds, Feed.HOST: around.gateways, Feed.SUBNET: around.subnets}

    async def held(self) -> Membership:
        """Every destination that the kernel holds open now."""
        return await self.in_worker(self._held, self.in_force.ruleset)

    def _held(self, ruleset: Ruleset) -> Membership:
        return Membership([*ruleset.static, *ruleset.private, *self.parts.backend.learned()])

    async def close_strangers(self) -> None:
        """Close what was opened here before the box and is not allowed now: a namespace may outlive a box."""
        async with self._changing:
            if closed := await self._revoke(self.in_force.ruleset, {}, strays=False):
                self.parts.log.info("connections.closed", closed=len(closed))

    def _cut(self, ruleset: Ruleset, names: Mapping[IPAddress, str]) -> tuple[str, ...]:
        """Close every connection to the outside that `ruleset` and the learned set no longer allow; tell the open ones.

        `names` says by which name an address was learned, for the report.
        """
        allowed = self._held(ruleset)
        upstream = {(endpoint.address, endpoint.port) for endpoint in ruleset.upstreams}
        own = neighbourhood().addresses

        def asking(flow: conntrack.Flow) -> bool:
            """A question of the warden's or of the engine's resolver. Of UDP the rules judge each packet."""
            if (flow.destination, flow.dport) not in upstream and not (ruleset.engine_dns and flow.dport == DNS):
                return False
            if flow.proto == "udp":
                return True
            held = sockets.owner(flow.proto, (flow.source, flow.sport), (flow.destination, flow.dport))
            return held is not None and held.uid in {0, ruleset.warden_uid}

        def revoked(flow: conntrack.Flow) -> bool:
            if ruleset.audit is not None and flow.dport != DNS and special_of(flow.destination) is None:
                return False
            inward = flow.destination.is_loopback or flow.destination in own
            return not inward and not asking(flow) and not allowed.holds(flow.destination, flow.proto, flow.dport)

        with Sockets() as sockets:
            done = conntrack.cut_where(revoked)
        if done.flows and not done.destroys:
            self.parts.log.warning("sockets.left", reason="the kernel cannot close sockets (CONFIG_INET_DIAG_DESTROY)")
        return tuple(sorted(_shown(flow, names.get(flow.destination)) for flow in done.flows if flow.live))


def _shown(flow: conntrack.Flow, name: str | None) -> str:
    host = f"[{flow.destination}]" if flow.destination.version == 6 else str(flow.destination)
    where = f"{host}:{flow.dport}/{flow.proto}" if flow.proto in {"tcp", "udp"} else f"{host}, protocol {flow.proto}"
    return f"{name} ({where})" if name else where


def literal_names(policy: Policy) -> list[str]:
    """The names that can be asked for as they stand; wildcards are learned when somebody asks."""
    return [rule.name for rule in policy.names if not rule.wildcard]
