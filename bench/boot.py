"""How long a box takes to be there and to change, and what it costs to have: `python -m bench.boot`, as root."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.lab import Lab
from tests.support.zone import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.box import Box

RUNS = 7
RELOADS = 20
IDLE = 10.0  # seconds
LATENCY = 0.020  # seconds
BACKENDS = ("xtables", "nftables")
Row = tuple[str, list[float], str, str]  # what, measurements, unit, to reach


def names(count: int) -> list[Entry]:
    return [Entry(f"n{number}.example", {"A": (f"203.0.113.{number % 250}",)}) for number in range(count)]


def policy(count: int) -> str:
    return "".join(f"n{number}.example\n" for number in range(count))


def start(backend: str, count: int, latency: float) -> float:
    """Seconds from exec of PID 1 to ready, in a lab of its own."""
    with Lab() as lab:
        lab.dns.load(names(count))
        lab.dns.latency(latency)
        return lab.box(policy=policy(count), env={"INITD_BACKEND": backend}).start()


def reload(box: Box, count: int) -> tuple[float, float]:
    """Milliseconds of a reload that adds one line: as the warden reports it, and of the whole command."""
    box.write_policy(policy(count))
    box.fwctl("reload")
    box.write_policy(policy(count) + "extra.example\n")
    begin = time.monotonic()
    done = box.fwctl("reload")
    whole = (time.monotonic() - begin) * 1000
    if done.returncode:
        raise RuntimeError(done.stderr)
    last = [event for event in box.logs().events if event["event"] == "policy.reloaded"][-1]
    return last["ms"], whole


def pss(pid: int) -> float:
    """Proportional set size in MB: shared pages are counted once over those that share them (proc_pid_smaps(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def wakeups(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


def idle(box: Box) -> Iterator[Row]:
    """What an idle box with 10 names costs."""
    pids = box.pids()
    sizes = {role: pss(pid) for role, pid in pids.items()}
    yield "memory (PSS) of all processes", [sum(sizes.values())], "MB", "< 70"
    for role, size in sizes.items():
        yield f"of which {role}", [size], "MB", ""
    before = {role: wakeups(pid) for role, pid in pids.items()}
    time.sleep(IDLE)
    for role, goal in (("init", "0"), ("keeper", "0"), ("warden", "")):
        yield f"wake-ups of {role}", [(wakeups(pids[role]) - before[role]) / IDLE], "a second", goal


def running(backend: str) -> Iterator[Row]:
    with Lab() as lab:
        lab.dns.load([*names(10), Entry("extra.example", {"A": ("203.0.113.251",)})])
        box = lab.box(policy=policy(10), env={"INITD_BACKEND": backend})
        box.start()
        time.sleep(3)  # the state has been saved and the first sweep is over
        yield from idle(box)
        reload(box, 10)
        inside, whole = zip(*(reload(box, 10) for _ in range(RELOADS)), strict=True)
        yield "reload of one added line, in the warden", list(inside), "ms", "< 100"
        yield "the same, the whole command `fwctl reload`", list(whole), "ms", ""


def measure(backend: str) -> Iterator[Row]:
    def times(count: int, latency: float) -> list[float]:
        return [start(backend, count, latency) for _ in range(RUNS)]

    yield "exec to ready, 10 names, DNS without latency", times(10, 0.0), "s", "< 0.6"
    yield f"exec to ready, 1,000 names, {LATENCY * 1000:.0f} ms per answer", times(1000, LATENCY), "s", "< 2.5"
    yield from running(backend)


def main() -> int:
    print("## A box: to be there, to change, to have\n")
    print(f"Starts: {RUNS} runs, each in a new network namespace; reloads: {RELOADS} runs; idle: {IDLE:.0f} s.\n")
    print("| backend | what | median | best | worst | unit | to reach |")
    print("|---|---|---:|---:|---:|---|---|")
    shown: Callable[[float], str] = lambda value: f"{value:.2f}" if value < 10 else f"{value:.1f}"  # noqa: E731
    for backend in BACKENDS:
        for what, values, unit, goal in measure(backend):
            cells = (statistics.median(values), min(values), max(values))
            print(f"| {backend} | {what} | {' | '.join(map(shown, cells))} | {unit} | {goal} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
