"""Runs: anybody, on demand. The commands of `fwctl` that explain: log, blocked, why, suggest."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from initd import narrative
from initd.asking import UnavailableError, ask
from initd.core.presets import DEFAULT_POLICY
from initd.core.spans import parse_span
from initd.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

PATIENCE = 0.5
"""Seconds between two looks of `log -f`."""

RESTART = 60.0
"""Seconds for which `log -f` waits for a warden that restarts."""


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add these commands to the command line."""
    log = command(
        "log",
        "show what was refused, one row for what was the same",
        "Show what was refused, oldest first; what was the same (name or address, port, protocol, process) is one "
        "row with a count. The process is named only when it is certain.",
    )
    log.add_argument("-f", "--follow", action="store_true", help="go on with what comes; with --json one object a line")
    log.add_argument("--since", metavar="TIME", help="30m, 2h, 1d, or a time such as 10:30 or 2026-01-31T10:30")
    blocked = command("blocked", "show what was refused how often, when last and to whom, as a table")
    blocked.add_argument("--since", metavar="TIME", help="as for log")
    why = command(
        "why",
        "say why something is refused, and which line would allow it; exit 1 when it is refused",
        "Say what would happen to a connection and why: the decision, the line it comes from, the addresses known, the "
        "last refusals, the exact line to add and the command that puts it into force. Written to be read by an agent.",
    )
    why.add_argument("target", metavar="HOST[:PORT]", help="a name, an address or a URL; the port refused last, or 443")
    audit = command(
        "audit",
        "enforce nothing for a while and record what would be refused; root only",
        "Audit mode: what is merely unlisted is let through and recorded, so that `suggest` can write the policy. "
        "Special ranges, other resolvers and exceptions stay shut. It ends by itself. Without an option: is it "
        "on?",
    )
    when = audit.add_mutually_exclusive_group()
    when.add_argument("--for", dest="span", metavar="TIME", help="how long, such as 30m or 2h; 24h at most")
    when.add_argument("--off", action="store_true", help="end it now; connections that it let through are closed")
    suggest = command(
        "suggest",
        "print the policy lines that would allow what was refused, in their narrowest form",
        "Print the policy lines that would allow what was refused, in their narrowest form, each with how often and by "
        "whom. Read them before you use them: what was refused may have been refused rightly.",
    )
    suggest.add_argument("--write", metavar="FILE", help="append the lines that FILE does not have yet, and say which")


def _log(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    since = moment(arguments.since)
    if arguments.follow:
        _follow(since, as_json=arguments.json)
    rows, last = everything()
    return {"rows": [row for row in rows if row["last"] >= since], "lost": last["lost"], **_mode(last)}, 0


def _blocked(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    since = moment(arguments.since)
    rows, last = everything()
    return {"blocked": narrative.folded([row for row in rows if row["last"] >= since]), **_mode(last)}, 0


def _why(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    answer = ask("why", target=arguments.target)
    return answer, 0 if answer["allowed"] else 1


def _audit(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    if arguments.span is None and not arguments.off:
        return {"mode": "enforce", "closed": [], **_mode(ask("status"))}, 0
    try:
        seconds = 0 if arguments.off else parse_span(arguments.span)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not (seconds or arguments.off):
        raise UsageError("audit mode for no time at all", hint="to end it: fwctl audit --off")
    return ask("audit", seconds=seconds), 0


def _mode(status: dict[str, Any]) -> dict[str, Any]:
    return {key: status[key] for key in ("mode", "audit") if key in status}


def _suggest(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    answer = ask("suggest")
    if arguments.write is None:
        return {**answer, "written": None, "to": None}, 0
    # A file takes the place of the built-in defaults: one with nothing but these lines would take them away.
    replaces = answer["defaults"] and os.path.realpath(arguments.write) == os.path.realpath(answer["file"])
    written = append(
        arguments.write, [one["line"] for one in answer["lines"]], begin=DEFAULT_POLICY if replaces else ""
    )
    return {**answer, "written": written, "to": arguments.write}, 0


COMMANDS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], int]]] = {
    "log": _log,
    "blocked": _blocked,
    "why": _why,
    "suggest": _suggest,
    "audit": _audit,
}


def everything(after: int = 0) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows after a number, oldest first, and the last answer."""
    rows: list[dict[str, Any]] = []
    while True:
        answer = ask("log", after=after)
        if not answer["rows"]:
            return rows, answer
        rows += answer["rows"]
        after = answer["rows"][-1]["number"]


def moment(text: str | None, now: float | None = None) -> float:
    """Seconds since the epoch of "30m" (ago), "10:30" (today) or an ISO time; 0 for None. Raises UsageError."""
    if text is None:
        return 0.0
    here = datetime.fromtimestamp(time.time() if now is None else now).astimezone()
    try:
        return here.timestamp() - parse_span(text)
    except ValueError:
        pass
    today = f"{here.date().isoformat()}T{text:0>5}" if len(text) <= len("10:30:59") and ":" in text else text
    try:
        found = datetime.fromisoformat(today)
        return (found if found.tzinfo else found.replace(tzinfo=here.tzinfo)).timestamp()
    except ValueError:
        raise UsageError(f"{text!r:.40} is no time", hint="write 30m, 2h, 10:30 or 2026-01-31T10:30") from None


def append(path: str, lines: list[str], *, begin: str = "") -> list[str]:
    """Append the lines that the file does not have; which they were. A link is not followed: root may be asking.

    An empty file begins with `begin`.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        with os.fdopen(descriptor, "r+", encoding="utf-8", newline="") as file:
            text = file.read()
            if not text and begin:
                file.write(begin)
                text = begin
            known = {line.partition("#")[0].strip() for line in text.splitlines()}
            fresh = [line for one in lines for line in one.splitlines() if line not in known]
            if fresh:
                file.write(("\n" if text and not text.endswith("\n") else "") + "".join(f"{line}\n" for line in fresh))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{path}: {reason}", hint="name a file that you may write") from error
    return fresh


def _follow(since: float, *, as_json: bool) -> None:
    for row in _coming(since):
        sys.stdout.write((json.dumps(row) if as_json else narrative.line(row)) + "\n")
        sys.stdout.flush()


def _coming(since: float) -> Iterator[dict[str, Any]]:
    """Rows without end. A warden that restarts counts from a new beginning and has what was written down."""
    after, silent, loud = 0, 0.0, False
    while True:
        try:
            rows, answer = everything(after)
        except UnavailableError:
            silent += PATIENCE
            if silent > RESTART or not after:
                raise
        else:
            silent = 0.0
            if not loud and (words := narrative.banner(answer)):
                sys.stderr.write(f"{words}\n")
            loud = "audit" in answer
            yield from (row for row in rows if row["last"] >= since)
            after = answer["number"]
        time.sleep(PATIENCE)
