"""Runs: in PID 1 and in its forked children. Starts what PID 1 starts, and looks after the terminal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import termios

from initd import drop, reap
from initd.journal import put, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

NOT_EXECUTABLE, NOT_FOUND = 126, 127
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def become_keeper(argv: list[str], channel: int, environ: dict[str, str]) -> NoReturn:
    """In a forked child: a session of its own (no Ctrl-C), no stdin, stdout joined to stderr, then execve."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        os.dup2(channel, 3)
        os.set_inheritable(3, True)  # dup2 onto itself leaves close-on-exec set
        os.closerange(4, 1 << 20)
        os.execve(argv[0], argv, {**os.environ, **environ, "INITD_PARENT_FD": "3"})  # noqa: S606
    except BaseException as error:  # noqa: BLE001  # a forked child must never return into its parent's code
        put(f"initd: the keeper cannot be started: {error}\n")
    os._exit(71)


def become(argv: list[str], *, mask: Iterable[int], home: dict[str, str]) -> NoReturn:
    """In a forked child: `argv` as the caller of initd would have started it, in a process group of its own."""
    try:
        environ = {**os.environ, **home}
        if environ.get("LISTEN_PID") == str(os.getppid()):  # sd_listen_fds(3) compares it with getpid()
            environ["LISTEN_PID"] = str(os.getpid())
        os.setresuid(os.geteuid(), -1, os.geteuid())  # PID 1's real and saved UID are its own affair
        _go_first()
        _take_terminal()
        reap.restore_signals(mask)
        code = _exec(argv, environ)
    except BaseException as error:  # noqa: BLE001  # a forked child must never return into its parent's code
        code = _complain(argv[0], str(error), NOT_EXECUTABLE)
    os._exit(code)


def _go_first() -> None:
    """Be a likelier choice than PID 1 when memory runs out.

    PID 1 is not dumpable, so /proc/self belongs to root here, too, proc(5). What execve would close goes first: a
    dumpable copy of PID 1 may be ptraced by any session of its user, and must hold nothing that such a session has not.
    """
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if int(name) > 2 and not os.get_inheritable(int(name)):
                os.close(int(name))
    drop.prctl(drop.PR_SET_DUMPABLE, 1)
    drop.raise_oom_score()


def _exec(argv: list[str], environ: dict[str, str]) -> int:
    """execvpe(3) with the shell's exit codes: 127 not found, 126 found but not executable."""
    name, refused = argv[0], 0
    folders = [""] if "/" in name else environ.get("PATH", DEFAULT_PATH).split(":")
    for folder in folders if name else []:
        path = os.path.join(folder, name)
        try:
            os.execve(path, argv, environ)  # noqa: S606
        except OSError as error:
            if error.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["/bin/sh", path, *argv[1:]], environ)  # noqa: S606  # as a shell does, POSIX 2.9.1.4
            if not os.path.lexists(path):  # nor in a folder that we may not enter
                continue
            if error.errno == errno.ENOENT:
                return _complain(name, "its interpreter does not exist", NOT_FOUND)
            refused = refused or error.errno or 0
    if refused:
        return _complain(name, os.strerror(refused), NOT_EXECUTABLE)
    return _complain(name, "command not found", NOT_FOUND)


def _complain(name: str, reason: str, code: int) -> int:
    with contextlib.suppress(OSError):  # a full pipe that does not block
        os.write(2, f"initd: {name}: {reason}\n".encode(errors="replace"))
    return code


def _take_terminal() -> None:
    """Lead a process group, in the foreground of stdin's terminal if we were in its foreground.

    A terminal that controls no session yet (TIOCSCTTY, tty_ioctl(4)) becomes ours in a session of our own. SIGTTOU is
    blocked here: unblocked, a background group that calls tcsetpgrp would stop, tcsetpgrp(3).
    """
    if not os.isatty(0):
        os.setpgid(0, 0)
        return
    try:
        foreground = os.tcgetpgrp(0) == os.getpgrp()  # both 0 for a group outside our PID namespace
    except OSError:  # ENOTTY: not our controlling terminal
        os.setsid()
        with contextlib.suppress(OSError):  # another session's: no job control then
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        return
    os.setpgid(0, 0)
    if foreground:
        os.tcsetpgrp(0, os.getpgrp())


def take_terminal_back() -> None:
    """After the command: the foreground is ours again, so that a Ctrl-C reaches us and not a dead group."""
    with contextlib.suppress(OSError):
        os.tcsetpgrp(0, os.getpgrp())


def resume(pid: int, status: int) -> None:
    """Continue a command that a terminal's stop signal froze: PID 1 has no prompt at which to type `fg`.

    SIGSTOP is somebody's explicit wish (a debugger) and stays.
    """
    number = os.WSTOPSIG(status)
    if number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        say("info", "command.resumed", pid=pid, signal=signal.Signals(number).name)
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGCONT)


def forward(pid: int, number: int, *, group: bool) -> None:
    """Pass one signal on, to the command or to its whole process group."""
    with contextlib.suppress(OSError):
        (os.killpg if group else os.kill)(pid, number)


def close_inherited(keep: set[int]) -> None:
    """Close every descriptor from 3 up but `keep`; stdin and stdout go to /dev/null, a terminal's stdin stays.

    Whoever reads the command's output sees its end when the command's side closes, not when ours does.
    """
    last = 2
    for fd in sorted(fd for fd in keep if fd > 2):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, 1 << 20)
    null = os.open(os.devnull, os.O_RDWR)
    if not os.isatty(0):
        os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
