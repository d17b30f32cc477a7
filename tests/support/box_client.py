"""A client in a box, standard library only: asks its DNS, connects at once, prints what came of it as JSON.

Runs: the session user, inside a box, as `python box_client.py COMMAND …`.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
import sys
import threading
import time


def build(name: str, kind: int, *, edns: bool = False) -> bytes:
    labels = b"".join(bytes((len(one),)) + one.encode() for one in name.split(".") if one)
    head = struct.pack("!6H", random.getrandbits(16), 0x100, 1, 0, 0, int(edns))
    return head + labels + b"\0" + struct.pack("!HH", kind, 1) + (b"\0\0\x29\x10\0\0\0\0\0\0\0" if edns else b"")


def read(data: bytes) -> tuple[int, list[str]]:
    """The rcode and the addresses of an answer whose names are pointers or follow CNAMEs."""
    count = int.from_bytes(data[6:8])
    position = data.index(0, 12) + 5
    found = []
    for _ in range(count):
        while data[position] and data[position] < 192:
            position += data[position] + 1
        position += 2 if data[position] else 1
        kind, length = int.from_bytes(data[position : position + 2]), int.from_bytes(data[position + 8 : position + 10])
        position += 10
        if kind in (1, 28):
            family = socket.AF_INET if kind == 1 else socket.AF_INET6
            found.append(socket.inet_ntop(family, data[position : position + length]))
        position += length
    return data[3] & 15, found


def ask(name: str, kind: int = 1, *, server: str = "127.0.0.1", tcp: bool = False, timeout: float = 5.0):
    """(rcode, addresses, seconds); an error's name instead of the rcode when there is no answer."""
    begin = time.monotonic()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
            sock.settimeout(timeout)
            sock.connect((server, 53))
            query = build(name, kind)
            sock.sendall(len(query).to_bytes(2) + query if tcp else query)
            data = sock.recv(65535)
            while tcp and len(data) < 2 + int.from_bytes(data[:2]):
                data += sock.recv(65535)
            rcode, found = read(data[2:] if tcp else data)
    except OSError as error:
        return type(error).__name__, [], time.monotonic() - begin
    return rcode, found, time.monotonic() - begin


def connect(address: str, port: int = 443, timeout: float = 3.0) -> str:
    """ "ok" or the error's name; the connection is reset, so that ten thousand leave no TIME_WAIT."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.settimeout(timeout)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        try:
            sock.connect((address, port))
        except OSError as error:
            return type(error).__name__
        return "ok"


def chase(name: str, count: str) -> dict[str, object]:
    """Ask, connect to the first address, again and again; how often the connect failed."""
    failed, seen, rcodes = [], set(), set()
    for _ in range(int(count)):
        rcode, found, _ = ask(name)
        rcodes.add(rcode)
        if found:
            seen.add(found[0])
            if (outcome := connect(found[0])) != "ok":
                failed.append([found[0], outcome])
        else:
            failed.append([name, str(rcode)])
    return {"failed": failed[:20], "failures": len(failed), "addresses": len(seen), "rcodes": sorted(map(str, rcodes))}


def crowd(name: str, count: str) -> list[str]:
    """As many clients at once, each asking for the same name and connecting."""
    outcomes: list[str] = []
    gate = threading.Barrier(int(count))

    def one() -> None:
        gate.wait()
        rcode, found, _ = ask(name)
        outcomes.append(connect(found[0]) if found else str(rcode))

    threads = [threading.Thread(target=one) for _ in range(int(count))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def many(*questions: str) -> list[object]:
    """Each "name/type/server/udp|tcp/timeout" in turn."""
    answers: list[object] = []
    for question in questions:
        name, kind, server, transport, timeout = question.split("/")
        answers.append(ask(name, int(kind), server=server, tcp=transport == "tcp", timeout=float(timeout)))
    return answers


def mutate(seed: str, count: str) -> dict[str, int]:
    """Broken queries by the thousand for unlisted names; what matters is what the far side sees."""
    rng = random.Random(int(seed))
    answered = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", 53))
        for _ in range(int(count)):
            name = rng.choice(["evil.example", "x.site.example.evil.example", "payload." * 12 + "evil.example"])
            data = bytearray(build(name, rng.choice([1, 28, 16, 255, 65])))
            for _ in range(rng.randrange(4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                sock.send(data)
                sock.recv(4096)
                answered += 1
            except OSError:
                continue
        sock.settimeout(1)
        with contextlib.suppress(OSError):  # what is still on its way, until nothing comes for a second
            while sock.recv(4096):
                answered += 1
    return {"answered": answered}


def load(name: str, seconds: str) -> dict[str, object]:
    """Ask all the time, as a stub resolver does (1 s, then again); the longest wait until an answer came."""
    end, longest, answers, lost = time.monotonic() + float(seconds), 0.0, 0, 0
    print("begun", flush=True)
    while time.monotonic() < end:
        begin = time.monotonic()
        for _ in range(8):
            rcode, _found, _ = ask(name, timeout=1.0)
            if rcode == 0:
                break
            lost += 1
        else:
            return {"longest": 99.0, "answers": answers, "lost": lost}
        longest = max(longest, time.monotonic() - begin)
        answers += 1
        time.sleep(0.002)
    return {"longest": longest, "answers": answers, "lost": lost}


def connects(*targets: str) -> list[str]:
    """Each "address/port"."""
    return [connect(address, int(port)) for address, port in (target.split("/") for target in targets)]


def ride(server: str, transport: str, *ports: str) -> list[str]:
    """Ask `server` from each of the source ports; what came of it."""
    outcomes = []
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM if transport == "tcp" else socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.settimeout(0.3)
            try:
                sock.bind(("", int(port)))
                sock.connect((server, 53))
                sock.send(build("site.example", 1))
                outcomes.append(f"answered {len(sock.recv(512))}")
            except OSError as error:
                outcomes.append(type(error).__name__)
    return outcomes


def hold(address: str, port: str) -> None:
    """Keep a connection open; a line on standard input sends one and prints what comes back, or the error."""
    sock = socket.create_connection((address, int(port)), timeout=3)
    print(json.dumps("open"), flush=True)
    for line in sys.stdin:
        try:
            sock.sendall(line.encode())
            print(json.dumps(sock.recv(100).decode()), flush=True)
        except OSError as error:
            print(json.dumps(type(error).__name__), flush=True)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
