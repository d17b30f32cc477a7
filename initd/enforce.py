"""Runs: warden. The only caller of `Backend.apply`: apply whole, read back through another reader, then believe."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

from initd.core.diff import difference
from initd.errors import EnforcementError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from initd.core.ruleset import Ruleset
    from initd.kernel.base import Backend


class Enforcer:
    """Holds the last ruleset that the kernel was seen to hold. For the one thread that owns the backend."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._believed: Ruleset | None = None

    def lockdown(self, warden_uid: int) -> None:
        """Refuse everything but loopback; nothing is believed of what stood there before."""
        self._believed = None
        self._backend.lockdown(warden_uid)

    def enforce(self, ruleset: Ruleset) -> None:
        """Apply, read back, compare. Raises EnforcementError whose text is the difference."""
        self._believed = None
        with _collection_paused():
            self._backend.apply(ruleset)
            found = self._differs(ruleset)
        if found:
            raise EnforcementError(
                "the kernel does not hold what was asked of it:\n" + "\n".join(found),
                hint="something else writes firewall rules in this network namespace",
            )
        self._believed = ruleset

    def take_over(self, ruleset: Ruleset) -> None:
        """Believe in what a predecessor wrote if it is what `ruleset` asks for; enforce it otherwise."""
        if self._differs(ruleset):
            self.enforce(ruleset)
        self._believed = ruleset

    def recheck(self) -> tuple[str, ...]:
        """How the kernel differs now from what was last enforced: empty when the rules stand as written."""
        if self._believed is None:
            return ("nothing is enforced",)
        return self._differs(self._believed)

    def _differs(self, ruleset: Ruleset) -> tuple[str, ...]:
        return difference(self._backend.expect(ruleset), self._backend.read())


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Hundreds of thousands of elements are live at once and in no cycle: collecting meanwhile doubles the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
