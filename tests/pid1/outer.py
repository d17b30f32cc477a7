"""An outer PID, network and mount namespace in which an init is started as the real PID 1, or below another init."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
UID = 501
WARDEN_USER = "daemon"  # any account of its own will do
INITS = {
    "initd": [sys.executable, "-I", str(HERE / "start.py"), "init", "good"],
    "tini": ["tini"],
    "dumb-init": ["dumb-init"],
    "catatonit": ["catatonit"],
}
AS_USER = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]


def installed() -> list[str]:
    return [name for name in INITS if name == "initd" or shutil.which(name)]


def eventually(condition, *, seconds=20.0, step=0.005):
    """The first true value of `condition()` within `seconds`, else its last value.

    20 s are no claim about anything: whoever claims one says how many seconds it is.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(step)
    return value


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}


class Outer:
    """One init in namespaces of its own. `pid` is its PID as seen from outside: the engine's view."""

    def __init__(self, folder: Path, *, init="initd", below=None, mode="good", environ=None, **popen):
        self.folder, self.init, self.below, self.mode = folder, init, below, mode
        self.popen_options = popen
        folder.chmod(0o777)
        for parent in folder.parents[:3]:
            with contextlib.suppress(OSError):
                parent.chmod(parent.stat().st_mode | 0o055)
        self.run_dir = folder / "run"
        self.environ = {
            "PATH": os.environ["PATH"],
            "CLAUDE_UID": str(UID),
            "CLAUDE_GID": str(UID),
            "INITD_RUN_DIR": str(self.run_dir),
            "INITD_STATE_DIR": str(folder / "state"),
            "INITD_STOP_GRACE": "10",
            "INITD_WARDEN_USER": WARDEN_USER,
            "OUT": str(folder),
            **(environ or {}),
        }
        self.process: subprocess.Popen | None = None
        self.pid = 0
        self.stderr_path = folder / "stderr"
        self.sessions: list[subprocess.Popen] = []

    def start(self, *command: str, options=(), wait=True, setup="", as_user=False, prefix=()):
        argv = list(INITS[self.init])
        if self.init == "initd":
            argv[-1] = self.mode
        argv += [*options, *(["--", *command] if command else [])]
        if as_user and self.init != "initd":
            argv = [*AS_USER, *argv]
        if self.below:
            argv = [*self.below, *argv]
        shell = f'ip link set lo up; {setup}\nexec "$@"'
        outer = ["unshare", "-pfmn", "--mount-proc", "--kill-child=KILL", "bash", "-c", shell, "bash", *prefix, *argv]
        options_ = {"stdin": subprocess.DEVNULL, "stdout": (self.folder / "stdout").open("wb"), **self.popen_options}
        self.process = subprocess.Popen(
            outer, env=self.environ, stderr=self.stderr_path.open("wb"), cwd="/", **options_
        )
        self.pid = eventually(lambda: children(self.process.pid))[0]
        if wait and self.init == "initd":
            assert eventually(self.is_ready), self.stderr
            assert '"init.ready"' in self.stderr, f"it ended with {self.process.poll()}: {self.stderr}"
        elif wait:
            assert eventually(lambda: children(self.pid)), self.stderr
            time.sleep(0.3)  # they do not say when they are ready
        return self

    def events(self, name: str) -> list[dict]:
        """The log lines of one kind, oldest first."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("{") and line.endswith("}")]
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def warden(self, generation=1) -> dict:
        """What the test warden of that generation wrote down at its start."""
        path = self.run_dir / f"warden.{generation}"
        eventually(path.exists)
        return json.loads(eventually(path.read_text))

    def ask(self, text: bytes, seconds=20.0) -> bytes:
        """One request to the test warden through the control socket."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(seconds)
            client.connect(str(self.run_dir / "control.sock"))
            client.sendall(text)
            answer = b""
            while data := client.recv(65536):
                answer += data
            return answer

    def is_ready(self):
        return '"init.ready"' in self.stderr or self.process.poll() is not None

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def init_pid(self) -> int:
        """The PID (outside) of the init itself: below another init it is that one's child."""
        return eventually(lambda: children(self.pid))[0] if self.below else self.pid

    def named(self, comm: str) -> int:
        """The outside PID of the process called `comm`."""
        return next((pid for pid in self.inside() if self.comm(pid) == comm), 0)

    @staticmethod
    def comm(pid: int) -> str:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/comm").read_text().strip()
        return ""

    def inside(self) -> list[int]:
        """Every process of the PID namespace, as seen from outside."""
        try:
            mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        except OSError:
            return []
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns/pid") == mine:
                        found.append(int(entry.name))
        return found

    def zombies(self) -> int:
        """Zombies keep their PID namespace but lose the link, so they are counted by their parent."""
        count = 0
        for pid in children(self.init_pid):
            with contextlib.suppress(OSError, KeyError):
                count += status(pid)["State"].startswith("Z")
        return count

    def session(self, *argv: str, uid=UID, **options) -> subprocess.Popen:
        """As an engine's `exec`: a process in the box whose parent is outside it."""
        user = AS_USER if uid == UID else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        enter = [
            "nsenter",
            "-t",
            str(self.pid),
            "-p",
            "-m",
            "-n",
            "--",
            *([] if uid == 0 else [*user, "--no-new-privs"]),
        ]
        session = subprocess.Popen([*enter, *argv], env=self.environ, cwd="/", **options)
        self.sessions.append(session)
        return session

    def kill(self, number=signal.SIGTERM):
        os.kill(self.init_pid, number)

    def wait(self, seconds=15.0) -> int:
        return self.process.wait(seconds)

    def close(self):
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                if self.pid:
                    os.kill(self.pid, signal.SIGKILL)
            self.process.kill()
        for one in filter(None, [*self.sessions, self.process]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGCONT)  # nsenter stops with its child, and a zombie would keep the box
            one.wait(10)
            if one.stdout is not None:
                one.stdout.close()
