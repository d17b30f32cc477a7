"""A private Docker engine that leaves nothing behind, and the base image that no registry has to serve.

Runs: as root, for one test session.

The daemon lives in mount and PID namespaces of its own, so that ending one process ends it, its containers and its
mounts, also when the test run is killed. It is started twice over the same data root: once in the machine's network
(`bridge=none`, no iptables: the machine's own rules are not touched) to build images with whatever access to package
registries the machine has, and then in a network namespace that has no way out but the one the caller attaches.

What is expensive to make (plugins, base image, build cache) stays in `CACHE`; delete that folder to start anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.support.held import Held

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CACHE = Path(os.environ.get("INITD_E2E_CACHE", "/var/cache/initd-e2e"))
SUITE = "trixie"
BASE = f"debian:{SUITE}-slim"
PLUGINS = ("docker-compose", "docker-buildx")
NEEDS = ("docker.io", "debootstrap", "iproute2", "iptables", "util-linux")
CGROUPS = "initd-e2e"
SLIM = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var/cache/apt", "var/lib/apt/lists")


class EngineError(Exception):
    """The engine did not do what the harness needs; the message ends with the last lines of its log."""


def run(*argv: str | Path, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
    """Run a command with its output captured as text; a failure carries that output."""
    options = {"capture_output": True, "text": True, "timeout": 1800, **more}
    done = subprocess.run([str(word) for word in argv], check=False, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        tail = f"{done.stdout or ''}{done.stderr or ''}"[-4000:]
        raise EngineError(f"{' '.join(map(str, argv))}: exit {done.returncode}\n{tail}")
    return done


def missing() -> str | None:
    """What this machine lacks for an engine, in words, or None."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in ("dockerd", "debootstrap", "ip", "iptables", "nsenter") if shutil.which(tool) is None]
    return f"not installed: {' '.join(absent)} (Debian packages: {' '.join(NEEDS)})" if absent else None


def mirror() -> str:
    """The Debian mirror that this machine is configured for."""
    listed = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").stdout.split()
    for uri in listed:
        if "security" not in uri:
            return uri
    raise EngineError("no Debian mirror in this machine's apt sources")


def apt_settings() -> str:
    """The machine's own apt settings about transports and dates: without them its mirror may be out of reach."""
    wanted = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries")
    return "".join(f"{line}\n" for line in run("apt-config", "dump").stdout.splitlines() if line.startswith(wanted))


def fetch_plugins(target: Path) -> None:
    """Unpack compose and buildx from Debian's archive; the machine's own sources and lists stay as they are."""
    if all((target / name).exists() for name in PLUGINS):
        return
    with tempfile.TemporaryDirectory(prefix="initd-apt-") as name:
        root = Path(name)
        for folder in ("lists/partial", "archives/partial"):
            (root / folder).mkdir(parents=True)
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (root / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror()} {SUITE} main\n")
        options = [
            f"-oDir::Etc::SourceList={root}/sources.list",
            "-oDir::Etc::SourceParts=-",
            f"-oDir::State::Lists={root}/lists",
            "-oDir::State::Status=/dev/null",
            f"-oDir::Cache::Archives={root}/archives",
            "-oAPT::Sandbox::User=root",
        ]
        run("apt-get", "update", "-qq", *options)
        run("apt-get", "download", "-qq", *options, *PLUGINS, cwd=root)
        for package in root.glob("*.deb"):
            run("dpkg-deb", "-x", package, root / "unpacked")
        target.mkdir(parents=True, exist_ok=True)
        for plugin in PLUGINS:
            shutil.move(root / "unpacked/usr/libexec/docker/cli-plugins" / plugin, target / plugin)


def make_base(tarball: Path) -> None:
    """What the registry's slim image holds: a minimal system without documents, man pages and translations."""
    if tarball.exists():
        return
    tarball.parent.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="initd-base-", dir=tarball.parent))
    root.chmod(0o755)  # it becomes the image's /
    try:
        run("debootstrap", "--variant=minbase", SUITE, root, mirror())
        for folder in SLIM:
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        (root / "var/lib/apt/lists/partial").mkdir()
        (root / "var/cache/apt/archives/partial").mkdir(parents=True)
        excluded = "".join(f"path-exclude /{folder}/*\n" for folder in SLIM if folder.startswith("usr/"))
        (root / "etc/dpkg/dpkg.cfg.d/docker").write_text(excluded)
        (root / "etc/apt/apt.conf.d/90machine").write_text(apt_settings())
        (root / "etc/resolv.conf").unlink(missing_ok=True)
        run("tar", "--numeric-owner", "-C", root, "-cf", tarball.with_suffix(".part"), ".")
        tarball.with_suffix(".part").rename(tarball)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@dataclass
