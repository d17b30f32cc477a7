"""A compose project as a user has it: the repository's own compose.yaml (or an example's), a workspace, and commands.

Everything goes through `docker compose`, as typed by people. What a test adds is an override file of its own: the
lab's CA, a quicker health check, and whatever the test is about.
"""

from __future__ import annotations

import copy
import json
import os
import pty
import select
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.engine import Engine, EngineError, client

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

POLICY = ".aidevcontainer/allowed-domains.txt"
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(kw_only=True)
class Project:
    """One project. `files` are compose files; `uid` owns the workspace on the host, as a developer would."""

    engine: Engine
    name: str
    folder: Path
    files: Sequence[Path]
    bundle: Path
    policy: str | None = "site.example\n"
    override: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    uid: int = 501
    service: str = "claude"

    def __post_init__(self) -> None:
        self.workspace = self.folder / "workspace"
        self.workspace.mkdir(parents=True)
        if self.policy is not None:
            self.write_policy(self.policy)
        for path in (self.workspace, *self.workspace.rglob("*")):
            os.chown(path, self.uid, self.uid)
        service: dict[str, Any] = {
            "volumes": [f"{self.bundle}:{BUNDLE}:ro"],
            "healthcheck": {"interval": "1s"},
            "restart": "no",
        }
        override = {"services": {self.service: service}}
        _merge(override, self.override)
        self._override = self.folder / "override.json"  # JSON is YAML
        self._override.write_text(json.dumps(override))

    def write_policy(self, text: str) -> None:
        """Replace the policy from the host's side, in place, as an editor or `cat >` does."""
        path = self.workspace / POLICY
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def change(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Edit the service in the whole, merged configuration: an override can add to lists, but not take away."""
        config = json.loads(self.compose("config", "--format", "json").stdout)
        edit(config["services"][self.service])
        self._override.write_text(json.dumps(config))
        self.files = ()

    def argv(self, *words: str) -> list[str]:
        files = [word for path in (*self.files, self._override) for word in ("-f", str(path))]
        return [client(), "compose", "-p", self.name, *files, *words]

    @property
    def env(self) -> Mapping[str, str]:
        return self.engine.environ() | {"WORKSPACE": str(self.workspace)} | self.environ

    def compose(self, *words: str, timeout: float = 300, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """`docker compose WORDS`; the caller looks at the exit code."""
        return subprocess.run(
            self.argv(*words),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env,
            input=text,
            check=False,
            cwd=self.folder,
        )

    def up(self, *words: str) -> Project:
        """`up -d --wait`; its failure carries the logs."""
        done = self.compose("up", "-d", "--wait", *words)
        if done.returncode:
            health = "".join(one["Output"] for one in self.inspect()["State"].get("Health", {}).get("Log", [])[-1:])
            raise EngineError(f"up: exit {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}\n{health}")
        return self

    def exec(self, *command: str, flags: Sequence[str] = (), **more: Any) -> subprocess.CompletedProcess[str]:
        """`exec -T SERVICE COMMAND`, both outputs captured."""
        return self.compose("exec", "-T", *flags, self.service, *command, **more)

    def output(self, *command: str, **more: Any) -> str:
        """What a command prints that must succeed."""
        done = self.exec(*command, **more)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def of(self, service: str) -> Project:
        """The same project, with another service to exec into."""
        other = copy.copy(self)
        other.service = service
        return other

    def terminal(self, *command: str) -> Terminal:
        """`exec SERVICE COMMAND` on a pseudo-terminal, as in a person's shell."""
        return Terminal(self.argv("exec", self.service, *command), self.env)

    def container(self) -> str:
        """The service's container, running or not."""
        return self.compose("ps", "-aq", self.service).stdout.strip()

    def inspect(self) -> dict[str, Any]:
        """What the engine knows about it."""
        return dict(json.loads(self.engine.docker("inspect", self.container()).stdout)[0])

    def address(self) -> str:
        """The container's IPv4 address on its first network."""
        networks = self.inspect()["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    def logs(self, *words: str) -> str:
        return self.compose("logs", "--no-color", *words).stdout

    def down(self) -> None:
        """`down -v`: containers, networks and volumes."""
        self.compose("down", "-v", "-t", "3")


class Terminal:
    """A command on a pseudo-terminal: type into it, wait for what it shows."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvpe(argv[0], list(argv), dict(env))
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str, *, seconds: float = 60) -> str:
        """Everything up to and with `text`, which is consumed; AssertionError when it does not come."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, f"waited for {text!r}, got {self.shown!r}"
            if not select.select([self._fd], [], [], left)[0]:
                continue
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # EIO: the other side is gone
                data = b""
            assert data, f"ended before {text!r}: {self.shown!r}"
            self.shown += data.decode(errors="replace")
        head, _, self.shown = self.shown.partition(text)
        return head + text

    def close(self) -> int:
        """Wait for the command's end; its exit code."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                while select.select([self._fd], [], [], 0.05)[0] and os.read(self._fd, 65536):
                    continue
            except OSError:
                break
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _merge(base: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        elif isinstance(value, list) and isinstance(base.get(key), list):
            base[key] = [*base[key], *value]
        else:
            base[key] = value
