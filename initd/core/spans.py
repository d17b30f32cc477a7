"""Spans of time as people write and read them: 90s, 30m, 2h, 1d."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SPAN = re.compile(r"(?:\d{1,6}[smhd])+", re.ASCII)


def parse_span(text: str) -> int:
    """Seconds of `1h30m` or `45s`; a bare number is refused, because people mean different things by it. ValueError."""
    if not _SPAN.fullmatch(text):
        raise ValueError(f"{text!r:.40} is not a span of time; write it like 30m, 2h or 1h30m")
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)([smhd])", text))


def show_span(seconds: float) -> str:
    """A span in its two largest units that are not 0."""
    left, words = int(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if left >= size:
            words.append(f"{left // size}{unit}")
            left %= size
    if left or not words:
        words.append(f"{left}s")
    return " ".join(words[:2])
