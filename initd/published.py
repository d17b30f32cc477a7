"""Runs: warden, at every change. `policy.txt` in the run directory: what is in force, for whoever is in the box.

In the policy file's own format, so that it can be copied to begin a file with; world-readable, writable for nobody.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from initd.core.policy import dump

if TYPE_CHECKING:
    from pathlib import Path

    from initd.core.policy import Policy
    from initd.logs import Log

FILE = "policy.txt"

_HEAD = """\
# What this box may reach now: the list that is in force, from {source}.
# Everything else is refused at once, names and addresses alike. This is policy, no passing fault.
# Only a person can change it. `fwctl why HOST` says which line to ask for.
"""


def text(policy: Policy, source: str, *, audit: bool = False) -> str:
    """The file's contents; `parse` makes an equivalent policy of it."""
    loud = "# AUDIT MODE: NOTHING IS ENFORCED NOW; what is not listed is let through and recorded.\n" if audit else ""
    return loud + _HEAD.format(source=source) + dump(policy)


def publish(run_dir: Path, contents: str, *, log: Log) -> None:
    """Replace the file; a box whose run directory is full goes on without."""
    try:
        replace(run_dir / FILE, contents)
    except OSError as error:
        log.warning("policy.unpublished", path=str(run_dir / FILE), reason=error.strerror)


def replace(path: Path, contents: str) -> None:
    """Write a file that all may read, whole or not at all. Raises OSError.

    No link is followed: a metrics file may lie where sessions write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(contents)
            os.fchmod(file.fileno(), 0o644)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
