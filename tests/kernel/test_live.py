"""What is in force is kept so: what somebody else changes is written again, what fails leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from initd import feeds
from initd.core.ruleset import Endpoint
from initd.dnsguard import DnsGuard
from initd.enforce import Enforcer
from initd.errors import EnforcementError, KernelError
from initd.kernel import conntrack
from initd.kernel.base import Backend
from initd.live import Live, Parts
from initd.loading import Loaded
from initd.resolvconf import ResolvConf
from initd.resolve import guard_options
from initd.settings import load
from initd.upkeep import Upkeep
from tests.kernel.test_contract import LISTED4, tries
from tests.kernel.wire import run
from tests.support.guarded import Log

pytestmark = pytest.mark.kernel

OLD, NEW = Loaded.parse(f"{LISTED4}:443\n", "old"), Loaded.parse("203.0.113.77:443\n", "new")
OPENED = {
    "xtables": "iptables-legacy -I INITD-OUTPUT 1 -j ACCEPT",
    "nftables": "nft insert rule inet initd output accept",
}


@dataclass
class Bench:
    """`live` with `OLD` in force, and the backend and log that it works with; `place` is its run directory."""

    live: Live
    made: Backend
    log: Log
    place: Path


def on_bench(backend, steps) -> Any:
    """What `await steps(Bench)` returns; for `Wire.do`."""
    made = backend()
    probe = made.probe()
    made.lockdown(os.getuid())

    async def go(place: str) -> Any:
        settings = load({"INITD_SETTINGS": "", "INITD_RUN_DIR": place, "INITD_STATE_DIR": place})
        ends, log, policy = [Endpoint(ip_address("192.0.2.53"))], Log(), OLD.policy
        options = guard_options(settings, policy, ())
        guard = DnsGuard(upstreams=ends, decide=policy.lookup().decide, backend=made, options=options, log=log)
        live = Live(Parts(made, probe, Enforcer(made), guard, settings, log), ends)
        await live.start(OLD, resuming=False)
        return await steps(Bench(live, made, log, Path(place)))

    with TemporaryDirectory() as place:
        return asyncio.run(go(place))


def test_what_somebody_else_changed_is_written_again(backend, wire):
    async def steps(bench: Bench):
        quiet = await bench.live.recheck()
        run(*OPENED[backend.name].split())
        opened = tries([("tcp", "203.0.113.77")])[0].outcome
        noticed = await bench.live.recheck()
        return quiet, opened, noticed, await bench.live.recheck(), tries([("tcp", "203.0.113.77")])[0], bench.log

    quiet, opened, noticed, after, (unlisted), log = wire.do(on_bench, backend, steps)
    assert quiet is True, "negative control: nobody meddled"
    assert opened == "open", "negative control: the rule that was put before ours opened the box"
    assert (noticed, after) == (False, True)
    assert unlisted.refused_at_once
    (said,) = log.named("rules.changed")
    assert "unexpected at" in said["differs"]


def test_a_reload_that_fails_leaves_the_old_rules_in_force(backend, wire):
    async def steps(bench: Bench):
        apply = bench.made.apply

        def meddled(ruleset) -> None:
            bench.made.apply = apply
            apply(ruleset)
            run(*OPENED[backend.name].split())

        bench.made.apply = meddled
        with pytest.raises(EnforcementError):
            await bench.live.reload(NEW, may_widen=True, within=1.0)
        refused, listed = tries([("tcp", "203.0.113.77"), ("tcp", LISTED4)])
        return bench.live.in_force.loaded.source, refused, listed, await bench.live.recheck()

    source, refused, listed, right = wire.do(on_bench, backend, steps)
    assert source == "old"
    assert refused.refused_at_once
    assert listed.outcome == "open"
    assert right is True


def test_a_reload_is_in_force_and_says_so_where_open_connections_cannot_be_seen(backend, wire, monkeypatch):
    """As on a host that has not loaded nf_conntrack_netlink, which no container can."""

    def unseen():
        raise KernelError("conntrack: listing connections: EINVAL")

    async def steps(bench: Bench):
        with monkeypatch.context() as patch:
            patch.setattr(conntrack, "flows", unseen)
            await bench.live.close_strangers()  # as a start does
            done = await bench.live.reload(NEW, may_widen=True, within=1.0)
        then = bench.live.unrevoked
        refused, listed = tries([("tcp", LISTED4), ("tcp", "203.0.113.77")])
        await bench.live.reload(OLD, may_widen=True, within=1.0)
        return done, then, bench.live.unrevoked, refused, listed, bench.log

    done, then, after, refused, listed, log = wire.do(on_bench, backend, steps)
    assert done.removed == (f"{LISTED4}:443",)
    assert "EINVAL" in then
    assert after is None
    assert refused.refused_at_once
    assert listed.outcome == "open"
    assert log.named("connections.left")


def test_rules_that_could_not_be_written_are_written_by_the_next_look(backend, wire):
    async def steps(bench: Bench):
        apply = bench.made.apply

        def broken(ruleset) -> None:
            run(*OPENED[backend.name].split())
            raise EnforcementError("the kernel had no time")

        bench.made.apply = broken
        for _ in range(2):
            with pytest.raises(EnforcementError):
                await bench.live.reload(NEW, may_widen=True, within=1.0)
        bench.made.apply = apply
        return [await bench.live.recheck() for _ in range(2)], tries([("tcp", "203.0.113.77")])[0]

    looks, unlisted = wire.do(on_bench, backend, steps)
    assert looks == [False, True]
    assert unlisted.refused_at_once


def test_new_resolvers_are_followed_although_the_kernel_fails_once(backend, wire):
    async def steps(bench: Bench):
        path = bench.place / "resolv.conf"
        path.write_text("nameserver 192.0.2.53\n")
        descriptor = os.open(path, os.O_RDWR)
        upkeep = Upkeep(bench.live.parts.settings, bench.live, ResolvConf(descriptor, path=path), None, None)
        apply, told, allowed = bench.made.apply, [], []

        def watched(ruleset) -> None:
            apply(ruleset)
            allowed.append(([*sorted(str(one.address) for one in ruleset.upstreams)], figures()))

        def broken(ruleset) -> None:
            bench.made.apply = watched
            raise EnforcementError("the kernel had no time")

        def figures():
            return [one.server for one in bench.live.parts.guard.stats().upstreams]

        bench.made.apply = broken
        path.write_text("nameserver 192.0.2.54\n")
        with pytest.raises(EnforcementError):
            await upkeep._resolvers()
        told.append(figures())
        await upkeep._resolvers()
        return [*told, figures()], allowed

    old, new = "192.0.2.53", "192.0.2.54"
    told, allowed = wire.do(on_bench, backend, steps)
    assert told == [[old], [new]]
    assert allowed == [([old, new], [old]), ([new], [new])], "at no time is one asked that may not be"


def test_a_feed_that_cannot_be_put_into_force_is_tried_again(backend, wire):
    async def steps(bench: Bench):
        tries = []

        class Broken(feeds.GithubFeed):
            async def keep(self) -> None:
                tries.append(1)
                if len(tries) > 3:
                    keeping.stopping.set()
                raise EnforcementError("the kernel had no time")

        feeds.RETRY = 0.05
        settings = bench.live.parts.settings
        keeping = SimpleNamespace(stopping=asyncio.Event(), beat=lambda: None)
        operations = SimpleNamespace(recorder=SimpleNamespace(write=lambda: None))
        (bench.place / "resolv.conf").write_text("nameserver 192.0.2.53\n")
        resolv = ResolvConf(None, path=bench.place / "resolv.conf")
        upkeep = Upkeep(settings, bench.live, resolv, keeping, operations)
        await asyncio.wait_for(upkeep.run(Broken(settings, bench.live)), 30)
        return len(tries), bench.log.named("upkeep.failed")

    tries, said = wire.do(on_bench, backend, steps)
    assert tries > 3
    assert [one["duty"] for one in said] == ["keep"], "and it is told once"
