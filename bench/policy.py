"""How long the policy takes: reading 5,000 and 100,000 lines, and one decision. `python bench/policy.py`."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from initd.core import policy as language

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NAMES = ("github.com", "api.github.com", "a.b.c.d.example.org", "evil.test", "gist.github.com", ".".join("x" * 120))
QUERIES = 200_000


def timed(label: str, step: Callable[[], T]) -> T:
    started = time.perf_counter()
    result = step()
    print(f"{label:32} {(time.perf_counter() - started) * 1e3:9.2f} ms")
    return result


def files() -> None:
    short = "".join(
        f"host{i}.example{i % 97}.com\n" if i % 4 else f"10.0.{i >> 8}.{i & 255}:443\n" for i in range(5000)
    )
    long = "".join(f"h{i:x}.a.b\n" for i in range(100_000))[: language.MAX_BYTES]
    for text in (short, long[: long.rindex("\n") + 1]):
        lines = text.count("\n")
        decoded = timed(f"decode {lines} lines", partial(language.decode, text.encode()))
        policy = timed(f"parse {lines} lines", partial(language.parse, decoded))
        timed(f"lookup of {lines} lines", policy.lookup)
        timed(f"dump of {lines} lines", partial(language.dump, policy))
        more = language.parse(f"{decoded}one.more.example.org\n")
        timed(f"changes of 1 in {lines} lines", partial(language.changes, policy, more))
        timed(f"widens of 1 in {lines} lines", partial(language.widens, policy, more))


def decisions() -> None:
    lookup = language.parse(f"{language.DEFAULT_POLICY}*.example.org\n!gist.github.com\n").lookup()
    for name in NAMES:
        started = time.perf_counter()
        for _ in range(QUERIES):
            lookup.decide(name)
        print(f"decide {name:.24}{'…' if len(name) > 24 else ''}".ljust(32), end=" ")
        print(f"{(time.perf_counter() - started) / QUERIES * 1e6:9.2f} µs")


if __name__ == "__main__":
    files()
    decisions()
