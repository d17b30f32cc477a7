"""Write docs/fwctl.md from the command line's own parser: `make docs`."""

from __future__ import annotations

import argparse
import os
import sys

from initd import fwctl

INTRO = """\
# fwctl

The operator's command. It talks to the warden over `/run/initd/control.sock`, or, for `check` and `doctor`, works
on a file by itself. Run it in the box: `docker compose exec claude fwctl status`. This page is generated from
`fwctl --help` and compared by a test.

stdout is the answer, stderr is for errors, and while audit mode is on for a line that says so. Every command takes
`--json` and then prints one JSON object; an error is `{"error": …, "hint": …, "code": …}`, but of a command line that
cannot be read stderr alone tells.

| exit code | meaning |
|---|---|
| 0 | yes: done, valid, allowed, healthy, verified |
| 1 | no: refused (`test`, `why`), unhealthy (`health`), not verified (`verify`), an entry that fails (`doctor`) |
| 64 | wrong usage: an option, a time or a target that cannot be read |
| 69 | no box is running here, or its warden does not answer |
| 70 | the kernel does not hold what was asked, or behaviour says so |
| 71 | the kernel lacks or refuses something |
| 77 | privilege: for example a session that may only narrow its policy |
| 78 | policy or settings |
"""


def document() -> str:
    """The whole page."""
    os.environ["COLUMNS"] = "100"
    top = fwctl.parser()
    (commands,) = (one for one in top._actions if isinstance(one, argparse._SubParsersAction))
    parts = [INTRO, _block("fwctl", top)]
    parts += [_block(f"fwctl {name}", one) for name, one in commands.choices.items()]
    return "\n".join(parts)


def _block(title: str, parser: argparse.ArgumentParser) -> str:
    return f"## {title}\n\n```\n{parser.format_help().strip()}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(document())
