"""What an allowed connection costs: latency of connect() and throughput, without a firewall and behind each backend.

Two network namespaces, a server in one, a client in the other; every figure comes from one run, in turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Network, ip_network

from initd.core.ruleset import Element, Ruleset
from initd.kernel.select import pick
from tests.support import namespaces
from tests.support.namespaces import Family

SERVER, UNLISTED, QUICK, BULK = "203.0.113.1", "203.0.113.2", 443, 80
ROUNDS, CONNECTS = 5, 400
CHUNK, CHUNKS = 1 << 20, 256
CASES = [("none", 0), *((backend, entries) for backend in ("xtables", "nftables") for entries in (10, 100_000))]


def serve() -> None:
    """Accept on both ports until killed: one closes at once, the other swallows what comes."""

    def quick(listener: socket.socket) -> None:
        while True:
            listener.accept()[0].close()

    def bulk(listener: socket.socket) -> None:
        buffer = bytearray(CHUNK)
        while True:
            with listener.accept()[0] as peer:
                while peer.recv_into(buffer):
                    pass
                peer.sendall(b".")

    threads = [
        threading.Thread(target=work, args=[socket.create_server(("", port), backlog=1024)])
        for work, port in ((quick, QUICK), (bulk, BULK))
    ]
    for thread in threads:
        thread.start()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    threads[0].join()


def measure(backend: str, entries: int) -> dict[str, float]:
    """Microseconds of a connect (median) and gigabits a second, from inside the client's namespace."""
    if backend != "none":
        enforced, _ = pick(backend)
        ranges = [IPv4Network(((11 << 24) + index * 512, 24)) for index in range(entries)]
        static = [Element(network, "tcp", 443) for network in ranges]
        static += [Element(ip_network(SERVER), "tcp", port) for port in (QUICK, BULK)]
        enforced.lockdown(os.getuid() + 990)
        enforced.apply(Ruleset(os.getuid() + 990, static=frozenset(static)))
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((UNLISTED, QUICK))
            raise RuntimeError(f"{backend} lets the unlisted through: there is nothing to measure")
    spans = []
    for _ in range(CONNECTS):
        start = time.perf_counter()
        socket.create_connection((SERVER, QUICK)).close()
        spans.append(time.perf_counter() - start)
    data = bytes(CHUNK)
    with socket.create_connection((SERVER, BULK)) as sock:
        start = time.perf_counter()
        for _ in range(CHUNKS):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        seconds = time.perf_counter() - start
    if backend != "none":
        enforced.teardown()
    return {"connect": statistics.median(spans) * 1e6, "gbit": CHUNK * CHUNKS * 8 / seconds / 1e9}


def main() -> None:
    """Build, measure in turns, print the table."""
    with contextlib.ExitStack() as undo:
        client, server = namespaces.unique("flows-client"), namespaces.unique("flows-server")
        for name in (client, server):
            undo.callback(namespaces.remove, name)
            namespaces.add(name)
        namespaces.join(box=client, internet=server, family=Family.DUAL)
        me = [sys.executable, "-m", "bench.flows"]
        serving = subprocess.Popen(["ip", "netns", "exec", server, *me, "serve"], stdout=subprocess.PIPE)
        undo.callback(serving.wait)
        undo.callback(serving.kill)
        assert serving.stdout is not None
        serving.stdout.readline()
        found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(ROUNDS):
            for backend, entries in CASES:
                argv = ["ip", "netns", "exec", client, *me, "measure", backend, str(entries)]
                done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
                found[backend, entries].append(json.loads(done.stdout))
    report(found)


def report(found: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """A row a case, medians of the rounds, ratios to no firewall at all."""
    figures = {
        case: {key: statistics.median(one[key] for one in rounds) for key in ("connect", "gbit")}
        for case, rounds in found.items()
    }
    plain = figures["none", 0]
    print(f"## Flows: what an allowed connection costs\n\nMedians of {ROUNDS} rounds of {CONNECTS} connects and")
    print(f"{CHUNKS} MiB each, between two network namespaces.\n")
    print("| firewall | entries | connect, µs | ÷ none | throughput, Gbit/s | ÷ none |")
    print("|---|---:|---:|---:|---:|---:|")
    for (backend, entries), one in figures.items():
        ratios = one["connect"] / plain["connect"], one["gbit"] / plain["gbit"]
        connect = f"{one['connect']:.0f} | {ratios[0]:.2f}"
        print(f"| {backend} | {entries:,} | {connect} | {one['gbit']:.1f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
