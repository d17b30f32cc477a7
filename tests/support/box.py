"""A box: the real product as the real PID 1 of fresh pid, mount, ipc and uts namespaces, as an engine would start it.

box = lab.box(policy="site.example\n")
box.start()
assert box.exec(["curl", "-sS", "https://site.example/"]).returncode == 0
assert box.stop().code == 0
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tests.support import product
from tests.support.namespaces import Family, LabError
from tests.support.remote import RESOLVER4, RESOLVER6

if TYPE_CHECKING:
    from collections.abc import Sequence

# linux/capability.h
CAPABILITIES = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
    "NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13, "SYS_CHROOT": 18, "SYS_PTRACE": 19, "SYS_ADMIN": 21,
}  # fmt: skip
DEFAULT_CAPABILITIES = ("NET_ADMIN", "NET_RAW", "SETUID", "SETGID", "SETPCAP", "CHOWN", "KILL", "NET_BIND_SERVICE")
WARDEN_USER, WARDEN_UID = "_initd", 990
SESSION_USER = "claude"
WORKSPACE, HOME, RUN, STATE = "/workspace", "/home/claude", "/run/initd", "/var/lib/initd"
CA_FILE, CLIENT = "/etc/lab-ca.pem", "/lab/client.py"
POLICY_NAME, SETTINGS_NAME = "allowed-domains.txt", "initd.toml"
_LAUNCHER, _CLIENT = (Path(__file__).with_name(name) for name in ("boxroot.py", "client.py"))
_POLL = 0.002  # seconds
_GRACE = 15.0  # seconds that a stop may take before it counts as failed; an engine gives 10
_PATIENCE = 60.0  # seconds for a command that takes one on an idle machine


@dataclass(slots=True, kw_only=True)
class Config:
    """How a box is started; `argv` replaces the product as PID 1, `command` is what the product runs."""

    policy: str | None = ""  # None: no file
    settings: str | None = None  # the text of initd.toml
    policy_writable: bool = False  # False: mounted read-only over the workspace, as compose.yaml does
    command: Sequence[str] = ()
    argv: Sequence[str] = (str(product.INITD),)
    env: dict[str, str] = field(default_factory=dict)
    uid: int = 501
    gid: int = 501
    capabilities: Sequence[str] = DEFAULT_CAPABILITIES
    no_new_privs: bool = True
    resolv_conf: str | None = None  # None: the lab's first resolver
    hosts: str = ""  # lines added to /etc/hosts
    terminal: bool = False  # PID 1 writes its log to our standard error


class Stopped(NamedTuple):
    """`code` is negative for a signal, as with subprocess; `seconds` from the signal to the end."""

    code: int
    seconds: float


class Logs(NamedTuple):
    """What PID 1 and its children wrote to standard error; `events` are the lines that are JSON objects."""

    text: str
    events: list[dict[str, Any]]


class BoxError(AssertionError):
    """The box did not do what it had to; the message ends with its log."""


class Session(subprocess.Popen[bytes]):
    """A command in a box. A signal goes to the command itself: nsenter then reaps it and ends the same way."""

    def send_signal(self, sig: int) -> None:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, _, rest = path.read_text().partition(" ")
                if rest.rpartition(")")[2].split()[1] == str(self.pid):
                    os.kill(int(pid), sig)
                    return
        super().send_signal(sig)


class Box:
    """One box in a lab's namespace. Host-side directories: `workspace`, `home`, `state`; `exec_time` is monotonic."""

    def __init__(self, netns: str, directory: Path, *, family: Family = Family.DUAL, **options: Any) -> None:
        self.netns = netns
        self.family = family
        self.config = Config(**options)
        self.directory = directory / f"box-{len(list(directory.glob('box-*')))}"
        self.workspace, self.home, self.state = (self.directory / name for name in ("workspace", "home", "state"))
        self._ca_file = directory / "ca.pem"
        self._outer: subprocess.Popen[bytes] | None = None
        self.pid = 0  # of PID 1, seen from the host
        self.exec_time = 0.0
        self._make_files()

    # Files

    def _make_files(self) -> None:
        policy = self.workspace / ".aidevcontainer"
        for path in (self.home, self.state, self.directory / "root", self.directory / "etc", policy):
            path.mkdir(parents=True)
            path.chmod(0o755)  # whatever our umask: root in a box has no CAP_DAC_OVERRIDE
        self.workspace.chmod(0o755)
        for path in (self.workspace, self.home, *((policy,) if self.config.policy_writable else ())):
            os.chown(path, self.config.uid, self.config.gid)
        if self.config.policy is not None:
            self.write_policy(self.config.policy)
        if self.config.settings is not None:
            self.write_settings(self.config.settings)
        self._etc("client.py", _CLIENT.read_text())
        server = RESOLVER6 if self.family is Family.V6 else RESOLVER4
        self._etc("resolv.conf", self.config.resolv_conf or f"nameserver {server}\n")
        self._etc("hosts", f"127.0.0.1\tlocalhost\n::1\tlocalhost\n198.51.100.2\tbox\n{self.config.hosts}")
        uid, gid = self.config.uid, self.config.gid
        users = {
            WARDEN_USER: f"x:{WARDEN_UID}:{WARDEN_UID}::/nonexistent:/usr/sbin/nologin",
            SESSION_USER: f"x:{uid}:{gid}::{HOME}:/bin/bash",
        }
        groups = {WARDEN_USER: f"x:{WARDEN_UID}:", SESSION_USER: f"x:{gid}:"}
        for name, extra in (("passwd", users), ("group", groups)):
            kept = [line for line in Path("/etc", name).read_text().splitlines() if line.partition(":")[0] not in extra]
            self._etc(name, "\n".join(kept + [f"{key}:{value}" for key, value in extra.items()]) + "\n")

    def _etc(self, name: str, text: str) -> None:
        path = self.directory / "etc" / name
        path.write_text(text)
        path.chmod(0o644)

    def write_policy(self, text: str | bytes) -> None:
        """Replace the policy file from the host's side; the box sees it at once."""
        self._write(POLICY_NAME, text)

    def write_settings(self, text: str) -> None:
        self._write(SETTINGS_NAME, text)

    def _write(self, name: str, text: str | bytes) -> None:
        path = self.workspace / ".aidevcontainer" / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(0o644)
        if self.config.policy_writable:
            os.chown(path, self.config.uid, self.config.gid)

    def read(self, path: str) -> str:
        """A file as the box sees it."""
        return Path(f"/proc/{self.pid}/root{path}").read_text()

    # Life

    def start(self, *, wait: bool = True, timeout: float = 60.0) -> float:
        """Start PID 1; with `wait` until it is ready. Seconds from exec of PID 1 to ready, or 0.0 without waiting."""
        if self.running:
            raise LabError("the box runs already")
        if self._outer is not None:
            self._drop_outer()
        reader, writer = os.pipe()
        argv = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.netns]
        argv += ["/usr/bin/python3", "-I", "-S", str(_LAUNCHER), str(self._specification(writer))]
        stderr = None if self.config.terminal else (self.directory / "stderr").open("wb")
        with (self.directory / "stdout").open("wb") as stdout:
            self._outer = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, pass_fds=[writer], start_new_session=True
            )
        if stderr is not None:
            stderr.close()
        os.close(writer)
        with open(reader, "rb") as report:
            told = report.read()  # ends when PID 1 execs: the descriptor closes then
        if not told:
            self._outer.wait()
            raise LabError(f"the box could not be built:\n{self.logs().text}")
        pid, _, at = told.decode().partition(" ")
        self.pid, self.exec_time = int(pid), float(at)
        return self.wait_ready(timeout) if wait else 0.0

    def _specification(self, report_fd: int) -> Path:
        etc = self.directory / "etc"
        binds = [(source, target, False) for source, target in product.binds()]
        binds += [(str(etc / name), f"/etc/{name}", True) for name in ("resolv.conf", "hosts", "passwd", "group")]
        binds += [
            (str(self._ca_file), CA_FILE, False),
            (str(etc / "client.py"), CLIENT, False),
            (str(self.workspace), WORKSPACE, True),
            (str(self.home), HOME, True),
            (str(self.state), STATE, True),
        ]
        if not self.config.policy_writable:
            binds.append((str(self.workspace / ".aidevcontainer"), f"{WORKSPACE}/.aidevcontainer", False))
        argv = list(self.config.argv)
        if self.config.command:
            argv += ["--", *self.config.command]
        spec = {
            "root": str(self.directory / "root"),
            "binds": binds,
            "capabilities": [CAPABILITIES[name] for name in self.config.capabilities],
            "no_new_privs": self.config.no_new_privs,
            "env": self.environment(),
            "cwd": WORKSPACE,
            "argv": argv,
            "report_fd": report_fd,
        }
        path = self.directory / "spec.json"
        path.write_text(json.dumps(spec))
        return path

    def environment(self) -> dict[str, str]:
        """What the engine gives PID 1 and every exec session; an empty value in `env` removes a variable."""
        plain = {
            "PATH": f"{product.VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "TERM": os.environ.get("TERM", "dumb"),
            "SSL_CERT_FILE": CA_FILE,
            "CLAUDE_UID": str(self.config.uid),
            "CLAUDE_GID": str(self.config.gid),
        }
        return {key: value for key, value in (plain | self.config.env).items() if value}

    @property
    def running(self) -> bool:
        return self._outer is not None and self._outer.poll() is None

    @property
    def ready(self) -> bool:
        """Whether the product has written its `ready` file."""
        return self.pid != 0 and Path(f"/proc/{self.pid}/root{RUN}/ready").exists()

    def wait_ready(self, timeout: float = 60.0) -> float:
        """Seconds from exec of PID 1 to ready; raises BoxError, log included, if it ends or takes too long."""
        until = time.monotonic() + timeout
        while not self.ready:
            if not self.running:
                code = self.wait()
                raise BoxError(f"the box ended with {code} before it was ready:\n{self.logs().text}")
            if time.monotonic() > until:
                raise BoxError(f"the box was not ready after {timeout} s:\n{self.logs().text}")
            time.sleep(_POLL)
        return time.monotonic() - self.exec_time

    def wait(self, timeout: float = _GRACE) -> int:
        """The exit code of PID 1; raises subprocess.TimeoutExpired."""
        if self._outer is None:
            raise LabError("the box was never started")
        return self._outer.wait(timeout)

    def signal_from_outside(self, number: int = signal.SIGTERM) -> None:
        """What `docker kill --signal` does: PID 1 sees si_pid 0."""
        os.kill(self.pid, number)

    def stop(self, timeout: float = _GRACE) -> Stopped:
        """TERM from outside; raises BoxError if the box has not ended after `timeout` seconds."""
        begin = time.monotonic()
        self.signal_from_outside(signal.SIGTERM)
        try:
            code = self.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise BoxError(f"the box did not stop within {timeout} s:\n{self.logs().text}") from error
        return Stopped(code, time.monotonic() - begin)

    def close(self) -> None:
        """End it hard, if it still runs, and forget it."""
        if self.running and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        if self._outer is not None:
            self._drop_outer()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _drop_outer(self) -> None:
        assert self._outer is not None
        try:
            self._outer.wait(5)
        except subprocess.TimeoutExpired:
            self._outer.kill()
            self._outer.wait()
        self._outer, self.pid = None, 0

    # Sessions

    def entering(self, argv: Sequence[str], *, user: str | tuple[int, int] = "session") -> list[str]:
        """The command line that does what `docker exec` (user root) or the image's shims (user session) do."""
        if not self.running or not self.pid:
            raise LabError(f"the box does not run:\n{self.logs().text}")
        enter = [
            "nsenter",
            f"--target={self.pid}",
            "--mount",
            "--net",
            "--pid",
            "--ipc",
            "--uts",
            f"--wdns={WORKSPACE}",
        ]
        # When nsenter is killed, what it started goes too.
        drop = ["setpriv", "--pdeathsig=KILL", "--inh-caps=-all"]
        if user == "root":
            drop.append("--bounding-set=-all," + ",".join(f"+{name.lower()}" for name in self.config.capabilities))
            if self.config.no_new_privs:
                drop.append("--no-new-privs")
        else:
            uid, gid = (self.config.uid, self.config.gid) if isinstance(user, str) else user
            drop += [f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
        return [*enter, *drop, *argv]

    def exec(
        self,
        argv: Sequence[str],
        *,
        user: str | tuple[int, int] = "session",
        timeout: float = _PATIENCE,
        text: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the box to its end. `user`: "session", "root" or (uid, gid); `text` goes to its input."""
        environment = self._session_environment(user)
        return subprocess.run(
            self.entering(argv, user=user), capture_output=True, text=True, errors="replace", timeout=timeout,
            env=environment, input=text, check=False,
        )  # fmt: skip

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: str | tuple[int, int] = "session",
        stdin: int | IO[Any] | None = subprocess.PIPE,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> Session:
        """Start a command in the box; signalling what is returned signals the command."""
        return Session(
            self.entering(argv, user=user), stdin=stdin, stdout=stdout, stderr=stderr, bufsize=0,
            env=self._session_environment(user),
        )  # fmt: skip

    def _session_environment(self, user: str | tuple[int, int]) -> dict[str, str]:
        home = {"HOME": "/root" if user == "root" else HOME, "USER": "root" if user == "root" else SESSION_USER}
        return self.environment() | home

    def fwctl(
        self, *arguments: str, user: str = "root", timeout: float = _PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run `fwctl` in the box."""
        return self.exec([str(product.FWCTL), *arguments], user=user, timeout=timeout)

    def status(self) -> dict[str, Any]:
        """`fwctl status --json`, parsed; raises BoxError if it fails."""
        done = self.fwctl("status", "--json")
        if done.returncode:
            raise BoxError(f"fwctl status: {done.returncode}: {done.stderr}\n{self.logs().text}")
        parsed: dict[str, Any] = json.loads(done.stdout)
        return parsed

    # What can be seen of it

    def logs(self) -> Logs:
        path = self.directory / "stderr"
        text = path.read_text(errors="replace") if path.exists() else ""
        events = []
        for line in text.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
        return Logs(text, events)

    def stdout(self) -> str:
        return (self.directory / "stdout").read_text(errors="replace")

    def all_pids(self) -> list[int]:
        """Host PIDs of every process in the box's PID namespace, zombies included."""
        mine = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    if os.readlink(path / "ns" / "pid") == mine:
                        found.append(int(path.name))
                except OSError:
                    continue
        return sorted(found)

    def pids(self) -> dict[str, int]:
        """Host PIDs of the product's processes: init, keeper, warden, probe, as far as they exist."""
        roles: dict[int, str] = {}
        parents: dict[int, int] = {}
        for pid in self.all_pids():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            for role in ("keeper", "warden", "probe"):
                if role in words and words[words.index(role) - 1].endswith("initd"):
                    roles[pid] = role
        # What a keeper has forked and is not a warden yet still has its words.
        return {"init": self.pid} | {role: pid for pid, role in roles.items() if roles.get(parents[pid]) != role}
