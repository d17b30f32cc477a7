"""Runs: anybody, on demand. The operator's command: asks the warden over its socket, or works on a file by itself.

stdout is the answer (text, or JSON with --json), stderr is for errors. Exit codes: 0 yes, 1 no (unhealthy, refused,
failed verification), 64 usage, 69 no box is running here, otherwise the error's own (docs/fwctl.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from initd import __version__, completion, diagnosis, inquiry, metrics, narrative, report
from initd.asking import UnavailableError, ask
from initd.errors import ConfigError, InitdError, KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

USAGE = 64


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of sysexits.h for wrong usage."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit 64."""
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"fwctl: {message}\nhint: {self.prog} --help\n")


def parser() -> Parser:
    """The command line; docs/fwctl.md is generated from it."""
    top = Parser(
        prog="fwctl",
        description="Show, change and check what this box may reach.",
        epilog="Exit codes: 0 yes, 1 no, 64 usage, 69 no box is running here, 70 verification, 71 kernel, "
        "77 privilege, 78 policy or settings.",
    )
    top.add_argument("--version", action="version", version=f"fwctl {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=summary, description=details or f"{summary[0].upper()}{summary[1:]}.")
        one.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return one

    command("status", "show mode, backend, policy, guard and warnings")
    command(
        "reload",
        "put the policy file into force, without restarting anything",
        "Read the policy file, and put it into force as a whole. A bad file changes nothing. Unchanged entries are "
        "never closed, not even for a moment; connections to what was removed are closed and listed. From a "
        "session that may write the policy file only a narrower policy is accepted; run it as root to widen.",
    )
    check = command("check", "check a policy file; needs no running box")
    check.add_argument("file", nargs="?", metavar="FILE", help="default: the box's own policy file; - reads stdin")
    test = command("test", "say what would happen to a connection, and which line decides")
    test.add_argument("target", metavar="HOST[:PORT]", help="a name or an address; port 443 when left out")
    inquiry.add_commands(command)
    diagnosis.add_commands(command)
    command("health", "check that the box is ready, enforced and usable; exit 1 says no")
    command("verify", "try, as the session user, that the unlisted is refused and the listed answers")
    command(
        "metrics",
        "print the figures of `status` for Prometheus",
        "Print the figures of `status` in Prometheus' text format. With the setting metrics_file (INITD_METRICS_FILE) "
        "the warden writes the same to a file every 15 s, for a node exporter's textfile collector.",
    )
    shells = command("completion", "print the completion script of a shell")
    shells.add_argument("shell", choices=sorted(completion.SHELLS), metavar="SHELL", help="bash, fish or zsh")
    command("version", "print the version")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for as long as we run
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a locale without our characters
    arguments = parser().parse_args(argv)
    try:
        answer, code = COMMANDS[arguments.command](arguments)
        text = json.dumps(answer) if arguments.json else TEXT[arguments.command](answer, color=report.color())
        if loud := narrative.banner(answer):
            sys.stderr.write((report.paint(loud, report.RED, color=sys.stderr.isatty())) + "\n")
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except InitdError as error:
        return _fail(error, as_json=arguments.json)
    except BrokenPipeError:
        # The reader went away (head, a pager): python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except OSError as error:  # stdout is a file on a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stderr.write(f"fwctl: {error.strerror or error}\n")
        return KernelError.code
    except KeyboardInterrupt:
        return 128 + 2
    return code


def _fail(error: InitdError, *, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"error": error.message, "hint": error.hint, "code": error.code}) + "\n")
    else:
        sys.stderr.write(f"fwctl: {error}\n")
    return error.code


def _status(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    return ask("status"), 0


def _reload(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    return ask("reload"), 0


def _test(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    answer = ask("test", target=arguments.target)
    return answer, 0 if answer["allowed"] else 1


def _health(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    try:
        answer = ask("health")
    except UnavailableError as error:
        answer = {"healthy": False, "checks": [{"name": "warden", "ok": False, "detail": error.message}]}
    return answer, 0 if answer["healthy"] else 1


def _verify(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    answer = ask("verify")
    return answer, 0 if answer["verified"] else 1


def _version(_: argparse.Namespace) -> tuple[dict[str, Any], int]:
    return {"version": __version__}, 0


def _completion(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    return {"shell": arguments.shell, "script": completion.SHELLS[arguments.shell](parser())}, 0


def _check(arguments: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Parse a file with the same parser and the same reader as the boot does."""
    from initd.core import policy  # noqa: PLC0415 - the other commands need not pay for it
    from initd.files import read_regular  # noqa: PLC0415
    from initd.settings import load  # noqa: PLC0415

    name = arguments.file or str(load(os.environ).policy)
    if arguments.file is None and not os.path.lexists(name):
        raise ConfigError(f"{name} is not there", hint="without it the built-in defaults are in force (docs/policy.md)")
    raw = sys.stdin.buffer.read(policy.MAX_BYTES + 1) if name == "-" else read_regular(Path(name), policy.MAX_BYTES)
    try:
        parsed = policy.parse(policy.decode(raw, file=name), file=name)
    except policy.PolicyError as error:
        if not arguments.json:
            raise
        issues = [
            {"line": one.line, "column": one.column, "reason": one.reason, "hint": one.hint} for one in error.issues
        ]
        return {"file": name, "valid": False, "issues": issues}, ConfigError.code
    return {"file": name, "valid": True, "issues": [], **report.size_of(parsed)}, 0


COMMANDS: dict[str, Callable[[argparse.Namespace], tuple[dict[str, Any], int]]] = {
    "status": _status,
    "reload": _reload,
    "check": _check,
    "test": _test,
    "health": _health,
    "verify": _verify,
    "version": _version,
    "metrics": _status,
    "completion": _completion,
    **inquiry.COMMANDS,
    "doctor": diagnosis.examine,
}


TEXT: dict[str, Callable[..., str]] = {
    **report.TEXT,
    **narrative.TEXT,
    "metrics": metrics.text,
    "doctor": diagnosis.text,
    "completion": lambda answer, **_: str(answer["script"]).rstrip(),
    "status": lambda answer, *, color: report.status(answer, color=color, width=narrative.terminal_width()),
}


if __name__ == "__main__":
    sys.exit(main())
