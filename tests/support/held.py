"""Mount and PID namespaces for a daemon or a tool: ending one process ends and unmounts everything in them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path


class Held:
    """The namespaces, held by their PID 1, which reaps; they end with `close`, and when this process does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"),
                *("--mount-proc", "sh", "-c", "while :; do sleep 3600 & wait; done"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def enter(self, network: str | None = None) -> list[str]:
        """The command before a command that is to run in there, and in the `ip netns` namespace `network`."""
        pid = self._inner()
        net = [f"--net=/run/netns/{network}"] if network else []
        return ["nsenter", f"--mount=/proc/{pid}/ns/mnt", f"--pid=/proc/{pid}/ns/pid", *net]

    def close(self) -> None:
        """End whatever is left in there."""
        self._process.kill()
        self._process.wait()

    def _inner(self) -> int:
        """PID 1 of the namespaces, as the machine sees it."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                if Path(f"/proc/{child}/comm").read_text() == "sh\n":  # after --mount-proc, not before
                    return int(child)
            time.sleep(0.02)
        raise TimeoutError("the namespaces did not come up")
