"""Runs: in PID 1. Decides which signals count: those of the engine and of root, not those of a session.

The sender is what the kernel recorded (`si_pid` 0: outside our PID namespace, pid_namespaces(7); `si_uid`: the
sender's real UID as our user namespace sees it). Looking the sender up in /proc would race with its end.
"""

from __future__ import annotations

import os
import signal
import time

from initd import reap
from initd.journal import say

BURST = 64  # refused signals within a second from one process before it is paused
PAUSE = 0.5  # seconds
LINE_EVERY = 1.0  # seconds between two log lines


class Gate:
    """Admits or refuses; keeps the log short; pauses a flooder.

    A flood has to be paused because a signal that is already pending swallows the next of its kind, the engine's
    too (`legacy_queue` in kernel/signal.c). The flooder has our UID, or it could not reach us, so we may stop it.
    """

    def __init__(self, *, uid: int) -> None:
        self._uid = uid
        self._refused = 0
        self._next_line = 0.0
        self._count: dict[int, int] = {}
        self._window = 0.0
        self._paused: dict[int, float] = {}

    def admits(self, one: reap.Signal) -> bool:
        """True for a signal from outside, from root, from a terminal, or, when we are a child, from our parent."""
        if reap.genuine(one):
            if one.code == reap.SI_KERNEL:
                return True
            if one.pid == 0:
                if not reap.queue_exhausted():
                    return True
            elif one.uid == 0 or (os.getpid() != 1 and one.pid == os.getppid()):
                return True
        self._refuse(one)
        return False

    def patience(self) -> float | None:
        """Seconds until `tidy` has something to do, None when it has not."""
        due = list(self._paused.values())
        if self._refused:
            due.append(self._next_line)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def tidy(self) -> None:
        """Let paused processes go on and write the line that was held back."""
        now = time.monotonic()
        for pid in [pid for pid, until in self._paused.items() if now >= until]:
            del self._paused[pid]
            _signal(pid, signal.SIGCONT)
        if self._refused and now >= self._next_line:
            say("warning", "signals.ignored", count=self._refused)
            self._refused = 0
            self._next_line = now + LINE_EVERY

    def _refuse(self, one: reap.Signal) -> None:
        now = time.monotonic()
        if now >= self._next_line and not self._refused:
            say("warning", "signal.ignored", signal=one.name, pid=one.pid, uid=one.uid)
            self._next_line = now + LINE_EVERY
        else:
            self._refused += 1
        if now >= self._window:
            self._count, self._window = {}, now + 1.0
        self._count[one.pid] = self._count.get(one.pid, 0) + 1
        if self._count[one.pid] == BURST and one.pid > 1 and one.uid == self._uid:
            self._count[one.pid] = 0
            self._paused[one.pid] = now + PAUSE
            _signal(one.pid, signal.SIGSTOP)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        return
