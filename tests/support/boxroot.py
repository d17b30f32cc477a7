"""Builds a container's root file system around itself, drops to a container's capabilities and becomes PID 1.

Runs: root, in the box's network namespace, as `python3 -I -S boxroot.py SPEC.json`; the child becomes PID 1 of fresh
pid, mount, ipc and uts namespaces and execs what the specification says, the parent ends as PID 1 ends. (unshare(1)
cannot pass on that its child was killed.) Standard library only. The host's file system is not written to: the new
root is a tmpfs, and what comes from the host is bound into it read-only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID = 0x20000, 0x4000000, 0x8000000, 0x20000000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "opt")

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None)
    check(libc.mount(*arguments), f"mount {source} on {target}")


def bind(source: str, target: str, *, writable: bool = False) -> None:
    """Show a file or directory at another place, whose missing parents are made."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "ab"):
            pass
    mount(source, target, flags=MS_BIND | MS_REC)
    if not writable:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def system(root: str) -> None:
    """Programs and libraries of the host; /etc as links, so that single files of it can be replaced."""
    for name in SYSTEM:
        path = f"/{name}"
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path):
            bind(path, root + path)
    bind("/etc", f"{root}/.host/etc")
    os.mkdir(f"{root}/etc", 0o755)
    for name in os.listdir("/etc"):
        os.symlink(f"/.host/etc/{name}", f"{root}/etc/{name}")


def kernel(root: str) -> None:
    """/proc of the new PID namespace with a read-only /proc/sys, /sys of the network namespace, a small /dev."""
    for name in ("proc", "sys", "dev"):
        os.mkdir(f"{root}/{name}", 0o755)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV)
    bind(f"{root}/proc/sys", f"{root}/proc/sys")
    mount("sysfs", f"{root}/sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV)
    for name in DEVICES:
        bind(f"/dev/{name}", f"{root}/dev/{name}", writable=True)
    os.mkdir(f"{root}/dev/pts", 0o755)
    mount("devpts", f"{root}/dev/pts", "devpts", MS_NOSUID, "newinstance,ptmxmode=0666,mode=0620")
    os.symlink("pts/ptmx", f"{root}/dev/ptmx")
    os.symlink("/proc/self/fd", f"{root}/dev/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{root}/dev/{name}")


def build(spec: dict[str, Any]) -> None:
    root = spec["root"]
    mount("tmpfs", root, "tmpfs", 0, "mode=0755")
    for name in ("run", "var", "var/lib", "var/log", "root", "home"):
        os.mkdir(f"{root}/{name}", 0o755)
    for name in ("tmp", "var/tmp"):
        os.mkdir(f"{root}/{name}")
        os.chmod(f"{root}/{name}", 0o1777)
    system(root)
    kernel(root)
    for source, target, writable in spec["binds"]:
        if os.path.islink(root + target):
            os.unlink(root + target)
        bind(source, root + target, writable=writable)
    os.chdir(root)
    # pivot_root(".", "."): the old root is stacked below the new one and detached (pivot_root(2), notes).
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def restrict(spec: dict[str, Any]) -> None:
    """A container's capabilities: exec by root then gives exactly the bounding set (capabilities(7))."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for number in set(range(last + 1)) - set(spec["capabilities"]):
        check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0), "prctl")
    if spec["no_new_privs"]:
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def isolate(spec: dict[str, Any]) -> None:
    """Return as PID 1 of new namespaces; the process that called waits for its end and ends the same way."""
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID), "unshare")
    mount("none", "/", flags=MS_PRIVATE | MS_REC)
    child = os.fork()
    if child == 0:
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        return
    os.close(spec["report_fd"])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    isolate(spec)
    os.umask(0o022)
    outer_pid = os.readlink("/proc/self")  # the host's /proc still: our PID as the host sees it
    build(spec)
    socket.sethostname("box")
    restrict(spec)
    os.chdir(spec["cwd"])
    # CPython ignores SIGPIPE and SIGXFSZ, and ignored signals stay ignored through exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    report = spec["report_fd"]
    os.set_inheritable(report, False)
    os.write(report, f"{outer_pid} {time.monotonic()!r}".encode())
    os.execve(spec["argv"][0], spec["argv"], spec["env"])


main()
