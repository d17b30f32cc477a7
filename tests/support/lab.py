"""A private internet and a place for a box in it, made in a fraction of a second and gone without a trace.

with Lab() as lab:
    lab.dns.set("a.example", {"A": "203.0.113.7"}, ttl=5)
    box = lab.box(policy="a.example\n")
    box.start()
    assert not lab.packets(to="203.0.113.99")
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.support import authority, namespaces, remote
from tests.support.box import Box
from tests.support.internet import SOCKET
from tests.support.namespaces import Family, LabError
from tests.support.remote import Dns, Remote, Web

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from tests.support.dns_server import Logged
    from tests.support.packets import Packet

ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT = 20.0  # seconds; it takes 0.3 s on an idle machine


@functools.cache
def _authority() -> tuple[Path, Path]:
    """One authority a process: making it again for each lab would say nothing new."""
    directory = Path(tempfile.gettempdir(), namespaces.unique("ca"))
    directory.mkdir(mode=0o755)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return authority.make(directory)


class Lab:
    """Namespaces, servers and packet log; a context manager. `boxes` are stopped before the network goes.

    Servers and boxes are killed when the thread that made them ends (PR_SET_PDEATHSIG, prctl(2)).
    """

    def __init__(self, family: Family = Family.DUAL) -> None:
        self.family = family
        self.boxes: list[Box] = []
        self._undo: list[Callable[[], object]] = []
        namespaces.remove_stale()
        atexit.register(self.close)
        self._undo.append(functools.partial(atexit.unregister, self.close))
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self.directory = Path(tempfile.gettempdir(), namespaces.unique("dir"))
        self.directory.mkdir(mode=0o755)
        self._undo.append(functools.partial(shutil.rmtree, self.directory))
        for pem in _authority():
            shutil.copy2(pem, self.directory)
        self.ca_file = self.directory / "ca.pem"
        self.netns, self.internet = namespaces.unique("box"), namespaces.unique("internet")
        for name in (self.netns, self.internet):
            self._undo.append(functools.partial(namespaces.remove, name))
            namespaces.add(name)
        namespaces.join(box=self.netns, internet=self.internet, family=self.family)
        self._serve()
        self.remote = Remote(self.directory / SOCKET)
        self._undo.append(self.remote.close)
        self.dns, self.web = Dns(self.remote), Web(self.remote)
        self.reset()

    def _serve(self) -> None:
        self.internet_log = self.directory / "internet.log"
        argv = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.internet]
        argv += [sys.executable, "-m", "tests.support.internet", str(self.directory)]
        with self.internet_log.open("wb") as log:
            self._server = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, bufsize=0)
        self._undo.append(self._end_server)
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b"ready\n":
            raise LabError(f"the lab's internet did not start:\n{self.internet_log.read_text()}")

    def _end_server(self) -> None:
        self._server.kill()
        self._server.wait()
        if self._server.stdout is not None:
            self._server.stdout.close()

    def box(self, **options: Any) -> Box:
        """A box in this lab, not started yet; the options are those of Box."""
        box = Box(self.netns, self.directory, family=self.family, **options)
        self.boxes.append(box)
        return box

    def packets(
        self,
        *,
        to: str | Iterable[str] | None = None,
        port: int | None = None,
        proto: str | None = None,
        ignore: Iterable[str] = (),
    ) -> list[Packet]:
        """What left the box since the last `clear`, by destination, destination port and protocol.

        `ignore` are destinations that do not count. Raises LabError if a packet was lost to the log.
        """
        wanted = None if to is None else {to} if isinstance(to, str) else set(to)
        unwanted = set(ignore)
        return [
            packet
            for packet in remote.packets(self.remote)
            if (wanted is None or packet.dst in wanted)
            and packet.dst not in unwanted
            and port in {None, packet.dport}
            and proto in {None, packet.proto}
        ]

    def take(self) -> tuple[list[Packet], list[Logged]]:
        """Packets that left the box and questions that arrived since the last `take` or `clear`, each told once."""
        return remote.take(self.remote)

    def clear(self) -> None:
        """Forget packets, queries and requests; the zone stays."""
        self.remote.ask("clear")

    def reset(self) -> None:
        """Servers and logs as in a new lab; boxes are stopped."""
        self.close_boxes()
        self.dns.reset()
        self.web.reset()
        self.clear()

    def exec(self, argv: list[str], *, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command as root in the box's network namespace, box or no box."""
        whole = ["ip", "netns", "exec", self.netns, *argv]
        return subprocess.run(whole, capture_output=True, text=True, timeout=timeout, check=False)

    def close_boxes(self) -> None:
        while self.boxes:
            self.boxes.pop().close()

    def close(self) -> None:
        """Remove everything, however far the lab got; raises LabError if a process outlived its box."""
        survivors: list[int] = []
        try:
            self.close_boxes()
            survivors = self._survivors()
        finally:
            while self._undo:
                self._undo.pop()()
        if survivors:
            raise LabError(f"processes outlived their box and were killed: {survivors}")

    def _survivors(self) -> list[int]:
        """PIDs that are still in the box's namespace when they had ten seconds to go."""
        netns = getattr(self, "netns", None)
        if netns is None or not (namespaces.NETNS_DIRECTORY / netns).exists():
            return []
        until = time.monotonic() + 10.0
        while (left := namespaces.processes(netns)) and time.monotonic() < until:
            time.sleep(0.01)
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def can_run() -> str | None:
    """Why a lab cannot run here, or None; it is tried, not guessed."""
    if os.geteuid() != 0:
        return "needs root"
    try:
        name = namespaces.unique("probe")
        namespaces.add(name)
        namespaces.remove(name)
    except (LabError, OSError) as error:
        return f"cannot make a network namespace: {error}"
    return None
