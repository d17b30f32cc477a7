"""Runs: warden, at start and at reload. Names to addresses, all at once, each with a deadline.

The work is the DNS guard's: a name resolved here goes the same way as a client's query, so its addresses are in the
learned set before it counts as resolved. A name that does not resolve is a warning, never a failed start.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from initd.core.ruleset import IPAddress

CONCURRENCY = 128
"""Names in flight; each is two queries (A and AAAA)."""

HOSTS_LIMIT = 1 << 20
"""Bytes of /etc/hosts that are looked at."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What came of a list of names: how many addresses each gave, and why others gave none."""

    addresses: Mapping[str, int]
    failed: Mapping[str, str]


async def resolve_names(
    names: Iterable[str], resolve: Callable[[str], Awaitable[tuple[IPAddress, ...]]], *, within: float
) -> Resolution:
    """Resolve `names` in parallel; whatever has no answer after `within` seconds in all counts as failed."""
    addresses: dict[str, int] = {}
    failed: dict[str, str] = {}
    waiting = iter(dict.fromkeys(names))

    async def worker() -> None:
        for name in waiting:
            try:
                failed[name] = "no answer in time"
                addresses[name] = len(await resolve(name))
                del failed[name]
            except OSError as error:
                failed[name] = str(error)

    workers = [asyncio.create_task(worker()) for _ in range(CONCURRENCY)]
    _, late = await asyncio.wait(workers, timeout=within)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    failed.update((name, "not tried in time") for name in waiting)
    return Resolution(addresses, failed)


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
