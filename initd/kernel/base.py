"""What a backend is: it receives a value, never verbs.

Both backends implement `Backend`; `initd.enforce` is the only caller of `apply`, the DNS guard the only caller of
`learn`. Nothing here is thread-safe: one thread owns a backend, except `learn` and `forget`, which use a socket of
their own and may be called from the event loop while another thread is inside `apply` or `read`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from initd.core.ruleset import Element, Ruleset


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found by trying, in this namespace. `missing` says in words what cannot be enforced or is absent."""

    backend: str
    usable: bool
    capabilities: Mapping[str, bool]  # ipv4 ipv6 sets timeouts owner conntrack reject source nflog
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """What the kernel holds of ours, in the kernel's own words, so that two listings compare as text.

    `rules`: chain label ("ip/INITD-OUTPUT") → rules in order, without counters and handles. `sets`: set name →
    elements. Learned sets are listed by presence only (`learned` names them); their elements change under us.
    """

    rules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sets: Mapping[str, frozenset[Element]] = field(default_factory=dict)
    learned: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Counters:
    """Packets refused since the rules were made, by reason ("special", "unlisted", "dns", "input")."""

    refused: Mapping[str, int]


def seconds_left(end: float | None) -> int | None:
    """The time-out of what is to end at monotonic second `end`: at least 1, 0 for ever, None for not at all."""
    if end is None:
        return None
    return 0 if math.isinf(end) else max(1, math.ceil(end - time.monotonic()))


class Backend(Protocol):
    """One way to put a `Ruleset` into the kernel. All errors are `KernelError` (71) or `PrivilegeError` (77)."""

    name: str

    def probe(self) -> Probe:
        """Try each needed thing in this namespace and leave nothing behind."""

    def lockdown(self, warden_uid: int) -> None:
        """Refuse all but loopback, both families, hooked first; 127.0.0.11 for everybody but `warden_uid`.

        Idempotent, replaces whatever of ours stood there, touches nobody else's rules.
        """

    def apply(self, ruleset: Ruleset) -> None:
        """Make the kernel hold exactly this. Never opens a gap, never touches an unchanged element or a learned one."""

    def expect(self, ruleset: Ruleset) -> Listing:
        """What `read` must return after `apply(ruleset)`. Pure."""

    def read(self) -> Listing:
        """What the kernel holds now, by a reader that shares no code with the writer."""

    def learn(self, elements: Iterable[tuple[Element, int]]) -> None:
        """Insert or refresh (element, seconds to live) and return after the kernel has acknowledged all of them.

        The networks are single addresses. Raises KernelError when even one was not inserted.
        """

    def forget(self, elements: Iterable[Element]) -> None:
        """Delete learned elements; one that is not there is not an error."""

    def learned(self) -> dict[Element, int]:
        """Learned elements with their remaining seconds."""

    def counters(self) -> Counters:
        """Refusals so far."""

    def teardown(self) -> None:
        """Remove everything of ours. Only tests, benches and an operator's explicit wish call it; no exit path does."""
