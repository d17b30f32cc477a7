"""What a program in a box sees of the network, measured where it happens.

Runs: anybody, in a box, as `python -I client.py COMMAND ARGUMENT…`; standard library only, answers on stdout.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from typing import Any

TIMEOUT = 3.0  # seconds; nobody waits that long for a refusal
BEAT = 0.02  # seconds between two bytes of `talk`
ECHO = {socket.AF_INET: b"\x08" + bytes(7), socket.AF_INET6: b"\x80" + bytes(7)}  # echo request; the kernel fills it in


def name_of(error: OSError) -> str:
    """ECONNREFUSED, EAI_NONAME and the like."""
    if isinstance(error, socket.gaierror):
        return next(
            (name for name in dir(socket) if name.startswith("EAI_") and getattr(socket, name) == error.errno), "EAI"
        )
    if isinstance(error, TimeoutError):
        return "TIMEOUT"
    return errno.errorcode.get(error.errno or 0, str(error))


def attempt(proto: str, host: str, port: int) -> dict[str, Any]:
    """One try: `error` is None when somebody answered, `ms` lasts from the first call to the answer or the refusal."""
    begin = time.monotonic()
    error, address = None, None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM)
        family, kind, number, _, where = found[0]
        address = where[0]
        if proto == "icmp":  # a ping socket: needs no privilege, only net.ipv4.ping_group_range
            number = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
        with socket.socket(family, kind, number) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(where)
            if proto != "tcp":
                sock.send(ECHO[family] if proto == "icmp" else b"x")
                sock.recv(1)
    except OSError as failure:
        error = name_of(failure)
    return {"error": error, "address": address, "ms": (time.monotonic() - begin) * 1000}


def attempts(targets: str) -> None:
    """Try a JSON list of [proto, host, port], one after the other."""
    print(json.dumps([attempt(*target) for target in json.loads(targets)]))


def talk(host: str, port: str, proto: str = "tcp") -> None:
    """Keep one connection to an echo server, or a ping, busy; `open`, then at its end when and why as JSON."""
    echoes, error = 0, None
    kind = (socket.SOCK_DGRAM, socket.IPPROTO_ICMP) if proto == "icmp" else (socket.SOCK_STREAM, 0)
    try:
        with socket.socket(socket.AF_INET, *kind) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect((host, int(port)))
            while True:
                sock.send(ECHO[socket.AF_INET] if proto == "icmp" else b"x")
                if not sock.recv(1):
                    break
                if not echoes:
                    print("open", flush=True)
                echoes += 1
                time.sleep(BEAT)
    except OSError as failure:
        error = name_of(failure)
    print(json.dumps({"error": error, "echoes": echoes, "at": time.monotonic()}), flush=True)


def orphans(count: str) -> None:
    """Start that many processes whose parent dies at once; they live for a moment and end."""
    for _ in range(int(count)):
        child = os.fork()
        if child == 0:
            if os.fork() == 0:
                time.sleep(0.02)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    {"attempts": attempts, "talk": talk, "orphans": orphans}[sys.argv[1]](*sys.argv[2:])
