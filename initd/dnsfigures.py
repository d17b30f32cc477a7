"""Runs: warden, always. What the DNS guard reports about itself, and the errors of resolving a name by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from initd.core.policy import Verdict
    from initd.upstream import ServerStats


class Asked(NamedTuple):
    """A question and who asked: `peer` is (address, port, …) of the client, `stream` says TCP.

    `name` as text (escaped when it is no host name), `type` as a mnemonic; `allowed` only because of audit mode.
    """

    name: str
    type: str
    verdict: Verdict
    peer: tuple[Any, ...]
    stream: bool
    allowed: bool = False


@dataclass(slots=True)
class Counts:
    """Since the start."""

    queries: int = 0
    from_cache: int = 0
    forwarded: int = 0
    refused: int = 0
    malformed: int = 0
    stripped: int = 0
    stray: int = 0
    failed: int = 0
    stale: int = 0


@dataclass(frozen=True, slots=True)
class GuardStats:
    """Counts since the start; latencies of the latest upstream answers in milliseconds."""

    counts: Counts
    insert_failures: int
    upstream_p50: float
    upstream_p99: float
    leases: int
    cached: int
    pending: int
    upstreams: tuple[ServerStats, ...]


class ResolveError(OSError):
    """`kind`: refused, nxdomain, empty, servfail, timeout, insert, overload or stopped."""

    def __init__(self, name: str, kind: str) -> None:
        self.reason = _KINDS.get(kind, kind)
        super().__init__(f"{name}: {self.reason}")
        self.name = name
        self.kind = kind


_KINDS = {
    "refused": "not listed",
    "nxdomain": "does not exist",
    "empty": "has no usable address",
    "servfail": "the resolvers fail",
    "timeout": "no resolver answers",
    "insert": "the kernel does not take its addresses",
    "overload": "too many questions at once",
}
