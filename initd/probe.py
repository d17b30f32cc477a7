"""Runs: session user, once for each verification. Tries the network the way a session would; prints what happened.

stdin: the plan as JSON, `{"connect": [[address, port], …], "datagram": [[address, port], …], "ask": [[server, name]],
"reach": [[name, port], …], "timeout": seconds}`. stdout: JSON, one outcome for each, `{"connect": [{"address", "port",
"outcome", "ms"}], …}`. An outcome is "open", "refused", "unreachable" (no route: the family is absent), "timeout",
or for DNS the rcode's name. Stdlib only; judging is `initd.verify`'s business.
"""

from __future__ import annotations

import errno
import json
import select
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

RCODES = {0: "noerror", 1: "formerr", 2: "servfail", 3: "nxdomain", 4: "notimp", 5: "refused"}

REFUSED = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EPERM, errno.EACCES})
"""What REJECT looks like: a reset, admin-prohibited, or the verdict on the local sender itself."""

ABSENT = frozenset({errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""The family has no route or no address here. IPv6 admin-prohibited is EACCES, IPv4's is EHOSTUNREACH."""


def main() -> int:
    """Carry out the plan from stdin; exit 0 whatever the network does, 64 for a plan that is not one."""
    try:
        plan = json.load(sys.stdin)
        timeout = float(plan["timeout"])
        jobs = {key: [tuple(item) for item in plan[key]] for key in ("connect", "datagram", "ask", "reach")}
    except (ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"initd probe: not a plan: {error}\n")
        return 64
    actions = {"connect": _connect, "datagram": _datagram, "ask": _ask, "reach": _reach}
    with ThreadPoolExecutor(max_workers=16) as pool:
        running = {
            key: [pool.submit(_timed, actions[key], item, timeout) for item in items] for key, items in jobs.items()
        }
        outcomes = {key: [future.result() for future in futures] for key, futures in running.items()}
    json.dump(outcomes, sys.stdout)
    return 0


def _timed(action: Any, target: tuple[Any, ...], timeout: float) -> dict[str, Any]:
    start = time.monotonic()
    try:
        outcome = action(*target, timeout)
    except TimeoutError:
        outcome = "timeout"
    except OSError as error:
        outcome = _word(error)
    return {"target": list(target), "outcome": outcome, "ms": round((time.monotonic() - start) * 1000, 2)}


def _word(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"unresolved: {error.strerror}"
    if error.errno in REFUSED:
        return "refused"
    if error.errno in ABSENT:
        return "unreachable"
    return errno.errorcode.get(error.errno or 0, str(error))


def _connect(address: str, port: int, timeout: float) -> str:
    with socket.create_connection((address, port), timeout):
        return "open"


def _datagram(address: str, port: int, timeout: float) -> str:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect((address, port))
        sock.send(_query("probe.invalid"))
        sock.recv(512)
    return "open"


def _ask(server: str, name: str, timeout: float) -> str:
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect((server, 53))
        sock.send(_query(name))
        return RCODES.get(sock.recv(512)[3] & 0x0F, "unknown")


def _reach(name: str, port: int, timeout: float) -> str:
    """Open as soon as one address of `name` accepts; all of them are tried at the same time, as browsers do."""
    deadline = time.monotonic() + timeout
    waiting: dict[socket.socket, None] = {}
    last = "unresolved: no address"
    try:
        for family, kind, proto, _, address in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, proto)
            waiting[sock] = None
            sock.setblocking(False)
            sock.connect_ex(address)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for sock in select.select([], list(waiting), [], left)[1]:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    return "open"
                last = _word(OSError(code, ""))
                del waiting[sock]
                sock.close()
        return "timeout" if waiting else last
    finally:
        for sock in waiting:
            sock.close()


def _query(name: str) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode("ascii") for part in name.split("."))
    return struct.pack(">6H", 0x1D1D, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)
