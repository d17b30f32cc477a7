"""Runs: PID 1 and the keeper, always. Signals in, waits, exit codes.

Signals are read from a signalfd(2): nothing wakes up unless something happened, no handler runs between two lines,
and real-time signals stay queued one by one. (CPython has no signalfd before 3.15.)
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from signal import (
    SIG_BLOCK,
    SIG_DFL,
    SIG_SETMASK,
    SIGCHLD,
    SIGCONT,
    SIGKILL,
    SIGPIPE,
    SIGXFSZ,
    pthread_sigmask,
    signal,
    valid_signals,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_INFO = struct.Struct("=I8xI112x")  # ssi_signo and ssi_pid of struct signalfd_siginfo
_SFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

_libc = ctypes.CDLL(None, use_errno=True)


class SignalQueue:
    """Every signal that can be blocked, as a descriptor to poll. Blocks them all for this process."""

    def __init__(self) -> None:
        pthread_sigmask(SIG_BLOCK, valid_signals())
        signal(SIGCHLD, SIG_DFL)  # an inherited SIG_IGN would have the kernel throw statuses away, wait(2)
        mask = ctypes.create_string_buffer(b"\xff" * 8, 128)
        self._fd: int = _libc.signalfd(-1, mask, _SFD_FLAGS)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def fileno(self) -> int:
        """For poll."""
        return self._fd

    def read(self) -> list[int]:
        """The numbers of what is pending, oldest first, at most 64 at a time.

        What we did to ourselves is nobody's wish: a SIGPIPE because stderr has no reader, a SIGXFSZ because it is a
        file that may not grow. Blocked, they are queued although they are ignored (sig_ignored() in kernel/signal.c).
        """
        try:
            data = os.read(self._fd, 64 * _INFO.size)
        except BlockingIOError:
            return []
        own = os.getpid()
        return [number for number, sender in _INFO.iter_unpack(data) if sender != own]


def restore_signals(mask: Iterable[int]) -> None:
    """For a forked child before execve: what CPython ignores is back to its default, and only `mask` is blocked."""
    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
    pthread_sigmask(SIG_SETMASK, mask)


def tell(pid: int, number: int) -> None:
    """Signal `pid`, and wake it when it is stopped; whoever is gone or out of reach is left alone."""
    try:
        os.kill(pid, number)
        if number != SIGKILL:
            os.kill(pid, SIGCONT)
    except (ProcessLookupError, PermissionError):
        return


def reap() -> Iterator[tuple[int, int]]:
    """Yield (pid, wait status) of every child that ended or stopped, and never block."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def exit_code(status: int) -> int:
    """A wait status as a shell shows it: 0-255, or 128 + n for signal n."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


class Process:
    """A living process: its PID and the two UIDs that decide who may signal it, kill(2)."""

    __slots__ = ("pid", "ruid", "suid")

    def __init__(self, pid: int, ruid: int, suid: int) -> None:
        self.pid, self.ruid, self.suid = pid, ruid, suid


def living(root: int, *, spare: set[int]) -> list[Process]:
    """The processes that end with the box led by `root`; zombies, `root` and `spare` with all below it left out.

    All of the PID namespace for root 1, which includes exec sessions: their parent is outside. Otherwise only the
    descendants of `root`: under another init the rest is not ours.
    """
    parents: dict[int, int] = {}
    found: list[Process] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/status", encoding="utf-8", errors="replace") as file:
                fields = dict(line.split(":", 1) for line in file if line.startswith(("State:", "PPid:", "Uid:")))
        except OSError:  # gone meanwhile
            continue
        pid, uids = int(entry), fields["Uid"].split()
        parents[pid] = int(fields["PPid"])
        if fields["State"].split()[0] not in "ZX":
            found.append(Process(pid, int(uids[0]), int(uids[2])))
    return [process for process in found if _belongs(process.pid, parents, root=root, spare=spare)]


def _belongs(pid: int, parents: dict[int, int], *, root: int, spare: set[int]) -> bool:
    if pid == root:
        return False
    while pid not in (0, root):
        if pid in spare:
            return False
        pid = parents.get(pid, 0)
    return root in (pid, 1)


def wait_for_end(pids: list[int], extra: list[int], timeout: float) -> bool:
    """Wait up to `timeout` seconds until all of `pids` have ended (True), or a descriptor of `extra` is readable.

    A pidfd is readable once its process is a zombie, pidfd_open(2); none needs permission over the process.
    """
    deadline = time.monotonic() + timeout
    poll, open_fds = select.poll(), set()
    try:
        for pid in pids[:256]:
            try:
                fd = os.pidfd_open(pid)
            except OSError:
                continue
            open_fds.add(fd)
            poll.register(fd, select.POLLIN)
        waiting = set(open_fds)
        for fd in extra:
            poll.register(fd, select.POLLIN)
        while waiting:
            left = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(max(0.0, left) * 1000)}
            if ready.intersection(extra) or not ready:
                return False
            for fd in ready:
                poll.unregister(fd)
            waiting -= ready
        return True
    finally:
        for fd in open_fds:
            os.close(fd)


def forget_startup() -> None:
    """Give back the pages of code that only the start needed: some 3 MB of resident memory.

    Executable mappings are never written to, so MADV_DONTNEED, madvise(2), loses nothing: what is needed again comes
    back from the page cache.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, mode, *_, path = line.split(maxsplit=5)
            if mode == "r-xp" and path.startswith("/"):
                start, end = (int(part, 16) for part in span.split("-"))
                _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)
