"""Runs: root as PID 1 until the box is armed, then CLAUDE_UID without a capability, always.

Not being PID 1 (under another init, in a shared PID namespace) it is a child subreaper and ends its own descendants
only. Its memory is the box's fixed cost: stdlib only, and of that little.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from initd import command, drop, journal, notify, reap
from initd.channel import Channel
from initd.errors import InitdError, KernelError
from initd.journal import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KEEPER = [sys.executable, "-I", "-m", "initd", "keeper"]
MARGIN = 2.0  # seconds that the keeper gets beyond the grace: its own KILL round and the warden's goodbye
ROUND = 0.5


class Options:
    """What the command line says. `mask` is the caller's signal mask, which the command gets back."""

    __slots__ = ("group", "mask", "parent_death")

    def __init__(self, *, mask: frozenset[int], group: bool = False, parent_death: int = 0) -> None:
        self.mask, self.group, self.parent_death = mask, group, parent_death


def main(argv: list[str], options: Options, *, keeper: list[str] | None = None) -> int:
    """Straight down: everything that can fail happens before the command exists. Returns the exit code."""
    signals = reap.SignalQueue()  # first: what arrives from here on waits for us
    drop.set_name("initd")
    if options.parent_death:
        drop.prctl(drop.PR_SET_PDEATHSIG, options.parent_death)
    if os.getpid() != 1:
        drop.prctl(drop.PR_SET_CHILD_SUBREAPER, 1)  # orphans come to us, not to the init above
    facts = _prepare()
    if isinstance(facts, int):
        return facts
    journal.configure(facts["environ"])
    notifier = notify.Notifier(os.environ.pop("NOTIFY_SOCKET", None))  # connected while we may
    box = Box(signals, facts, options)
    box.start_keeper(keeper or KEEPER)
    box.wait_for("armed")
    if box.over:  # a failed start, or the engine's TERM
        return box.stop(argv)
    drop.drop_to(facts["uid"], facts["gid"], own=facts["own"])
    if options.parent_death:
        drop.prctl(drop.PR_SET_PDEATHSIG, options.parent_death)  # a change of UID clears it, prctl(2)
    drop.attack(box.keeper)
    box.channel.send(event="dropped")
    box.wait_for("ready")
    if not box.over:
        if argv:
            box.start_command(argv)
        command.close_inherited({signals.fileno(), box.channel.fileno(), notifier.fileno()})
        notifier.tell("READY=1")
        say("info", "init.ready", uid=facts["uid"], pid=os.getpid())
        reap.forget_startup()
        box.idle()
    notifier.tell("STOPPING=1")
    return box.stop(argv)


def _prepare() -> dict[str, Any] | int:
    """What PID 1 has to know, or the exit code of the child that found out why there can be no box."""
    import json  # noqa: PLC0415  # loaded already, by the channel

    ours, theirs = os.pipe()
    child = _fork()
    if child == 0:
        from initd import prepare  # noqa: PLC0415  # its memory ends with the child

        prepare.run(theirs)
    os.close(theirs)
    with open(ours, "rb") as file:
        answer = file.read()
    code = reap.exit_code(os.waitpid(child, 0)[1])
    if code:
        return code
    facts: dict[str, Any] = json.loads(answer)
    return facts


def _fork() -> int:
    try:
        return os.fork()
    except OSError as error:
        raise KernelError(f"no process to be had: {error.strerror}", hint="raise pids_limit in compose.yaml") from error


