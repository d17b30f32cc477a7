"""Runs: warden. Who is behind a refusal: user, process, exec session, as far as that is certain.

The warden may not look into other users' descriptors (/proc/PID/fd needs ptrace rights), so a process is named only
when it must be the one: the socket is still held by somebody, and all processes of its user are one, or one session.
The socket is looked up again after the look at /proc, so whoever holds it was there to be seen. Anything else is
unknown. A process of another PID namespace that shares the network is beyond this.
"""

from __future__ import annotations

import os
import pwd
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from initd.core.events import COMMAND_LENGTH, Actor, Session, printable
from initd.core.throttle import Throttle
from initd.errors import InitdError
from initd.kernel.netlink import NetlinkRefusal
from initd.kernel.sockdiag import Sockets

if TYPE_CHECKING:
    from initd.kernel.sockdiag import End

LOOKS = 20
"""Looks at /proc a second; each costs about a millisecond on the event loop."""

LOOKUPS = 500
"""Questions to sock_diag a second, at some 30 microseconds."""

PROCESSES = 200
"""Processes of one user that are looked at; of more, nothing is said but whose they are."""

_PTS = 136  # major numbers 136-143 are pseudo terminals (Documentation/admin-guide/devices.txt)


@dataclass(frozen=True, slots=True)
class Process:
    """A line of /proc/PID/stat, as far as it matters."""

    pid: int
    session: int
    tty: str | None


class Owners:
    """Finds actors. Without sock_diag every one of them is as unknown as the kernel's packet log leaves it."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._looks = Throttle(LOOKS, LOOKS)
        self._lookups = Throttle(LOOKUPS, LOOKUPS)
        self._sockets: Sockets | None = None

    def of(self, proto: str, near: End, far: End, *, uid: int | None = None) -> Actor:
        """Who talks from `near` to `far`; `uid` if it is known already."""
        now = time.monotonic()
        if not self._lookups.allows(now):
            return _actor(uid)
        try:
            if self._sockets is None:
                self._sockets = Sockets()
            held = self._sockets.owner(proto, near, far)
            if held is None or not held.inode or uid not in {None, held.uid}:
                return _actor(uid if held is None or uid is not None else held.uid)
            if not self._looks.allows(now):
                return _actor(held.uid)
            processes = processes_of(held.uid, self._proc)
            still = self._sockets.owner(proto, near, far)
        except (InitdError, NetlinkRefusal, OSError):
            return _actor(uid)
        if still != held:
            return _actor(held.uid)
        return self._described(held.uid, processes)

    def _described(self, uid: int, processes: list[Process]) -> Actor:
        sessions = {one.session for one in processes}
        if len(sessions) != 1 or len(processes) > PROCESSES:
            return _actor(uid)
        (leader,) = sessions
        tty = next((one.tty for one in processes if one.tty), None)
        # 0: the leader is in another PID namespace, and what is outside cannot be told apart.
        session = Session(leader, tty, self._command(leader) or "unknown") if leader else None
        if len(processes) > 1:
            return _actor(uid, session=session)
        return _actor(uid, pid=processes[0].pid, command=self._command(processes[0].pid), session=session)

    def _command(self, pid: int) -> str | None:
        try:
            raw = (self._proc / str(pid) / "cmdline").read_bytes()[: 4 * COMMAND_LENGTH]
        except OSError:
            return None
        words = raw.rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
        return printable(words, COMMAND_LENGTH) or None


def processes_of(uid: int, proc: Path = Path("/proc")) -> list[Process]:
    """Living processes of `uid`, PID 1 and ourselves left out: neither opens connections of its own.

    Cut when there are too many to tell anything by: what a session starts must not cost us more than that.
    """
    found: list[Process] = []
    for entry in os.scandir(proc):
        if len(found) > PROCESSES:
            break
        if not entry.name.isdecimal() or entry.name in {"1", str(os.getpid())}:
            continue
        try:
            if entry.stat(follow_symlinks=False).st_uid != uid:
                continue
            stat = (proc / entry.name / "stat").read_text(errors="replace")
        except OSError:
            continue  # it ended
        state, _parent, _group, session, tty = stat.rpartition(")")[2].split()[:5]
        if state not in "ZX":
            found.append(Process(int(entry.name), int(session), _terminal(int(tty))))
    return found


def _terminal(device: int) -> str | None:
    """The name of a tty_nr (proc_pid_stat(5)): the minor number is in bits 31-20 and 7-0, the major in 15-8."""
    major, minor = device >> 8 & 0xFFF, (device >> 12 & 0xFFF00) | (device & 0xFF)
    if not device:
        return None
    return f"pts/{(major - _PTS) * 256 + minor}" if _PTS <= major < _PTS + 8 else f"tty {major}:{minor}"


def _actor(
    uid: int | None, *, pid: int | None = None, command: str | None = None, session: Session | None = None
) -> Actor:
    return Actor(uid, None if uid is None else _user(uid), pid, command, session)


@lru_cache(maxsize=64)
def _user(uid: int) -> str | None:
    try:
        return printable(pwd.getpwuid(uid).pw_name, 32)
    except KeyError:
        return None
