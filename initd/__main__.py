"""Runs: root, as PID 1 (`initd`) or as one of its own processes (`initd keeper`, `initd warden`, `initd probe`).

Nothing but the signal mask is touched before this module decides what it is: as PID 1 the kernel discards a TERM
that is neither blocked nor handled (`sig_task_ignored` in kernel/signal.c), and every import costs milliseconds.
"""

from __future__ import annotations

import sys
from _signal import SIG_BLOCK, pthread_sigmask, valid_signals  # type: ignore[import-not-found]  # `signal` costs 5 ms of enum

USAGE = """\
usage: initd [options] [-- command [argument ...]]

PID 1 for AI coding containers: locks the network down, lets through what
allowed-domains.txt lists, drops to CLAUDE_UID and runs the command, if any.

options:
  -g, --group           send signals to the command's process group, not only to the command
  -p, --parent-death SIGNAL
                        have SIGNAL (TERM, KILL, ...) sent to initd when its parent dies
  -u, --unblock         start the command with no signal blocked: for `env --block-signal initd -u`,
                        which loses no signal while Python starts
  -h, --help            show this text
  -V, --version         show the version

exit codes: the command's own (128+n for signal n, 126 not executable, 127 not
found); 64 usage, 70 verification, 71 kernel, 77 missing privilege, 78 policy or
settings
"""

EX_USAGE = 64
INTERNAL = ("keeper", "warden", "probe")


def main() -> int:
    """Dispatch; the one place where an `InitdError` becomes a line, a hint and an exit code."""
    argv = sys.argv[1:]
    loop = argv[:1] not in (["warden"], ["probe"])  # those two handle signals as programs do
    mask = pthread_sigmask(SIG_BLOCK, valid_signals()) if loop else set()
    from initd.errors import InitdError  # noqa: PLC0415  # the mask comes first

    try:
        return _internal(argv) if argv[:1] and argv[0] in INTERNAL else _first(argv, {int(n) for n in mask})
    except InitdError as error:
        error.tell()
        return error.code


def _internal(argv: list[str]) -> int:
    if len(argv) > 1:
        return _usage(f"'{argv[0]}' takes no arguments")
    from initd import drop  # noqa: PLC0415

    drop.set_name(f"initd-{argv[0]}")
    if argv[0] == "keeper":
        from initd import keeper as part  # noqa: PLC0415
    elif argv[0] == "warden":
        from initd import warden as part  # type: ignore[no-redef]  # noqa: PLC0415
    else:
        drop.prctl(drop.PR_SET_DUMPABLE, 0)  # a session of the same user must not write the probe's answers
        from initd import probe as part  # type: ignore[no-redef]  # noqa: PLC0415
    return int(part.main())


def _first(argv: list[str], mask: set[int]) -> int:
    """Options by hand: argparse would cost PID 1 a megabyte for five flags."""
    group, death, command, rest = False, 0, [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            command, rest = rest, []  # none is fine: an image's ENTRYPOINT ends in `--`, its CMD may be empty
        elif word in ("-h", "--help"):
            sys.stdout.write(USAGE)
            return 0
        elif word in ("-V", "--version"):
            from initd import __version__  # noqa: PLC0415

            sys.stdout.write(f"initd {__version__}\n")
            return 0
        elif word in ("-g", "--group"):
            group = True
        elif word in ("-u", "--unblock"):
            mask = set()
        elif word in ("-p", "--parent-death"):
            import signal  # noqa: PLC0415

            name = rest.pop(0) if rest else ""
            death = int(getattr(signal, "SIG" + name.upper().removeprefix("SIG"), 0)) if name.isalnum() else 0
            if not death:
                return _usage(f"'{word}' needs a signal name such as TERM")
        else:
            return _usage(f"unexpected '{word}'" + ("" if word.startswith("-") else ": put -- before a command"))
    from initd import init  # noqa: PLC0415

    return init.main(command, init.Options(mask=frozenset(mask), group=group, parent_death=death))


def _usage(problem: str) -> int:
    sys.stderr.write(f"initd: {problem}; see initd --help\n")
    return EX_USAGE


if __name__ == "__main__":
    sys.exit(main())
