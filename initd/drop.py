"""Runs: root, once in each process that gives privilege up. Drop, then attack the drop.

Capabilities are set by capset(2) and prctl(2) through ctypes (3 ms to import); each function ends in exactly the
state that its first line names. Sources: capabilities(7), credentials(7), include/uapi/linux/{capability,prctl}.h.
"""

from __future__ import annotations

import ctypes
import os
import socket
from functools import partial

from initd.errors import EnforcementError, PrivilegeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_NET_ADMIN, CAP_NET_RAW = 5, 6, 7, 8, 12, 13
NAMES = {
    CAP_KILL: "KILL",
    CAP_SETGID: "SETGID",
    CAP_SETUID: "SETUID",
    CAP_SETPCAP: "SETPCAP",
    CAP_NET_ADMIN: "NET_ADMIN",
    CAP_NET_RAW: "NET_RAW",
}
WARDEN = frozenset({CAP_NET_ADMIN, CAP_NET_RAW})
KEEPER = WARDEN | {CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP}

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME = 1, 3, 4, 8, 15
PR_CAPBSET_READ, PR_CAPBSET_DROP, PR_SET_SECUREBITS = 23, 24, 28
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 36, 38, 39
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
SECUREBITS = 0b11_10_10_11
"""Pairs of (lock, bit), securebits.h: NO_CAP_AMBIENT_RAISE on, KEEP_CAPS off, NO_SETUID_FIXUP off, NOROOT on."""
CAPABILITY_V3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, second: int = 0, third: int = 0) -> int:
    """The kernel's prctl, with OSError when the kernel refuses."""
    result: int = _libc.prctl(
        option, ctypes.c_ulong(second), ctypes.c_ulong(third), ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def set_name(name: str) -> None:
    """Make `ps` show what this process is: comm, at most 15 characters."""
    _libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)


def held() -> frozenset[int]:
    """The capabilities in this process's permitted set."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        bits = next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))
    return frozenset(cap for cap in range(64) if bits >> cap & 1)


def need(caps: Iterable[int]) -> None:
    """Raise PrivilegeError (77) that names every capability of `caps` that is not permitted."""
    missing = sorted(NAMES[cap] for cap in set(caps) - held())
    if missing:
        names = ", ".join(missing)
        plural = "capability" if len(missing) == 1 else "capabilities"
        hint = f"cap_add: [{names}] in compose.yaml, or --cap-add"
        if os.geteuid() != 0:
            hint = "start it as root, without `user:` or --user: PID 1 becomes CLAUDE_UID by itself"
        raise PrivilegeError(f"missing {plural} {names}", hint=hint)


def capset(permitted: Iterable[int], *, effective: Iterable[int], inheritable: Iterable[int]) -> None:
    """Set this thread's three sets; OSError when the kernel refuses."""
    sets = [sum(1 << cap for cap in caps) for caps in (effective, permitted, inheritable)]
    header = (ctypes.c_uint32 * 2)(CAPABILITY_V3, 0)
    low = [bits & 0xFFFFFFFF for bits in sets]
    high = [bits >> 32 for bits in sets]
    if _libc.capset(header, (ctypes.c_uint32 * 6)(*low, *high)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def drop_to(uid: int, gid: int, *, own: int | None = None) -> None:
    """End as uid:gid with no group, no capability in any set, securebits locked, no_new_privs, not dumpable.

    `own` becomes the real and the saved UID, `uid` stays the effective one. kill(2) compares the sender's real or
    effective UID with the receiver's real or saved one: such a process may signal those of `uid`, and they may not
    signal it, nor set its limits (prlimit(2): an RLIMIT_CPU of a second is a SIGKILL that even PID 1 gets), and their
    RLIMIT_SIGPENDING and RLIMIT_NPROC are not its own.
    """
    need({CAP_SETUID, CAP_SETGID, CAP_SETPCAP})
    _bound(frozenset())
    prctl(PR_SET_SECUREBITS, SECUREBITS)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    real = uid if own is None else own
    try:
        os.setresuid(real, uid, real)
    except OSError as error:  # EINVAL: a user namespace that lacks one of them
        raise PrivilegeError(
            f"cannot become UID {uid} with the real UID {real}: {error.strerror}",
            hint="the user namespace must map UIDs 0 to 65535, see user_namespaces(7)",
        ) from error
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    capset((), effective=(), inheritable=())
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)  # same-UID sessions must not ptrace us or read /proc/1/environ, proc(5)


