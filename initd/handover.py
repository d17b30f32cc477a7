"""Runs: warden, once. What the keeper hands over: open descriptors, the generation, and the channel back to it."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from initd.errors import PrivilegeError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Handover:
    """`sockets` by name (docs/architecture.md); `resolv` is the descriptor of /etc/resolv.conf, or None.

    `init` is the PID of the box's init, `pulse` that of `beat`, `ended` the latest predecessors' ends: monotonic
    seconds and exit code, oldest first.
    """

    generation: int
    init: int
    sockets: Mapping[str, socket.socket]
    resolv: int | None
    pulse: int
    keeper: socket.socket
    ended: tuple[tuple[float, int], ...] = ()

    @property
    def resuming(self) -> bool:
        """A warden was here before: rules are in force, and sessions may be using them."""
        return self.generation > 1


def take_over(environ: Mapping[str, str]) -> Handover:
    """Read the variables that the keeper sets; they are removed from `os.environ` by whoever starts a process."""
    try:
        descriptors = {
            name: int(number) for name, number in (pair.split("=") for pair in environ["INITD_FDS"].split(",") if pair)
        }
        keeper = socket.socket(fileno=int(environ["INITD_KEEPER_FD"]))
        generation, init = int(environ["INITD_GENERATION"]), int(environ["INITD_INIT"])
        ends = (pair.split(":") for pair in environ.get("INITD_ENDED", "").split(",") if pair)
        ended = tuple((float(at), int(code)) for at, code in ends)
        resolv, pulse = descriptors.pop("resolv", None), descriptors.pop("pulse")
        sockets = {name: socket.socket(fileno=number) for name, number in descriptors.items()}
    except (KeyError, ValueError, OSError) as error:
        raise PrivilegeError(
            f"the warden is started by the keeper only ({error!r})", hint="run `initd`, see `initd --help`"
        ) from error
    for descriptor in (keeper.fileno(), pulse, resolv, *(one.fileno() for one in sockets.values())):
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
    keeper.setblocking(False)
    return Handover(generation, init, sockets, resolv, pulse, keeper, ended)


def beat(pulse: int) -> None:
    """Show that we are alive. The keeper looks when it has heard nothing for a while, so that nobody has to wake up."""
    os.pwrite(pulse, struct.pack("d", time.monotonic()), 0)


def tell(keeper: socket.socket, event: str, **fields: Any) -> None:
    """Send one message to the keeper; a full or closed channel loses it, the heartbeat shows that soon enough."""
    try:
        keeper.send(json.dumps({"event": event, **fields}).encode())
    except (BlockingIOError, ConnectionError):
        return
