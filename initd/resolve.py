"""Runs: warden, at start and at reload. Names to addresses, all at once, each with a deadline.

The work is the DNS guard's: a name resolved here goes the same way as a client's query, so its addresses are in the
learned set before it counts as resolved. A name that does not resolve is a warning, never a failed start.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from initd.core.dnsfilter import GuardOptions
from initd.core.leases import Terms
from initd.dnsfigures import ResolveError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from initd.core.policy import Policy
    from initd.core.ruleset import IPAddress, IPNetwork
    from initd.settings import Settings

CONCURRENCY = 128
"""Names in flight; each is two queries (A and AAAA)."""

SETTLED = frozenset({"refused", "nxdomain", "empty"})
"""Kinds of failure that are an answer: there is nothing to be reached under that name."""

SWEEP = 10.0
"""Seconds between two looks at open connections, and at resolv.conf."""

HOSTS_LIMIT = 1 << 20
"""Bytes of /etc/hosts that are looked at."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What came of a list of names: how many addresses each gave, and why others gave none.

    `unanswered` are those of the failed ones about which no resolver said anything.
    """

    addresses: Mapping[str, int]
    failed: Mapping[str, str]
    unanswered: frozenset[str]


async def resolve_names(
    names: Iterable[str], resolve: Callable[[str], Awaitable[tuple[IPAddress, ...]]], *, within: float
) -> Resolution:
    """Resolve `names` in parallel; whatever has no answer after `within` seconds in all counts as failed."""
    addresses: dict[str, int] = {}
    failed: dict[str, str] = {}
    settled: set[str] = set()
    waiting = iter(dict.fromkeys(names))

    async def worker() -> None:
        for name in waiting:
            try:
                failed[name] = "no answer in time"
                addresses[name] = len(await resolve(name))
                del failed[name]
            except ResolveError as error:
                failed[name] = error.reason
                if error.kind in SETTLED:
                    settled.add(name)

    workers = [asyncio.create_task(worker()) for _ in range(CONCURRENCY)]
    _, late = await asyncio.wait(workers, timeout=within)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    failed.update((name, "not tried in time") for name in waiting)
    return Resolution(addresses, failed, frozenset(failed) - settled)


def parse_hosts(text: str) -> dict[str, tuple[IPAddress, ...]]:
    """hosts(5): name → addresses, in file order; a line that is not one is skipped, as every libc does."""
    names: dict[str, list[IPAddress]] = {}
    for line in text[:HOSTS_LIMIT].splitlines():
        fields = line.partition("#")[0].split()
        if len(fields) < 2:
            continue
        try:
            address = ip_address(fields[0])
        except ValueError:
            continue
        for name in fields[1:]:
            held = names.setdefault(name.lower().rstrip("."), [])
            if address not in held:
                held.append(address)
    return {name: tuple(held) for name, held in names.items()}


@dataclass(frozen=True)
class Listed:
    """Whether an address lies in one of `networks`; a value, so that two of them compare."""

    networks: tuple[IPNetwork, ...]

    def __call__(self, address: IPAddress) -> bool:
        """For `GuardOptions.range_listed`."""
        return any(address in network for network in self.networks)


def sweep_pause(settings: Settings) -> float:
    """Seconds between two sweeps: `SWEEP`, or less where a lease in use could begin and end between two of them."""
    return min(SWEEP, (settings.dns_floor + settings.dns_grace) / 2)


def guard_options(settings: Settings, policy: Policy, feeds: Iterable[IPNetwork]) -> GuardOptions:
    """What the guard has to know besides the names: the terms of leases, /etc/hosts, and the listed ranges."""
    hosts = read_hosts()
    own = os.uname().nodename.lower()
    return GuardOptions(
        terms=Terms(floor=settings.dns_floor, grace=settings.dns_grace, sweep=1.5 * sweep_pause(settings)),
        local_names=hosts,
        own_names={own: hosts[own]} if own in hosts else {},
        range_listed=Listed((*(rule.network for rule in policy.ranges), *feeds)),
    )


def read_hosts(path: Path = Path("/etc/hosts")) -> dict[str, tuple[IPAddress, ...]]:
    """The engine's hosts file; empty when there is none."""
    try:
        return parse_hosts(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}