class Engine:
    """One engine; `with Engine() as engine:` ends everything it started. `network` is an `ip netns` name."""

    folder: Path = CACHE
    running: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="initd-engine-", dir="/run")))
    held: Held | None = None
    daemon: subprocess.Popen[bytes] | None = None
    network: str | None = None
    flags: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # one data root, one daemon: a second session waits
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(EngineError, OSError, subprocess.SubprocessError):
            self.sweep()
        self.stop()
        remove_cgroups()
        shutil.rmtree(self.running, ignore_errors=True)
        self._lock.close()

    @property
    def socket(self) -> str:
        """Where clients reach the daemon."""
        return f"unix://{self.running}/docker.sock"

    def environ(self) -> dict[str, str]:
        """The environment in which `docker` and `docker compose` talk to this engine and to nothing else."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "COMPOSE_"))}
        return kept | {
            "DOCKER_HOST": self.socket,
            "DOCKER_CONFIG": str(self.folder / "client"),
            "DOCKER_BUILDKIT": "1",
            "BUILDKIT_PROGRESS": "plain",
            "COMPOSE_ANSI": "never",
        }

    def start(self, *flags: str, network: str | None = None) -> None:
        """Start the daemon, inside network namespace `network` or, without one, in the machine's, and wait for it."""
        self.network, self.flags = network, flags
        self.held = self.held or Held()
        self._launch()

    def restart(self, *, kill: bool = False) -> None:
        """Restart the daemon alone, gracefully or not: with live restore its containers go on meanwhile."""
        self._end_daemon(signal.SIGKILL if kill else signal.SIGTERM)
        self._launch()

    def stop(self) -> None:
        """End the daemon and, with its namespaces, whatever is left of it."""
        self._end_daemon(signal.SIGTERM)
        if self.held is not None:
            self.held.close()
            self.held = None

    def docker(self, *argv: str | Path, check: bool = True, **more: object) -> subprocess.CompletedProcess[str]:
        """Run the docker client against this engine."""
        return run(client(), *argv, check=check, **{"env": self.environ(), **more})

    def prepare(self) -> None:
        """Have the client's plugins and the base image."""
        fetch_plugins(self.folder / "client" / "cli-plugins")
        if self.docker("image", "inspect", BASE, check=False).returncode:
            make_base(self.folder / "base.tar")
            self.docker("import", "--change", 'CMD ["bash"]', self.folder / "base.tar", BASE)

    def sweep(self) -> None:
        """Remove every container, volume and network: those of a session that died are in the data root too."""
        if self.daemon is None or self.daemon.poll() is not None:
            return
        if containers := self.docker("ps", "-aq").stdout.split():
            self.docker("rm", "-f", "-v", *containers)
        self.docker("network", "prune", "-f")
        self.docker("image", "prune", "-f")  # what the builds before this one left; the build cache stays
        if volumes := self.docker("volume", "ls", "-q").stdout.split():
            self.docker("volume", "rm", "-f", *volumes)

    def log(self, lines: int = 15) -> str:
        """The last lines of the daemon's own log."""
        with contextlib.suppress(OSError):
            return "\n".join((self.running / "dockerd.log").read_text().splitlines()[-lines:])
        return ""

    def _launch(self) -> None:
        if self.held is None:
            raise EngineError("not started")
        if self.network is None:
            reach = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"]
        else:
            reach = []
        command = [
            *(
                "setpriv",
                "--pdeathsig",
                "KILL",
                *self.held.enter(self.network),
                "dockerd",
                "--host",
                self.socket,
                *reach,
                *self.flags,
            ),
            *("--data-root", str(self.folder / "data"), "--exec-root", str(self.running / "exec")),
            *("--pidfile", str(self.running / "docker.pid"), "--cgroup-parent", f"/{CGROUPS}"),
        ]
        (self.running / "docker.pid").unlink(missing_ok=True)
        with (self.running / "dockerd.log").open("ab") as log:
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 180
        while self.docker("version", check=False).returncode:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"dockerd did not start\n{self.log()}")
            time.sleep(0.1)

    def _end_daemon(self, how: signal.Signals) -> None:
        """Signal dockerd itself: the process started here is nsenter, which only waits for it."""
        if self.daemon is None:
            return
        if self.daemon.poll() is None:
            children = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children")
            for child in children.read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), how)
            try:
                self.daemon.wait(30)
            except subprocess.TimeoutExpired:
                self.daemon.kill()
                self.daemon.wait()
        self.daemon = None


def client() -> str:
    """Debian's docker client, whatever else is first in PATH."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def remove_cgroups(name: str = CGROUPS) -> None:
    """Remove the empty cgroups that a killed engine leaves."""
    for top in (*Path("/sys/fs/cgroup").glob(name), *Path("/sys/fs/cgroup").glob(f"*/{name}")):
        for folder in sorted((top, *(path for path in top.rglob("*") if path.is_dir())), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


def copy_context(source: Path, target: Path) -> None:
    """The build context: every file that git knows or would add, and this machine's extra CA certificates."""
    names = run("git", "-C", source, "ls-files", "-coz", "--exclude-standard").stdout.split("\0")
    for name in filter(None, names):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name, follow_symlinks=False)
    for number, certificate in enumerate(machine_certificates()):
        (target / f"image/ca-certificates/machine-{number}.crt").write_text(certificate)


def machine_certificates() -> Iterable[str]:
    """The CA certificates that this machine's owner added to the system's."""
    for path in sorted(Path("/usr/local/share/ca-certificates").rglob("*.crt")):
        yield path.read_text()


def registry_settings() -> Mapping[str, str]:
    """Files with this machine's pip and npm settings, as the compose file's variables name them."""
    found = {}
    for variable, places in {
        "PIP_CONFIG_FILE": ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf"),
        "NPM_CONFIG_USERCONFIG": ("~/.npmrc",),
    }.items():
        paths = [Path(os.environ.get(variable) or place).expanduser() for place in places]
        existing = [str(path) for path in paths if path.is_file()]
        if existing:
            found[variable] = existing[-1]
    return found


def proxies() -> Mapping[str, str]:
    """The proxy variables of this machine, in capitals as build arguments."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    return {name: value for name in names if (value := os.environ.get(name) or os.environ.get(name.lower()))}


def image_size(engine: Engine, name: str) -> int:
    """Bytes of an image as the engine counts them, unpacked."""
    return int(json.loads(engine.docker("image", "inspect", name).stdout)[0]["Size"])
