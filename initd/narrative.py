"""What was refused, told: the texts of `fwctl log`, `blocked`, `why` and `suggest`. Dictionaries in, strings out."""

from __future__ import annotations

import shutil
import sys
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from initd.core.spans import show_span
from initd.report import BOLD, GREEN, RED, YELLOW, paint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REASONS = {
    "unlisted": "not listed",
    "denied": "an exception says never",
    "special": "in a special range, not listed",
    "port": "listed, but not with this port",
}

NARROWEST = 12
"""Characters below which no column is cut."""


def log(answer: dict[str, Any], *, color: bool) -> str:  # noqa: ARG001 - one signature for all
    """One line a row."""
    lines = [line(row) for row in answer["rows"]] or ["nothing was refused"]
    if answer["lost"]:
        lines.append(f"({answer['lost']} more packets were logged by the kernel and lost on the way)")
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """`TIME refused 3x name:port/tcp (address): reason, by whom`."""
    word = "AUDIT   " if row["allowed"] else "refused "
    address = f" ({row['address']})" if row["address"] not in {None, row["subject"]} else ""
    return f"{clock(row['last'])} {word}{row['count']:>4}x  {what(row)}{address}: {REASONS[row['reason']]}; {who(row)}"


def blocked(answer: dict[str, Any], *, color: bool) -> str:
    """The table."""
    if not answer["blocked"]:
        return "nothing was refused"
    now = datetime.now(tz=UTC).timestamp()
    rows = [
        (
            one["what"],
            str(one["count"]),
            f"{show_span(max(now - one['last'], 0))} ago",
            one["why"],
            ", ".join(one["by"]),
        )
        for one in answer["blocked"]
    ]
    return table(("WHAT", "COUNT", "LAST", "WHY", "BY"), rows, width=terminal_width(), color=color)


def why(answer: dict[str, Any], *, color: bool) -> str:
    """What happened, that a person must change it, and the line to propose."""
    good = answer["allowed"]
    word = paint("allowed" if good else "refused", GREEN if good else RED, color=color)
    lines = [f"{answer['target']}: {word}: {answer['reason']}"]
    if not answer["port_given"]:
        lines[0] += " (no port was given)"
    lines += [f"  decided by line {one['line']}: {one['text']}" for one in answer["lines"]]
    for lease in answer["leases"]:
        lines.append(f"  known address: {lease['name']} is {lease['address']}, for {show_span(lease['seconds'])} more")
    lines += [f"  {line(row)}" for row in answer["refusals"]]
    return "\n".join([*lines, *_advice(answer)])


def _advice(answer: dict[str, Any]) -> list[str]:
    proposal = answer["proposal"]
    if proposal is None:
        return ["This box lets it through. If it fails all the same, the other side or the path to it is the reason."]
    lines = [
        "This is the box's network policy and no passing fault: trying again, another port, a proxy or another",
        "resolver will not help. Only a person can change it.",
    ]
    if proposal["line"] is None:
        return [*lines, f"No line is proposed: {proposal['reason']}."]
    lines += ["Ask for this line:", ""]
    lines += [f"    {one}" for one in proposal["line"].splitlines()]
    lines += ["", f"in {answer['file']}{_instead(answer)}, and then, on the host:", "", f"    {answer['command']}"]
    return lines


def _instead(answer: dict[str, Any]) -> str:
    """A file replaces the defaults; whoever writes a first line must know."""
    return (
        " (not there yet: begin it with what /run/initd/policy.txt holds, it replaces the defaults)"
        if (answer["defaults"])
        else ""
    )


def suggest(answer: dict[str, Any], *, color: bool) -> str:
    """Policy lines with comments, fit to be pasted."""
    lines = []
    for one in answer["lines"]:
        comment = f"  # {one['count']}x, last {clock(one['last'])}, by {', '.join(one['by'])}"
        comment += "; only looked up: the port is a guess" if one["guessed"] else ""
        first, *more = one["line"].splitlines()
        lines += [f"{first:<40}{comment}", *more]
    lines += [f"# {one['subject']}: {one['reason']} ({one['count']}x)" for one in answer["skipped"]]
    if (left := answer["lines_total"] - len(answer["lines"])) > 0:
        lines.append(f"# … and {left} more")
    if answer["written"] is not None:
        done = f"nothing added: {answer['to']} has every line"
        if count := len(answer["written"]):
            done = f"{count} line{'s' * (count > 1)} added to {answer['to']}; put into force by: {answer['command']}"
        lines.append(paint(f"# {done}", YELLOW, color=color))
    return "\n".join(lines or ["# nothing was refused that a line could allow"])


