"""Runs: warden, once. Structured logs to stderr, configured here and nowhere else.

Events are short nouns with fields (`rules.applied backend=xtables ms=12`); stdout is data and stays clean.
"""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog

from initd import journal

if TYPE_CHECKING:
    from initd.settings import Settings

Log = Any
"""A bound structlog logger; its methods are made at run time."""


class _Stderr(io.TextIOBase):
    """The guard answers whether or not anybody reads the log: an engine that is being upgraded does not."""

    def write(self, text: str) -> int:
        """All of it, or what fits now."""
        journal.put(text)
        return len(text)


def configure(settings: Settings) -> Log:
    """Console renderer on a terminal, JSON otherwise or when `settings.log_format` says so."""
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=18, sort_keys=False)
        if console
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _in_order,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]  # it writes and flushes
        cache_logger_on_first_use=True,
    )
    return structlog.get_logger()


def _in_order(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Time, level and event first, as PID 1's and the keeper's lines have them (`initd.journal`)."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {**first, **event}
