"""Two joined network namespaces that no packet can leave, named after the process that made them.

A name holds its maker's PID, so that whatever a killed run leaves behind is recognised and removed by the next one.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PREFIX = "initd-lab"
DIRECTORY = Path(tempfile.gettempdir())
NETNS_DIRECTORY = Path("/run/netns")

BOX4, GATEWAY4 = "198.51.100.2", "198.51.100.1"
BOX6, GATEWAY6 = "2001:db8:1::2", "2001:db8:1::1"
# Every address of these is local in `internet` (AnyIP), so that every server answers on each of them.
PUBLIC = ("203.0.113.0/24", "192.0.2.0/24", "2001:db8:2::/48")
# Targets that a box must not reach unless they are listed; they answer here, so that a leak is seen.
SPECIAL = ("169.254.169.254/32", "10.9.9.9/32", "192.168.7.7/32", "100.64.9.9/32", "fd00:9::9/128")

_counter = itertools.count(1)
_NAME = re.compile(rf"{PREFIX}-[a-z]+-(\d+)-\d+")


class Family(Enum):
    """What the box's namespace has."""

    DUAL = "IPv4 and IPv6"
    V4 = "no IPv6 address or route"
    V6 = "IPv6 only"
    SYSCTL = "IPv6 disabled by sysctl"


class LabError(Exception):
    """The lab itself is at fault, not what is tested in it."""


def unique(role: str) -> str:
    """A name no other process or call gets; `role` is lower-case letters."""
    return f"{PREFIX}-{role}-{os.getpid()}-{next(_counter)}"


def run(argv: Sequence[str], *, text: str | None = None) -> str:
    """Standard output of a command that must succeed; raises LabError with its standard error otherwise."""
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def add(name: str) -> None:
    """Make a network namespace with its loopback up."""
    run(["ip", "netns", "add", name])
    configure(name, ["link set lo up"])


def configure(name: str, commands: Iterable[str]) -> None:
    """Run `ip` commands in a namespace, all in one process; raises LabError at the first that fails."""
    run(["ip", "-n", name, "-batch", "-"], text="\n".join(commands) + "\n")


def processes(name: str) -> list[int]:
    """PIDs of all processes in a namespace."""
    return [int(pid) for pid in run(["ip", "netns", "pids", name]).split()]


def remove(name: str) -> None:
    """Remove a namespace and end what still runs in it; one that is not there is fine."""
    if not (NETNS_DIRECTORY / name).exists():
        return
    for pid in processes(name):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run(["ip", "netns", "delete", name])


def remove_stale() -> None:
    """Remove namespaces and directories of earlier runs whose process is gone."""
    for directory in (NETNS_DIRECTORY, DIRECTORY):
        if not directory.is_dir():
            continue
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or Path("/proc", match[1]).exists():
                continue
            if directory == NETNS_DIRECTORY:
                remove(path.name)
            else:
                shutil.rmtree(path, ignore_errors=True)


def join(*, box: str, internet: str, family: Family) -> None:
    """Connect two namespaces by a veth pair, both ends named eth0, and give them addresses and routes."""
    run(["ip", "link", "add", "eth0", "netns", box, "type", "veth", "peer", "name", "eth0", "netns", internet])
    for name in (box, internet):
        if family is Family.SYSCTL and name == box:
            run(["ip", "netns", "exec", box, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"])
        # Duplicate address detection would keep addresses tentative for a second (RFC 4862, 5.4).
        configure(name, ["link set eth0 addrgenmode none", "link set eth0 up"])
    v4, v6 = family is not Family.V6, family in {Family.DUAL, Family.V6}
    ours, theirs = [], []
    if v4:
        ours += [f"addr add {BOX4}/24 dev eth0", f"route add default via {GATEWAY4}"]
        theirs += [f"addr add {GATEWAY4}/24 dev eth0"]
    if v6:
        ours += [
            "addr add fe80::2/64 dev eth0 nodad",
            f"addr add {BOX6}/64 dev eth0 nodad",
            f"-6 route add default via {GATEWAY6}",
        ]
        theirs += ["addr add fe80::1/64 dev eth0 nodad", f"addr add {GATEWAY6}/64 dev eth0 nodad"]
    theirs += [f"{'-6 ' if ':' in net else ''}route add local {net} dev lo" for net in (*PUBLIC, *SPECIAL)]
    configure(internet, [line.removeprefix("-6 ") for line in theirs])
    configure(box, [line.removeprefix("-6 ") for line in ours])


def leftovers() -> list[str]:
    """Namespaces, directories and mounts of this process's labs that still exist."""
    mark = f"-{os.getpid()}-"
    names = [
        path.name
        for directory in (NETNS_DIRECTORY, DIRECTORY)
        if directory.is_dir()
        for path in directory.iterdir()
        if path.name.startswith(PREFIX) and mark in path.name
    ]
    mounts = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if PREFIX in line and mark in line
    ]
    return sorted(set(names + mounts))
