"""Runs: warden, always. Between leases and the kernel's learned set: no lease exists before the kernel holds it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from initd.core.leases import Held, Leases
from initd.errors import InitdError, KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from initd.core.leases import Terms
    from initd.core.policy import Service
    from initd.core.ruleset import Element, IPAddress
    from initd.core.throttle import Throttle
    from initd.logs import Log


class LearnedSet(Protocol):
    """The part of `initd.kernel.base.Backend` that the guard calls. Both raise KernelError."""

    def learn(self, elements: Iterable[tuple[Element, int]]) -> None:
        """Acknowledged by the kernel on return."""

    def forget(self, elements: Iterable[Element]) -> None:
        """Delete."""


class Learner:
    """Grants leases. `failures` counts what the kernel did not take."""

    def __init__(self, backend: LearnedSet, terms: Terms, *, log: Log, loud: Throttle) -> None:
        self.leases = Leases(terms)
        self.failures = 0
        self._backend = backend
        self._log = log
        self._loud = loud

    def hold(self, held: Held, *, lifetime: float, now: float) -> bool | None:
        """Put `held` into the set for `lifetime` seconds; False when it takes no more, None when others had to go."""
        if not self.leases.has_room(held):
            error = KernelError("names below wildcards hold as much as they may together")
            return self._complain("learn", len(held.addresses), error)
        grant = self.leases.grant(held, lifetime=lifetime, now=now)
        if not self._learn(grant.insert):
            # Some may have got in before the one that did not; an element without a lease would never be taken back.
            self._forget([element for element, _ in grant.insert if not self.leases.needs(element)])
            return False
        evicted = self.leases.commit(grant)
        self._forget(evicted)
        return None if evicted else True

    def reconsider(self, services_of: Callable[[str, IPAddress], frozenset[Service]]) -> tuple[Element, ...]:
        """Hold every lease to a new policy; what was forgotten."""
        lost, gained = self.leases.reconsider(services_of, now=time.monotonic())
        self._learn(gained)
        self._forget(lost)
        return tuple(lost)

    def sweep(self, in_use: Collection[IPAddress]) -> None:
        """Keep what has open connections, end what is over."""
        extend, forget = self.leases.sweep(time.monotonic(), in_use)
        self._learn(extend)
        self._forget(forget)

    def restore(
        self,
        saved: Mapping[str, Mapping[IPAddress, int]],
        held_by: Callable[[str, IPAddress], Held],
        *,
        elapsed: float,
        least: float,
    ) -> int:
        """Take up saved leases as the policy allows; how many addresses."""
        taken, now = 0, time.monotonic()
        for name, addresses in saved.items():
            for address, seconds in addresses.items():
                left = min(max(seconds - elapsed, least), self.leases.terms.longest)
                held = held_by(name, address)
                if left > 0 and held.services:
                    taken += self.hold(held, lifetime=left, now=now) is not False
        return taken

    def _learn(self, elements: list[tuple[Element, int]]) -> bool:
        try:
            if elements:
                self._backend.learn(elements)
        except InitdError as error:
            return self._complain("learn", len(elements), error)
        return True

    def _forget(self, elements: list[Element]) -> bool:
        try:
            if elements:
                self._backend.forget(elements)
        except InitdError as error:
            return self._complain("forget", len(elements), error)
        return True

    def _complain(self, verb: str, count: int, error: InitdError) -> bool:
        self.failures += 1
        if self._loud.allows(time.monotonic()):
            self._log.error("dns.set", verb=verb, elements=count, error=error.message)
        return False
