"""Runs: root with six capabilities, always. Restarts the warden, holds its sockets, does what only root can.

Nothing reaches it but three things: its parent's channel, the warden's channel (data is checked, the warden is less
privileged) and signals, which it does not act on except for its children's ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

from initd import drop, errands, journal, prepare, reap, sockets
from initd import settings as configuration
from initd.channel import Channel
from initd.errors import EnforcementError, KernelError, PrivilegeError
from initd.journal import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from initd.settings import Settings

SILENCE = 20.0  # seconds without a sign of life before the warden is under suspicion
START_SILENCE = 60.0  # the same for one that has not sent any yet
LAST_CHANCE = 6.0  # more, before it is replaced: when the whole box was frozen, our clock went on and it could not run
BACKOFF_FIRST, BACKOFF_LAST = 0.1, 30.0
HEALTHY = 60.0  # seconds after which the next crash counts as the first again
REMEMBERED = 10  # ends of wardens that the next one is told of
WARDEN_GOODBYE = 1.5  # seconds for resolv.conf and the saved state


def main() -> int:
    """The keeper's process, with the real warden."""
    return run([sys.executable, "-I", "-m", "initd", "warden"])


def run(warden: Sequence[str]) -> int:
    """Keep `warden` (an argv) running until told to stop; the exit code that PID 1 is to see."""
    signals = reap.SignalQueue()
    os.umask(0o022)  # what we and the warden write is for all to read, and for nobody else to write
    journal.configure(os.environ)
    try:
        parent = Channel.inherited(int(os.environ.pop("INITD_PARENT_FD")))
    except (KeyError, ValueError, OSError):
        raise PrivilegeError("the keeper is started by initd only", hint="run `initd`, see `initd --help`") from None
    drop.need(drop.KEEPER)  # before anything else: without NET_ADMIN there is no box
    settings = configuration.load(os.environ)
    account = prepare.warden_account(settings)
    held = sockets.open_all(settings)  # may need NET_BIND_SERVICE, which goes next
    drop.become_keeper()
    keeper = Keeper(settings, list(warden), account=account, held=held, parent=parent)
    keeper.start_warden()
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    while keeper.result is None:
        keeper.watch(poll)
        poll.poll(keeper.patience())
        signals.read()  # only a child's end matters, and reap finds that out
        for pid, status in reap.reap():
            if not os.WIFSTOPPED(status):
                keeper.ended(pid, status)
        keeper.hear_warden()
        keeper.hear_parent()
        keeper.do_what_is_due()
    return keeper.result


