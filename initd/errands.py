"""Runs: keeper, on the warden's request. Starts `initd probe` as the session user and brings back what it printed.

The warden cannot become the session user (it has neither SETUID nor a way to get it), the keeper can. Time, output
and number are bounded, because the plan and the network decide how long a probe takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time

from initd import drop, journal, reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from initd.channel import Channel
    from initd.settings import Settings

SECONDS = 30.0
MAX_OUTPUT = 64 * 1024
AT_ONCE = 4
WAITING = 32
EX_TEMPFAIL, EX_SOFTWARE = 75, 70


class Errands:
    """The probes that run and those that wait, all for one warden at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running: dict[int, Errand] = {}
        self._waiting: list[tuple[object, object, Channel]] = []

    def ask(self, message: dict[str, Any], channel: Channel) -> None:
        """Run the plan of `message` now or later; the answer goes to `channel`, wherever that leads by then."""
        if len(self._waiting) >= WAITING:
            channel.send(**_answer(message.get("id"), EX_TEMPFAIL, {"error": "busy"}))
            return
        self._waiting.append((message.get("id"), message.get("plan"), channel))
        self._run_waiting()

    def forget(self) -> None:
        """Whoever asked is gone."""
        self._waiting.clear()
        for errand in self._running.values():
            errand.kill()

    def ended(self, pid: int, status: int) -> None:
        """A child ended: answer, if it was a probe, and let the next one run."""
        errand = self._running.pop(pid, None)
        if errand is not None:
            code, result = errand.conclude(status)
            errand.channel.send(**_answer(errand.number, code, result))
            self._run_waiting()

    def fds(self) -> set[int]:
        """What to poll for input."""
        return {errand.fd for errand in self._running.values() if errand.speaks}

    def deadlines(self) -> list[float]:
        """When to call `tend` at the latest, in monotonic seconds."""
        return [errand.deadline for errand in self._running.values()]

    def tend(self) -> None:
        """Take what was printed, and end whoever takes too long."""
        now = time.monotonic()
        for errand in self._running.values():
            errand.drain()
            if now > errand.deadline:
                errand.kill()

    def _run_waiting(self) -> None:
        while self._waiting and len(self._running) < AT_ONCE:
            number, plan, channel = self._waiting.pop(0)
            try:
                errand = Errand(number, channel, plan=plan, settings=self._settings)
            except OSError as error:  # no process or descriptor to be had: the session's fork bomb, perhaps
                channel.send(**_answer(number, EX_TEMPFAIL, {"error": str(error.strerror)}))
            else:
                self._running[errand.pid] = errand


class Errand:
    """One running probe. `speaks` until its stdout has ended."""

    def __init__(self, number: object, channel: Channel, *, plan: object, settings: Settings) -> None:
        self.number, self.channel = number, channel
        self.output = bytearray()
        self.speaks = True
        self.deadline = time.monotonic() + SECONDS
        self.fd, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self.fd, False)
            with os.fdopen(os.memfd_create("initd-plan"), "r+b", buffering=0) as stdin:
                stdin.write(json.dumps(plan).encode())
                stdin.seek(0)
                self.pid = os.fork()
                if self.pid == 0:
                    _become_probe(stdin.fileno(), theirs, settings)
        except OSError:
            os.close(self.fd)
            raise
        finally:
            os.close(theirs)

    def drain(self) -> None:
        """Take what it printed, up to one byte more than it may."""
        while self.speaks:
            try:
                data = os.read(self.fd, 16384)
            except BlockingIOError:
                return
            self.output += data
            if len(self.output) > MAX_OUTPUT:
                self.kill()
            self.speaks = bool(data) and len(self.output) <= MAX_OUTPUT

    def kill(self) -> None:
        """End it; the kernel may have been faster."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def conclude(self, status: int) -> tuple[int, dict[str, Any]]:
        """Its exit code and what it printed, or an `error` when that was no JSON object."""
        self.drain()
        os.close(self.fd)
        code = reap.exit_code(status)
        if len(self.output) > MAX_OUTPUT:
            return code, {"error": f"printed more than {MAX_OUTPUT} bytes"}
        try:
            result = json.loads(bytes(self.output))
        except (ValueError, RecursionError):
            result = None
        if isinstance(result, dict):
            return code, result
        late = time.monotonic() > self.deadline
        return code or EX_SOFTWARE, {"error": f"took more than {SECONDS:g} s" if late else "printed no JSON object"}


def _answer(number: object, code: int, result: dict[str, Any]) -> dict[str, Any]:
    return {"event": "probe", "id": number, "code": code, "result": result}


def _become_probe(stdin: int, stdout: int, settings: Settings) -> None:
    """With nothing of ours but the pipe: until Python runs, sessions may take its descriptors (pidfd_getfd(2))."""
    log = 2
    try:
        os.setsid()
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, 1 << 20)
        environ = {**os.environ, **settings.environ()}
        environ.pop("INITD_PARENT_FD", None)
        reap.restore_signals(set())
        drop.raise_oom_score()
        drop.become_session(settings.claude_uid, settings.claude_gid)
        log = os.dup(2)  # not inherited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.execve(sys.executable, [sys.executable, "-I", "-m", "initd", "probe"], environ)  # noqa: S606
    except BaseException as error:  # noqa: BLE001  # a forked child must never return into its parent's code
        with contextlib.suppress(OSError):
            os.dup2(log, 2)
        journal.put(f"initd keeper: probe: {error}\n")
    os._exit(EX_SOFTWARE)