become_session = drop_to
"""The same for a command or a probe; execve(2) makes it dumpable again, which is the session's own affair."""


def become_keeper() -> None:
    """Stay root with exactly `KEEPER` in the permitted, effective and bounding set and nothing inheritable."""
    _bound(KEEPER)
    capset(KEEPER, effective=KEEPER, inheritable=())
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def become_warden(uid: int, gid: int) -> None:
    """End as uid:gid with exactly NET_ADMIN and NET_RAW in all five sets and no_new_privs."""
    need(WARDEN | {CAP_SETUID, CAP_SETGID, CAP_SETPCAP})
    _bound(WARDEN)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    capset(WARDEN, effective=WARDEN, inheritable=WARDEN)
    for cap in WARDEN:
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap)
    prctl(PR_SET_KEEPCAPS, 0)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _last_cap() -> int:
    """The kernel's highest capability number: PR_CAPBSET_READ is EINVAL beyond it."""
    for cap in range(64):
        try:
            prctl(PR_CAPBSET_READ, cap)
        except OSError:
            return cap - 1
    return 63


def _bound(keep: frozenset[int]) -> None:
    for cap in range(_last_cap() + 1):
        if cap not in keep and prctl(PR_CAPBSET_READ, cap):
            prctl(PR_CAPBSET_DROP, cap)


class as_owner:  # noqa: N801  # reads as a phrase: with as_owner(folder)
    """Act with the effective UID that owns `path`, so that writing there needs no DAC_OVERRIDE."""

    def __init__(self, path: str) -> None:
        self._uid = os.stat(path).st_uid
        self._switch = os.geteuid() == 0 and self._uid != 0

    def __enter__(self) -> None:
        if self._switch:
            os.seteuid(self._uid)

    def __exit__(self, *_: object) -> None:
        if self._switch:
            os.seteuid(0)


def raise_oom_score() -> None:
    """Make this process and its children a likelier choice than PID 1 and the keeper, which cannot lower theirs.

    100 of 1,000 (proc_pid_oom_score_adj(5)); raising needs no privilege.
    """
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            score = int(file.read())
            file.seek(0)
            file.write(str(min(1000, score + 100)))
    except (OSError, ValueError):
        return


def attack(keeper: int | None = None) -> None:
    """Try to take back each thing that `drop_to` gave up; EnforcementError (70) names whatever succeeded.

    `keeper` is the PID of a process that must be out of reach now.
    """
    attempts: list[tuple[str, Callable[[], object]]] = [
        ("setuid 0", lambda: os.setuid(0)),
        ("setreuid 0", lambda: os.setreuid(0, 0)),
        ("setgid 0", lambda: os.setgid(0)),
        ("setgroups", lambda: os.setgroups([0])),
        ("securebits", lambda: prctl(PR_SET_SECUREBITS, 0)),
        ("keepcaps", lambda: prctl(PR_SET_KEEPCAPS, 1)),
        ("no_new_privs", lambda: _must(prctl(PR_GET_NO_NEW_PRIVS) == 0)),
        ("dumpable", lambda: _must(prctl(PR_GET_DUMPABLE) != 0)),
        ("raw socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
        ("packet socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
        ("net_admin socket option", _force_buffer),
    ]
    for cap in range(_last_cap() + 1):
        attempts += [
            (f"capability {cap}", partial(capset, (cap,), effective=(cap,), inheritable=())),
            (f"inheritable {cap}", partial(capset, (), effective=(), inheritable=(cap,))),
            (f"ambient {cap}", partial(prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap)),
            (f"bounding {cap}", partial(_must_bound, cap)),
        ]
    if keeper is not None:
        attempts += [
            ("signal to the keeper", lambda: os.kill(keeper, 0)),
            ("the keeper's memory", lambda: os.close(os.open(f"/proc/{keeper}/mem", os.O_RDONLY))),
        ]
    regained = [name for name, attempt in attempts if _succeeds(attempt)]
    if regained:
        raise EnforcementError(f"privilege was dropped, yet regained: {', '.join(regained)}")


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _must(regained: bool) -> None:  # noqa: FBT001
    if not regained:
        raise PermissionError


def _must_bound(cap: int) -> None:
    _must(prctl(PR_CAPBSET_READ, cap) == 1)


def _force_buffer() -> None:
    """SO_RCVBUFFORCE needs NET_ADMIN in the network namespace's user namespace, socket(7)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 4096)
