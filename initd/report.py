"""Answers as text: what `fwctl` prints when nobody asked for JSON. Pure: dictionaries in, strings out."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from initd.core.spans import show_span

if TYPE_CHECKING:
    from collections.abc import Callable

    from initd.core.policy import Policy

GREEN, RED, YELLOW, BOLD, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[1m", "\x1b[0m"

MANY = 20
"""Lines of one list that are shown; the rest is counted."""


def size_of(policy: Policy) -> dict[str, int]:
    """How many entries of which kind a policy holds."""
    return {
        "names": sum(not rule.wildcard for rule in policy.names),
        "wildcards": sum(rule.wildcard for rule in policy.names),
        "ranges": len(policy.ranges),
        "feeds": len(policy.feeds),
        "exceptions": len(policy.denials),
    }


def status(answer: dict[str, Any], *, color: bool, width: int | None = None) -> str:
    """The page one looks at, at most `width` columns wide (None: as wide as it comes)."""
    lines = _wrapped(_facts(answer), width or 10_000)
    word = _state(answer)
    shade = {"enforcing": GREEN, "starting": YELLOW}.get(word, RED)
    lines[0] = paint(word, shade, color=color) + lines[0].removeprefix(word)
    warnings = _wrapped([("warning", text) for text in answer["warnings"]], width or 10_000)
    return "\n".join([*lines, *(paint(line, YELLOW, color=color) for line in warnings)])


def _state(answer: dict[str, Any]) -> str:
    return "AUDIT MODE" if answer["mode"] == "audit" else "enforcing" if answer["ready"] else "starting"


def _facts(answer: dict[str, Any]) -> list[tuple[str, str]]:
    policy, guard, rules, refusals = answer["policy"], answer["guard"], answer["rules"], answer["refusals"]
    facts = [
        (
            _state(answer),
            f"backend {answer['backend']}, up {show_span(answer['uptime'])}, warden started {answer['generation']}x",
        ),
        ("policy", f"{policy['source']}: {_sizes(policy)}"),
        ("rules", f"{rules['static']} static, {rules['private']} private, {rules['learned']} learned elements"),
        ("guard", _served(guard)),
        ("upstream", ", ".join(map(_upstream, guard["upstreams"])) or "none"),
        ("refused", f"in the last hour {refusals['hour']}" + _most(refusals)),
    ]
    if absent := [name for name, there in answer["capabilities"].items() if not there]:
        facts.append(("missing", f"in this kernel or namespace: {', '.join(absent)}"))
    if counted := ", ".join(f"{value} {key}" for key, value in answer["refused"].items() if value):
        facts.append(("packets", f"refused since the start: {counted}"))
    if last := answer["last_reload"]:
        words = f"{show_span(last['ago'])} ago: +{last['added']} -{last['removed']}, closed {last['closed']}"
        facts.append(("reload", words))
    return facts


def _served(guard: dict[str, Any]) -> str:
    return (
        f"{guard['queries']} queries, {guard['from_cache']} from cache, {guard['refused']} refused, "
        f"{guard['leases']} leases; upstream p50 {guard['upstream_p50']} ms, p99 {guard['upstream_p99']} ms"
    )


def _most(refusals: dict[str, Any]) -> str:
    """The three most frequent, and what is missing from the count."""
    top = ", ".join(
        f"{one['subject']}{'' if one['port'] is None else ' port ' + str(one['port'])} {one['count']}x"
        for one in refusals["top"]
    )
    return (f": {top}" if top else "") + (f"; {refusals['lost']} reports lost" if refusals["lost"] else "")


def _wrapped(facts: list[tuple[str, str]], width: int) -> list[str]:
    lines: list[str] = []
    for label, words in facts:
        lines += textwrap.wrap(
            f"{label:<10} {words}", max(width, 30), subsequent_indent=" " * 11, break_on_hyphens=False
        ) or [label]
    return lines


def reload(answer: dict[str, Any], *, color: bool) -> str:
    """What changed, and what was closed by it."""
    policy = answer["policy"]
    head = paint(f"reloaded in {answer['ms']:.0f} ms", GREEN, color=color)
    lines = [f"{head}: {policy['source']}: {_sizes(policy)}"]
    for key, mark in (("added", "+"), ("removed", "-"), ("closed", "closed ")):
        lines += _bounded([f"  {mark}{text}" for text in answer[key]], answer[f"{key}_total"])
    if not answer["added_total"] and not answer["removed_total"]:
        lines.append("  nothing changed")
    lines += [f"{paint('warning', YELLOW, color=color)}: {text}" for text in answer["warnings"]]
    return "\n".join(lines)


def check(answer: dict[str, Any], *, color: bool) -> str:
    """A valid file; an invalid one is an error and never gets here as text."""
    return f"{answer['file']}: {paint('valid', GREEN, color=color)}: {_sizes(answer)}"


def test(answer: dict[str, Any], *, color: bool) -> str:
    """The decision, and the line it comes from."""
    allowed = answer["allowed"]
    word = paint("allowed" if allowed else "refused", GREEN if allowed else RED, color=color)
    lines = [f"{answer['target']}: {word}: {answer['reason']}"]
    lines += [f"  line {one['line']}: {one['text']}" for one in answer["lines"]]
    return "\n".join(lines)


def checks(answer: dict[str, Any], *, color: bool) -> str:
    """A list of checks, each with what was seen."""
    good = answer.get("healthy", answer.get("verified"))
    words = ("healthy", "unhealthy") if "healthy" in answer else ("verified", "NOT verified")
    lines = [paint(words[0] if good else words[1], GREEN if good else RED, color=color)]
    for one in answer["checks"]:
        mark = paint("ok  ", GREEN, color=color) if one["ok"] else paint("FAIL", RED, color=color)
        lines.append(f"  {mark} {one['name']}: {one['detail']}")
    return "\n".join(lines)


def version(answer: dict[str, Any], *, color: bool) -> str:  # noqa: ARG001 - one signature for all
    """The version alone, fit for a script."""
    return f"fwctl {answer['version']}"


TEXT: dict[str, Callable[..., str]] = {
    "status": status,
    "reload": reload,
    "check": check,
    "test": test,
    "health": checks,
    "verify": checks,
    "version": version,
}


def color() -> bool:
    """Whether stdout is a terminal whose user has nothing against colour (no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, code: str, *, color: bool) -> str:
    """`text` in a colour, when there may be one."""
    return f"{code}{text}{PLAIN}" if color else text


def _bounded(lines: list[str], total: int) -> list[str]:
    shown = lines[:MANY]
    return [*shown, f"  … and {total - len(shown)} more"] if total > len(shown) else shown


def _sizes(answer: dict[str, Any]) -> str:
    kinds = [(answer[key], key) for key in ("names", "wildcards", "ranges", "feeds", "exceptions")]
    words = [f"{count} {kind[:-1] if count == 1 else kind}" for count, kind in kinds if count]
    return ", ".join(words) or "empty: nothing may be reached"


def _upstream(server: dict[str, Any]) -> str:
    return f"{server['server']} ({'NOT answering' if server['ailing'] else 'healthy'})"
