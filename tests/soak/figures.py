"""Memory, descriptors and zombies of the product's processes over time, and whether they stay flat."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tests.support.box import Box

ROLES = ("init", "keeper", "warden")
GROWTH = {"init": 512, "keeper": 512, "warden": 4096}
"""KiB that a median may grow from the first third to the last; the warden's caches and allocator breathe by MiBs."""

MORE_DESCRIPTORS = 4
WARM_UP = 10.0  # seconds after a process was first seen


class Sample(NamedTuple):
    """`rss` in KiB; `at` monotonic seconds."""

    at: float
    pid: int
    rss: int
    fds: int


class Trend(NamedTuple):
    """Medians of the first and of the last third of one process's life."""

    role: str
    seconds: float
    rss: tuple[float, float]
    fds: tuple[float, float]

    @property
    def flat(self) -> bool:
        grown = self.rss[1] - self.rss[0] > GROWTH[self.role]
        return not grown and self.fds[1] - self.fds[0] <= MORE_DESCRIPTORS


@dataclass(slots=True)
class Figures:
    """Everything that was sampled; `stuck` are zombies that two samples in a row have seen, by (pid, parent)."""

    samples: dict[str, list[Sample]] = field(default_factory=lambda: {role: [] for role in ROLES})
    stuck: set[tuple[int, str]] = field(default_factory=set)
    _dead: set[tuple[int, str]] = field(default_factory=set)

    def take(self, box: Box) -> None:
        """Look at each process once."""
        dead = set()
        for role, pid in box.pids().items():
            if role not in ROLES:
                continue
            with contextlib.suppress(OSError, KeyError, IndexError, ValueError):
                self.samples[role].append(_sample(pid))
            dead |= {(child, role) for child in _zombies(pid)}
        self.stuck |= dead & self._dead
        self._dead = dead

    def last(self, role: str) -> Sample | None:
        return self.samples[role][-1] if self.samples[role] else None

    def trend(self, role: str) -> Trend | None:
        """Of the life that was sampled longest, its warm-up left out; None when it was too short to tell."""
        lives: dict[int, list[Sample]] = {}
        for sample in self.samples[role]:
            lives.setdefault(sample.pid, []).append(sample)
        life = max(lives.values(), key=lambda one: one[-1].at - one[0].at, default=[])
        warm = [sample for sample in life if sample.at - life[0].at >= WARM_UP]
        if len(warm) < 9:
            return None
        seconds = warm[-1].at - warm[0].at
        first = [sample for sample in warm if sample.at <= warm[0].at + seconds / 3]
        last = [sample for sample in warm if sample.at >= warm[-1].at - seconds / 3]
        rss = tuple(statistics.median(sample.rss for sample in part) for part in (first, last))
        fds = tuple(statistics.median(sample.fds for sample in part) for part in (first, last))
        return Trend(role, seconds, (rss[0], rss[1]), (fds[0], fds[1]))


def _sample(pid: int) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    rss = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return Sample(time.monotonic(), pid, rss, len(os.listdir(f"/proc/{pid}/fd")))


def _zombies(pid: int) -> set[int]:
    """Children of any of the process's threads that wait to be reaped."""
    found = set()
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError, IndexError):
                    state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
                    if state == "Z":
                        found.add(int(child))
    return found
