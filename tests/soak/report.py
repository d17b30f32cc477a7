"""The table at a soak's end, as Markdown: every figure comes from the run."""

from __future__ import annotations

import datetime as dt
import os
import platform
import statistics
from typing import TYPE_CHECKING

from tests.soak.figures import ROLES

if TYPE_CHECKING:
    from tests.soak.run import Soak


def table(soak: Soak) -> str:
    """What was run, what was done to the box, what was found."""
    counts, problems = soak.counts, soak.problems
    rows = [
        ("date, seed", f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}, {soak.plan.seed}"),
        ("length", f"{soak.elapsed:.0f} s" + (" (interrupted)" if soak.interrupted else "")),
        ("machine", f"Linux {platform.release()}, {os.cpu_count()} cores, Python {platform.python_version()}"),
        ("sessions", f"{counts['session']}"),
        ("attempts judged", f"{counts['listed']} listed that answered, {counts['refused']} unlisted that were refused"),
        ("attempts not judged", f"{counts['unjudged']} (no resolver worked, or a reload was on its way)"),
        ("late, fine when tried again", f"{counts['late']}"),
        ("reloads", f"{counts['reload']} good, {counts['bad_reload']} of a bad file"),
        ("addresses rotated", f"{counts['rotate'] + counts['rotate_downloads']} times"),
        ("DNS faults", f"{counts['fault']} (SERVFAIL, silence, garbage, slow; one resolver or both)"),
        ("wardens killed (SIGKILL)", f"{counts['kill']}{_back(soak.recoveries)}"),
        ("orphan storms", f"{counts['orphans']}"),
        ("downloads", f"{counts['download']}, {counts['bytes downloaded'] / 1000:.0f} kB in all"),
        ("packets that reached the internet", f"{counts['packets']}"),
        ("… of them unlisted, answers to the unlisted included", f"**{problems['leak']}**"),
        ("DNS questions that reached a resolver", f"{counts['questions']}"),
        ("false refusals", f"**{problems['false refusal']}**"),
        ("downloads broken", f"**{problems['download']}**"),
        ("zombies", f"**{len(soak.figures.stuck)}**"),
        ("unhealthy (fwctl health, 3 tries)", f"**{problems['health']}** of {counts['health'] + 1}"),
        *(_life(soak, role) for role in ROLES),
        ("problems of any kind", f"**{problems.total()}**"),
    ]
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]) + "\n"


def _back(seconds: list[float]) -> str:
    if not seconds:
        return ""
    return f"; the next answered after {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s at most"


def _life(soak: Soak, role: str) -> tuple[str, str]:
    trend = soak.figures.trend(role)
    key = f"{role}: memory (RSS) and descriptors, first third → last"
    if trend is None:
        return key, "too short to tell"
    rss = " → ".join(f"{value / 1024:.1f}" for value in trend.rss)
    fds = " → ".join(f"{value:.0f}" for value in trend.fds)
    return key, f"{rss} MB, {fds} (medians over {trend.seconds:.0f} s of one process)"
