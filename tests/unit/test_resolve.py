from __future__ import annotations

import asyncio
from ipaddress import ip_address

from initd.dnsfigures import ResolveError
from initd.resolve import CONCURRENCY, parse_hosts, resolve_names

ONE = ip_address("203.0.113.1")


def test_names_are_resolved_in_parallel_and_failures_are_named() -> None:
    running = most = 0

    async def resolve(name: str) -> tuple:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        if name == "dead.example":
            raise ResolveError(name, "nxdomain")
        if name == "silent.example":
            raise ResolveError(name, "timeout")
        return (ONE,)

    names = [f"n{i}.example" for i in range(300)] + ["dead.example", "silent.example", "n1.example"]
    outcome = asyncio.run(resolve_names(names, resolve, within=5))
    assert outcome.addresses == {f"n{i}.example": 1 for i in range(300)}
    assert outcome.failed == {
        "dead.example": "does not exist",
        "silent.example": "no resolver answers",
    }
    assert outcome.unanswered == {"silent.example"}
    assert most == CONCURRENCY


def test_the_deadline_holds_for_all_together() -> None:
    async def resolve(name: str) -> tuple:
        await asyncio.sleep(0 if name == "quick" else 60)
        return (ONE,)

    names = ["quick", *(f"slow{i}" for i in range(CONCURRENCY + 5))]
    outcome = asyncio.run(resolve_names(names, resolve, within=0.1))
    assert outcome.addresses == {"quick": 1}
    assert len(outcome.failed) == CONCURRENCY + 5
    assert set(outcome.failed.values()) == {"no answer in time", "not tried in time"}


def test_hosts_file() -> None:
    text = (
        "127.0.0.1 localhost\n\n# note\n172.18.0.5\tRegistry registry.internal. # x\n"
        "nonsense here\n::1 localhost\n10.0.0.1\n"
    )
    assert parse_hosts(text) == {
        "localhost": (ip_address("127.0.0.1"), ip_address("::1")),
        "registry": (ip_address("172.18.0.5"),),
        "registry.internal": (ip_address("172.18.0.5"),),
    }
