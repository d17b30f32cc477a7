"""Runs: keeper, on the warden's request. Starts `initd probe` as the session user and brings back what it printed.

The warden cannot become the session user (it has neither SETUID nor a way to get it), the keeper can. Time, output
and number are bounded, because the plan and the network decide how long a probe takes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from initd import drop, reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from initd.settings import Settings

SECONDS = 30.0
MAX_OUTPUT = 64 * 1024
AT_ONCE = 4
WAITING = 32
EX_TEMPFAIL, EX_SOFTWARE = 75, 70


class Errand:
    """One running probe."""

    def __init__(self, number: object, plan: object, settings: Settings) -> None:
        self.number = number
        self.output = bytearray()
        self.deadline = time.monotonic() + SECONDS
        self.fd, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(theirs, True)
        stdin = os.memfd_create("initd-plan")
        os.write(stdin, json.dumps(plan).encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        self.pid = os.fork()
        if self.pid == 0:
            _become_probe(stdin, theirs, settings)
        os.close(stdin)
        os.close(theirs)

    def drain(self) -> bool:
        """Take what it printed; False when nothing more will come."""
        while True:
            try:
                data = os.read(self.fd, 16384)
            except BlockingIOError:
                return True
            self.output += data
            if len(self.output) > MAX_OUTPUT:
                self.kill()
                return False
            if not data:
                return False

    def kill(self) -> None:
        """End it; the kernel may have been faster."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def answer(self, status: int) -> dict[str, Any]:
        """The reply for the warden. `result` is always an object; it holds `error` when the probe gave none."""
        self.drain()
        os.close(self.fd)
        code = reap.exit_code(status)
        if len(self.output) > MAX_OUTPUT:
            return {"event": "probe", "id": self.number, "code": code, "result": {"error": "too much output"}}
        try:
            result = json.loads(bytes(self.output))
        except (ValueError, RecursionError):
            result = None
        if not isinstance(result, dict):
            late = time.monotonic() > self.deadline
            result = {"error": f"took more than {SECONDS:g} s" if late else "printed no JSON object"}
            code = code or EX_SOFTWARE
        return {"event": "probe", "id": self.number, "code": code, "result": result}


def _become_probe(stdin: int, stdout: int, settings: Settings) -> None:
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
        os.execve(sys.executable, [sys.executable, "-I", "-m", "initd", "probe"], environ)  # noqa: S606
    except BaseException as error:  # noqa: BLE001  # a forked child must never return into its parent's code
        os.write(2, f"initd keeper: probe: {error}\n".encode())
        os._exit(EX_SOFTWARE)