def audit(answer: dict[str, Any], *, color: bool) -> str:
    """Whether it is on; while it is, `banner` says the rest."""
    if answer["mode"] == "audit":
        lines = [paint("audit mode is ON", RED, color=color) + ": `fwctl suggest` lists what was used, `--off` ends it"]
    else:
        lines = [paint("audit mode is off", GREEN, color=color) + ": the policy is enforced"]
    return "\n".join([*lines, *(f"  closed {one}" for one in answer["closed"])])


def banner(answer: dict[str, Any]) -> str | None:
    """What every command says while audit mode is on."""
    if "audit" not in answer:
        return None
    left = answer["audit"]["seconds_left"]
    end = "for as long as the box runs (INITD_MODE=audit)" if left is None else f"for {show_span(left)} more"
    return f"*** AUDIT MODE {end}: NOTHING IS ENFORCED, what is not listed is let through and recorded ***"


TEXT: dict[str, Callable[..., str]] = {"audit": audit, "log": log, "blocked": blocked, "why": why, "suggest": suggest}


def folded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was refused, over all actors: most frequent first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        reason = REASONS[row["reason"]] + (" (audit: let through)" if row["allowed"] else "")
        one = found.setdefault(
            (what(row), reason),
            {"what": what(row), "subject": row["subject"], "port": row["port"], "why": reason,
             "count": 0, "first": row["first"], "last": row["last"], "by": []},
        )  # fmt: skip
        one["count"] += row["count"]
        one["first"], one["last"] = min(one["first"], row["first"]), max(one["last"], row["last"])
        if who(row) not in one["by"]:
            one["by"].append(who(row))
    return sorted(found.values(), key=lambda one: (-one["count"], -one["last"]))


def what(row: dict[str, Any]) -> str:
    """`name (A)` for a question, `name:port/tcp` for a connection."""
    if row["kind"] == "name":
        return str(row["subject"]) + ("" if row["proto"] in {"A", "AAAA"} else f" ({row['proto']})")
    host = f"[{row['subject']}]" if ":" in row["subject"] else row["subject"]
    if row["port"] is None:
        return f"{host} (protocol {row['proto']})"
    return f"{host}:{row['port']}/{row['proto']}"


def who(row: dict[str, Any]) -> str:
    """The actor as far as it is known."""
    actor = row["actor"]
    user = actor["user"] or ("unknown" if actor["uid"] is None else f"uid {actor['uid']}")
    session = actor["session"]
    if actor["command"]:
        user += f", pid {actor['pid']}: {actor['command']}"
    elif session:
        user += f", somebody in the session of {session['leader']}: {session['command']}"
    return user + (f" [{session['tty']}]" if session and session["tty"] else "")


def clock(seconds: float) -> str:
    """Local date and time to the second."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def terminal_width() -> int | None:
    """Columns of the terminal on stdout; None when it is none, and nothing has to be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None, color: bool, wrap: bool = False
) -> str:
    """Columns side by side; the widest are cut until a line fits `width`, the first one last.

    With `wrap` the last column is not cut, but goes on in the next line.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(widths[1:])
        place = widths.index(widest, 1) if widest > NARROWEST else 0
        if widths[place] <= NARROWEST:
            break
        widths[place] -= 1
    broken = [row for whole in rows for row in (_broken(whole, widths[-1]) if wrap else (whole,))]
    lines = [
        "  ".join(_cell(text, size) for text, size in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *broken)
    ]
    return "\n".join([paint(lines[0], BOLD, color=color), *lines[1:]])


def _broken(row: Sequence[str], width: int) -> list[Sequence[str]]:
    """`row`, and below it what does not fit into its last column."""
    first, *more = textwrap.wrap(row[-1], width, break_on_hyphens=False) or [""]
    empty = [""] * (len(row) - 1)
    return [[*row[:-1], first], *([*empty, part] for part in more)]


def _cell(text: str, width: int) -> str:
    return f"{text:<{width}}" if len(text) <= width else text[: width - 1] + "…"
