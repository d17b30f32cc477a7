"""A memory limit for chosen processes, where this machine lets root make one (cgroup v2 or v1)."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Self

from tests.support import namespaces

_ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A context manager; processes go back to where they came from at its end, children they made included."""

    def __init__(self, limit: int) -> None:
        self._v2 = (_ROOT / "cgroup.controllers").exists()
        self._parent = _ROOT if self._v2 else _ROOT / "memory"
        self.path = self._parent / namespaces.unique("memory")
        self.path.mkdir()
        try:
            (self.path / ("memory.max" if self._v2 else "memory.limit_in_bytes")).write_text(str(limit))
            with contextlib.suppress(OSError):  # none here; what is swapped does not count
                swap = "memory.swap.max" if self._v2 else "memory.memsw.limit_in_bytes"
                (self.path / swap).write_text("0" if self._v2 else str(limit))
        except OSError:
            self.path.rmdir()
            raise

    def take(self, *pids: int) -> None:
        """Move processes here; their future children are born here."""
        for pid in pids:
            (self.path / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """How often the kernel has killed here."""
        lines = (self.path / ("memory.events" if self._v2 else "memory.oom_control")).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    def close(self) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (self._parent / "cgroup.procs").write_text(pid)
        until = time.monotonic() + 5.0
        while True:  # a process that has just died may still be counted
            try:
                os.rmdir(self.path)
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available() -> str | None:
    """Why no limit can be made here, or None; it is tried."""
    try:
        MemoryCgroup(1 << 30).close()
    except OSError as error:
        return f"no memory cgroup can be made: {error}"
    return None
