"""What happens when: an endless list of events that a seed decides, and nothing else does."""

from __future__ import annotations

import heapq
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.soak import world
from tests.support.zone import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = 600.0
"""Seconds from which a run is long: no warden is killed in its middle half, so that one warden's life can be judged."""

BETWEEN_KILLS = (64.0, 120.0)
"""The keeper forgets a crash after 60 s: each kill meets the shortest back-off."""

# kind → seconds to the first, and least and most seconds from one to the next
PACE = {
    "reload": (2.0, 3.0, 9.0),
    "bad_reload": (8.0, 15.0, 40.0),
    "rotate": (1.0, 3.0, 6.0),
    "rotate_downloads": (9.0, 10.0, 20.0),
    "fault": (12.0, 14.0, 28.0),
    "orphans": (6.0, 10.0, 20.0),
    "download": (3.0, 10.0, 25.0),
    "health": (5.0, 8.0, 15.0),
    "kill": (16.0, *BETWEEN_KILLS),
}


class Event(NamedTuple):
    """`at` in seconds from the start of the run."""

    at: float
    kind: str
    how: dict[str, Any]


def events(seed: int, seconds: float) -> Iterator[Event]:
    """All events of a run, in order; the same seed and length give the same events."""
    chance = random.Random(seed)
    heap = [(first, kind) for kind, (first, _, _) in PACE.items()]
    heapq.heapify(heap)
    while heap[0][0] < seconds:
        at, kind = heapq.heappop(heap)
        how = _how(kind, chance)
        _, least, most = PACE[kind]
        again = at + chance.uniform(least, most) + how.get("seconds", 0.0) * (kind == "fault")
        heapq.heappush(heap, (again, kind))
        if kind == "kill" and seconds >= LONG and seconds / 4 < at < seconds * 3 / 4:
            continue
        yield Event(at, kind, how)


def _how(kind: str, chance: random.Random) -> dict[str, Any]:
    match kind:
        case "reload":
            return {"pool": set(chance.sample(world.POOL, chance.randint(1, len(world.POOL))))}
        case "bad_reload":
            return {"line": chance.choice(["*", "*.com", "0.0.0.0/0", "a..b", "name:99999", "\x00", "@nothing"])}
        case "rotate":
            return {"to": chance.sample(range(len(world.ROTATION)), 2)}
        case "rotate_downloads":
            return {"to": chance.randrange(len(world.DOWNLOAD_ROTATION))}
        case "fault":
            fault = chance.choice([Fault.SERVFAIL, Fault.SILENT, Fault.GARBAGE, "slow"])
            whom = chance.choice(["both", "first", "second"])
            return {"fault": fault, "whom": whom, "seconds": chance.uniform(2.0, 8.0)}
        case "orphans":
            return {"count": chance.choice([100, 300, 1000])}
        case "download":
            return {"seconds": chance.uniform(15.0, 60.0)}
        case "kill":
            return {"after_reload": chance.random() < 0.5, "pool": set(chance.sample(world.POOL, 12))}
        case _:
            return {}