class Box:
    """The keeper, the command, and what is known of them."""

    def __init__(self, signals: reap.SignalQueue, facts: dict[str, Any], options: Options) -> None:
        self._signals, self._facts, self._options = signals, facts, options
        self._heard: set[str] = set()
        self._stopping = self._hurry = False
        self._command: int | None = None
        self._command_code: int | None = None
        self._keeper_code: int | None = None
        self._poll = select.poll()
        self._poll.register(signals, select.POLLIN)
        self.keeper = 0

    @property
    def over(self) -> bool:
        """True when the box is to end: told so, its command ended, or its keeper before there was a box."""
        lost = self._keeper_code is not None and "ready" not in self._heard
        return self._stopping or self._command_code is not None or lost

    def start_keeper(self, argv: list[str]) -> None:
        """Fork and exec it with one end of the channel and nothing else of ours."""
        self.channel, theirs = Channel.pair()
        self.keeper = _fork()
        if self.keeper == 0:
            command.become_keeper(argv, theirs.fileno(), self._facts["environ"])
        theirs.close()
        self._poll.register(self.channel, select.POLLIN)

    def start_command(self, argv: list[str]) -> None:
        """Fork and exec the user's command as the user that we are now."""
        pid = _fork()
        if pid == 0:
            command.become(argv, mask=self._options.mask, home=self._facts["home"])
        self._command = pid

    def wait_for(self, event: str) -> None:
        """Until the keeper has said `event`, or the box is over."""
        while event not in self._heard and not self.over:
            self.turn(None)

    def idle(self) -> None:
        """Until the box is over. Wakes up for nothing but signals and the keeper."""
        while not self.over:
            self.turn(None)

    def turn(self, seconds: float | None) -> None:
        """Wait for something to happen, at most `seconds`, and deal with all of it."""
        self._poll.poll(None if seconds is None else seconds * 1000 + 1)
        for number in self._signals.read():
            if number != signal.SIGCHLD:
                self._act(number)
        for pid, status in reap.reap():
            self._ended(pid, status)
        if self.channel.open:
            self._heard.update(message["event"] for message in self.channel.receive())
            if not self.channel.open:
                self._poll.unregister(self.channel)

    def _act(self, number: int) -> None:
        """TERM ends the box, INT does when there is no command; everything else is the command's business.

        Whoever could send it may: the engine, root, a terminal, our parent. A session cannot (`drop.drop_to`).
        """
        if number == signal.SIGTERM or (number == signal.SIGINT and self._command is None):
            self._hurry = self._stopping
            self._stopping = True
        elif self._command is not None:
            command.forward(self._command, number, group=self._options.group)

    def _ended(self, pid: int, status: int) -> None:
        if pid == self._command and os.WIFSTOPPED(status):
            command.resume(pid, status)
        elif os.WIFSTOPPED(status):
            return
        elif pid == self._command:
            self._command, self._command_code = None, reap.exit_code(status)
            command.take_terminal_back()
        elif pid == self.keeper:
            self._keeper_code = reap.exit_code(status)
            if "ready" in self._heard and not self._stopping and self._command_code is None:
                say("critical", "keeper.lost", code=self._keeper_code, effect="rules stay, nobody restarts the warden")

    def stop(self, argv: list[str]) -> int:
        """End everything within the grace; the exit code is the command's, the failed keeper's, or 0."""
        if self._keeper_code is not None and "ready" not in self._heard and not self._stopping:
            return self._keeper_code or InitdError.code
        say("info", "init.stopping", grace=self._facts["grace"])
        self._stopping = True
        self._tell_all(signal.SIGTERM)
        deadline = time.monotonic() + self._facts["grace"]
        self.channel.send(event="stop", grace=self._facts["grace"])
        while not self._finished(deadline):
            if self._hurry or time.monotonic() > deadline:
                self.channel.send(event="stop", grace=0)
                self._tell_all(signal.SIGKILL)
                self._hurry = False
                deadline = min(deadline, time.monotonic())
            self.turn(max(0.1, min(ROUND, deadline - time.monotonic())))
        if self._command_code is not None:
            return self._command_code
        return 128 + signal.SIGTERM if argv else 0

    def _finished(self, deadline: float) -> bool:
        """The keeper waits for everybody, so its end is the end; without it we look for ourselves."""
        if time.monotonic() > deadline + MARGIN:
            return True
        if self._keeper_code is None:
            return False
        return not self._reachable()

    def _reachable(self) -> list[reap.Process]:
        uid = os.geteuid()
        everybody = reap.living(os.getpid(), spare={self.keeper})
        return [process for process in everybody if uid in (0, process.ruid, process.suid)]

    def _tell_all(self, number: int) -> None:
        """Signal every process of our own user. As root (the drop never came) that is the keeper's task."""
        if os.geteuid() == 0:
            return
        if os.getpid() == 1:  # kill(-1) is atomic: no fork escapes it
            reap.tell(-1, number)
            return
        for process in self._reachable():
            reap.tell(process.pid, number)