class Keeper:
    """The warden of the moment, and what is owed to it."""

    def __init__(
        self,
        settings: Settings,
        warden: list[str],
        *,
        account: tuple[int, int],
        held: dict[str, int],
        parent: Channel,
    ) -> None:
        self._settings, self._argv, self._account, self._held, self._parent = settings, warden, account, held, parent
        # Not getppid(): when it has died that is its heir, and what the heir has below it is not ours to end.
        self._init = parent.maker
        self._pid: int | None = None
        self._channel: Channel | None = None
        self._generation = 0
        self._started = self._heard = time.monotonic()
        self._patience, self._suspected = START_SILENCE, False
        self._backoff = BACKOFF_FIRST
        self._restart_at: float | None = None
        self._ends: list[tuple[float, int]] = []
        self._armed = self._dropped = False
        self._errands = errands.Errands(settings)
        self._watched: set[int] = set()
        self.result: int | None = None

    def start_warden(self) -> None:
        """Fork and exec it with its two capabilities, its channel and the held descriptors."""
        self._generation += 1
        self._restart_at = None
        self._started = self._heard = time.monotonic()
        self._patience, self._suspected = START_SILENCE, False
        try:
            self._channel, theirs = Channel.pair()
            with theirs:
                self._pid = os.fork()
                if self._pid == 0:
                    self._become_warden({**self._held, "": theirs.fileno()})
        except OSError as error:  # no process or descriptor to be had: the session's fork bomb, perhaps
            if self._generation == 1 or self._channel is None:
                raise KernelError(f"the warden cannot be started: {error.strerror}") from error
            self._channel.close()
            self._retry(error=error.strerror)
            return
        say("info", "warden.started", pid=self._pid, generation=self._generation)

    def _become_warden(self, fds: dict[str, int]) -> NoReturn:
        try:
            own = fds.pop("")
            environ = {
                **os.environ,
                **self._settings.environ(),
                "INITD_KEEPER_FD": str(own),
                "INITD_FDS": ",".join(f"{name}={fd}" for name, fd in fds.items()),
                "INITD_GENERATION": str(self._generation),
                "INITD_INIT": str(self._init),
                "INITD_ENDED": ",".join(f"{at:.1f}:{code}" for at, code in self._ends),
            }
            for fd in (own, *fds.values()):
                os.set_inheritable(fd, True)
            reap.restore_signals(set())
            drop.become_warden(*self._account)
            os.execve(self._argv[0], self._argv, environ)  # noqa: S606
        except BaseException as error:  # noqa: BLE001  # a forked child must never return into its parent's code
            journal.put(f"initd: the warden cannot be started: {error}\n")
        os._exit(EnforcementError.code)

    def watch(self, poll: select.poll) -> None:
        """Make `poll` watch exactly what can speak now."""
        channels = [channel for channel in (self._channel, self._parent) if channel is not None and channel.open]
        wanted = {channel.fileno() for channel in channels} | self._errands.fds()
        for fd in self._watched - wanted:
            poll.unregister(fd)
        for fd in wanted - self._watched:
            poll.register(fd, select.POLLIN)
        self._watched = wanted

    def patience(self) -> float | None:
        """Milliseconds until something is due; None when nothing is."""
        due = self._errands.deadlines()
        if self._restart_at is not None:
            due.append(self._restart_at)
        if self._pid is not None and self._armed:
            due.append(self._heard + self._patience)
        return max(0.0, min(due) - time.monotonic()) * 1000 + 1 if due else None

    def ended(self, pid: int, status: int) -> None:
        """A child of ours ended: the warden, or a probe."""
        self._errands.ended(pid, status)
        if pid != self._pid:
            return
        self.hear_warden()  # what it said last
        self._pid = None
        self._errands.forget()
        if self._channel is not None:
            self._channel.close()
        code = reap.exit_code(status)
        if not self._armed:
            if os.WIFSIGNALED(status):
                raise EnforcementError(f"the warden was killed by signal {os.WTERMSIG(status)} before it was armed")
            self.result = code or EnforcementError.code
            return
        if time.monotonic() - self._started >= HEALTHY:
            self._backoff = BACKOFF_FIRST
        self._ends = [*self._ends, (time.monotonic(), code)][-REMEMBERED:]
        self._retry(pid=pid, code=code)

    def _retry(self, **why: object) -> None:
        """Have another one started, later each time."""
        self._restart_at = time.monotonic() + self._backoff
        say("error", "warden.ended", **why, generation=self._generation, restart_in=round(self._backoff, 1))
        self._tell_waiting(f"the warden has ended {self._generation}x; the next is started {self._backoff:g} s later\n")
        self._backoff = min(self._backoff * 2, BACKOFF_LAST)

    def _tell_waiting(self, text: str | None) -> None:
        """Who asks for a warden while there is none reads here what became of it (initd/asking.py)."""
        run_dir = str(self._settings.run_dir)
        with contextlib.suppress(KernelError, OSError):  # a full disk is no reason for a keeper to go
            sockets.retract(run_dir, "restarting") if text is None else sockets.publish(run_dir, "restarting", text)

    def hear_warden(self) -> None:
        """Its messages; anything but the three that the protocol knows is dropped."""
        if self._channel is None:
            return
        for message in self._channel.receive():
            self._heard, self._patience, self._suspected = time.monotonic(), SILENCE, False
            if message["event"] == "armed" and self._armed:
                self._tell_waiting(None)
            elif message["event"] == "armed":
                self._armed = True
                self._parent.send(event="armed")
            elif message["event"] == "probe":
                self._errands.ask(message, self._channel)

    def hear_parent(self) -> None:
        """PID 1's messages; its silence for good means that the box is over."""
        if self.result is not None:
            return
        for message in self._parent.receive():
            if message["event"] == "dropped":
                self._dropped = True
                sockets.publish(str(self._settings.run_dir), "ready", f"{os.getpid()}\n")
                sockets.retract(str(self._settings.run_dir), "failed")
                self._parent.send(event="ready")
            elif message["event"] == "stop":
                self.result = self._stop(_grace(message))
                return
        if not self._parent.open:
            self.result = self._stop(0.0)

    def do_what_is_due(self) -> None:
        """Time-outs: a silent warden, a slow probe, a restart."""
        now = time.monotonic()
        self._errands.tend()
        if self._armed and self._pid is not None and now - self._heard > self._patience:
            self._look_at_pulse(self._pid, now)
        if self.result is None and self._restart_at is not None and now >= self._restart_at:
            self.start_warden()

    def _look_at_pulse(self, warden: int, now: float) -> None:
        """Nothing was heard of the warden for long."""
        beat = sockets.last_beat(self._held["pulse"])
        if beat > self._heard:
            self._heard, self._patience, self._suspected = beat, SILENCE, False
            return
        if self._suspected:
            say("error", "warden.silent", pid=warden, seconds=round(now - max(beat, self._started)))
            os.kill(warden, signal.SIGKILL)
        self._heard, self._patience, self._suspected = now, LAST_CHANCE, True

    def _stop(self, grace: float) -> int:
        """End every process that is not ours, then the warden; the rules stay."""
        self._restart_at = None
        self._errands.forget()
        self._end_others(time.monotonic() + grace)
        if self._pid is not None and self._channel is not None:
            self._channel.send(event="stop")
            if not reap.wait_for_end([self._pid], [], WARDEN_GOODBYE):
                say("error", "warden.killed", pid=self._pid)
                os.kill(self._pid, signal.SIGKILL)
        return 0

    def _end_others(self, deadline: float) -> None:
        """TERM to whomever PID 1 may not signal, wait for all, KILL whoever is left at `deadline`."""
        told: set[int] = set()
        while (left := deadline - time.monotonic()) > 0:
            others = reap.living(self._init, spare={os.getpid()})
            if not others:
                return
            for process in others:
                reachable = self._dropped and self._settings.claude_uid in (process.ruid, process.suid)
                if process.pid not in told and not reachable:
                    reap.tell(process.pid, signal.SIGTERM)
                told.add(process.pid)
            reap.wait_for_end([process.pid for process in others], [self._parent.fileno()], min(left, 0.5))
            for message in self._parent.receive():
                deadline = min(deadline, time.monotonic() + _grace(message))  # a second TERM
            deadline = deadline if self._parent.open else 0.0
        self._kill_others()

    def _kill_others(self) -> None:
        """KILL until nobody is left; ten rounds, because a fork may race with the walk."""
        for _ in range(10):
            others = reap.living(self._init, spare={os.getpid()})
            for process in others:
                reap.tell(process.pid, signal.SIGKILL)
            if not others:
                return
            reap.wait_for_end([process.pid for process in others], [], 0.2)


def _grace(message: dict[str, Any]) -> float:
    grace = message.get("grace", 0.0)
    return float(grace) if isinstance(grace, (int, float)) and grace > 0 else 0.0
