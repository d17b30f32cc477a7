"""Which names were refused, how often and when: a bounded table that forgets the ones not seen for longest."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 1024


@dataclass(frozen=True, slots=True)
class RefusedName:
    """`type` as a mnemonic; `first` and `last` are the caller's clock (seconds since the epoch)."""

    name: str
    type: str
    count: int
    first: float
    last: float


class Refusals:
    """The table."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._seen: dict[tuple[str, str], tuple[int, float, float]] = {}

    def add(self, name: str, qtype: str, now: float) -> bool:
        """Count one refusal; True when it is new to the table."""
        key = (name, qtype)
        count, first, _ = self._seen.pop(key, (0, now, now))
        self._seen[key] = (count + 1, first, now)
        if len(self._seen) > self._most:
            del self._seen[next(iter(self._seen))]
        return count == 0

    def listing(self) -> list[RefusedName]:
        """Latest last."""
        return [RefusedName(name, qtype, *value) for (name, qtype), value in self._seen.items()]


class Throttle:
    """At most `rate` events a second on average, `burst` at once."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = 0.0

    def allows(self, now: float) -> bool:
        """Whether one more event is within the rate; counts it when it is."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
