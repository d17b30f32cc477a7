"""Podman over a private internet, as root and rootless, with a store of its own; nothing of it outlives `close`.

The rootless user, its subordinate IDs and a /dev/net/tun that it may open exist only in the mount namespace in which
Podman runs. containers.conf(5) says what this machine needs (no systemd, a limit of open files), so that the commands
are those that people type.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.engine import EngineError, remove_cgroups
from tests.support.held import Held

if TYPE_CHECKING:
    from tests.support.lab import Lab

NEEDS = ("podman", "netavark", "runc", "slirp4netns", "newuidmap")
USER = 1777
PASSWD = f"developer:x:{USER}:{USER}::/:/bin/sh"
CONF = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=1000:1000"]
dns_servers = ["{resolver}"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/tmp"
[network]
network_config_dir = "{folder}/networks"
"""
STORAGE = """
[storage]
driver = "overlay"
graphroot = "{folder}/store"
runroot = "{folder}/run"
rootless_storage_path = "{folder}/store"
"""
SETUP = f"""
set -e
mount --make-rshared /
cd "$1"
for file in passwd group subuid subgid; do
    cp /etc/$file . 2>/dev/null || touch $file
done
echo '{PASSWD}' >> passwd
echo 'developer:x:{USER}:' >> group
echo 'developer:1000000:65536' | tee subuid > subgid
for file in passwd group subuid subgid; do
    [ -e /etc/$file ] || touch /etc/$file
    mount --bind $file /etc/$file
done
mknod tun c 10 200
chmod 666 tun
mount --bind tun /dev/net/tun
"""


def missing() -> str | None:
    """What this machine lacks, in words, or None."""
    absent = [tool for tool in NEEDS if shutil.which(tool, path="/usr/bin:/usr/sbin:/bin:/usr/lib/podman") is None]
    return f"not installed: {' '.join(absent)}" if absent else None


class Podman:
    """Podman of one user (root, or a developer with UID `USER`) whose packets all go to `lab`."""

    def __init__(self, lab: Lab, *, rootless: bool, resolver: str) -> None:
        self.uid = USER if rootless else 0
        self.folder = Path(tempfile.mkdtemp(prefix="initd-podman-", dir="/var/tmp"))
        for name, text in (("containers.conf", CONF), ("storage.conf", STORAGE)):
            (self.folder / name).write_text(text.format(folder=self.folder, resolver=resolver))
        self.project = self.folder / "project"
        self.project.mkdir(mode=0o755)
        (self.folder / "xdg").mkdir(mode=0o700)
        subprocess.run(["chown", "-R", f"{self.uid}:{self.uid}", self.folder], check=True)
        self.folder.chmod(0o755)
        self._network = lab.netns
        self._held = Held()
        self._run([*self._held.enter(), "sh", "-c", SETUP, "sh", str(self.folder)])

    def close(self) -> None:
        """End and remove everything."""
        self._held.close()
        remove_cgroups("libpod_parent")
        remove_cgroups("user.slice")
        shutil.rmtree(self.folder, ignore_errors=True)

    def shell(self, text: str, *, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a line as this user types it, in the folder of the project; the caller looks at the exit code."""
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"] if self.uid else []
        environ = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.folder),
            "XDG_RUNTIME_DIR": str(self.folder / "xdg"),
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
            "PWD": str(self.project),
        }
        return subprocess.run(
            [*self._held.enter(self._network), *become, "sh", "-c", f"cd {self.project}\n{text}"],
            env=environ, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def exec(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`podman exec claude WORDS`."""
        return self.shell(shlex.join(["podman", "exec", "claude", *words]))

    def load(self, archive: Path, *, tag: str) -> None:
        """Have the image in `archive` under the name `tag`."""
        done = self.shell(f"podman load -q -i {archive} | sed 's/.*: //' | xargs -I{{}} podman tag {{}} {tag}")
        if self.shell(f"podman image exists {tag}").returncode:
            raise EngineError(f"podman load: {done.stdout}{done.stderr}")

    @staticmethod
    def _run(argv: list[str]) -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"{argv[-1]}: {done.stderr}")
