"""Runs: anybody, on demand. `fwctl doctor`: which policy, where, and the findings as a table."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from initd import narrative, published
from initd.asking import UnavailableError, run_dir
from initd.files import read_regular
from initd.report import GREEN, RED, YELLOW, paint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SHADES = {"ok": GREEN, "warning": YELLOW, "failed": RED}


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `doctor` to the command line."""
    one = command(
        "doctor",
        "try every entry of a policy: resolves, connects, TLS, redirects, shared addresses",
        "Try every entry of a policy as a client would: does it resolve, connect, speak TLS for that name, redirect to "
        "hosts that are not listed, share its address. Works on a file before the box exists. Exit 1 when an entry "
        "fails; warnings do not count.",
    )
    one.add_argument("file", nargs="?", metavar="FILE", help="default: what is in force in this box; - reads stdin")


def examine(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Try the entries of FILE, or of what is in force."""
    from initd import doctor  # noqa: PLC0415 - TLS and the policy's grammar: 25 ms that no other command needs
    from initd.core import policy  # noqa: PLC0415

    inside = (run_dir() / "control.sock").exists()
    name = arguments.file or str(run_dir() / published.FILE)
    if arguments.file is None and not os.path.lexists(name):
        raise UnavailableError(
            f"no box is running here ({name})",
            hint="start it with `docker compose up -d`, or try a file: fwctl doctor FILE",
        )
    limit = policy.MAX_BYTES
    raw = sys.stdin.buffer.read(limit + 1) if name == "-" else read_regular(Path(os.path.abspath(name)), limit)  # noqa: PTH100
    parsed = policy.parse(policy.decode(raw, file=name), file=name)
    answer = {"file": name, **doctor.examine(parsed, inside=inside)}
    return answer, 1 if answer["failed"] else 0


def text(answer: dict[str, Any], *, color: bool) -> str:
    """A table, and the sum."""
    rows = [(one["entry"], one["state"], "; ".join(one["notes"])) for one in answer["entries"]]
    table = narrative.table(("ENTRY", "STATE", "NOTES"), rows, width=narrative.terminal_width(), color=color, wrap=True)
    summary = ", ".join(f"{answer[state]} {state}" for state in ("ok", "warning", "failed", "untried") if answer[state])
    shade = SHADES["failed" if answer["failed"] else "warning" if answer["warning"] else "ok"]
    line = f"{answer['file']}: {summary or 'no entries'}"
    return f"{table}\n{paint(line, shade, color=color)}"
