"""Apply, reload and read-back of many ranges by the nftables backend, beside `nft -f` of the same elements.

    sudo .venv/bin/python bench/nftables.py [ranges …]

Runs in a network namespace of its own (unshare -n) that ends with it. Each figure is the best of three, except the
first apply of each size; memory is the peak of the whole process so far.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from ipaddress import IPv4Network
from typing import TYPE_CHECKING

from initd.core.ruleset import Element, Ruleset
from initd.kernel.nftables import Nftables

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (100, 10_000, 100_000)
_SKELETON = """add table inet bench
delete table inet bench
add table inet bench
add set inet bench ranges { type ipv4_addr . inet_proto . inet_service; flags interval; }
"""


def ranges(count: int) -> frozenset[Element]:
    """Distinct networks with a port, none inside another."""
    choice = random.Random(1)
    blocks = choice.sample(range(1 << 22, 3 << 22), count)  # 64.0.0.0 to 191.255.255.255 in steps of /24
    networks = (IPv4Network(((block << 8) & 0xFFFFFFFF, choice.choice((24, 25, 28, 32)))) for block in blocks)
    return frozenset(Element(network, "tcp", 443) for network in networks)


def clock(what: Callable[[], object], *, rounds: int = 3) -> float:
    """Best of `rounds`, milliseconds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        what()
        best = min(best, time.perf_counter() - start)
    return best * 1000


def nft_file(elements: frozenset[Element]) -> float:
    """`nft -f` of the same elements into a fresh table."""
    with tempfile.NamedTemporaryFile("w", suffix=".nft") as file:
        members = ", ".join(f"{one.network} . {one.proto} . {one.port}" for one in elements)
        file.write(f"{_SKELETON}add element inet bench ranges {{ {members} }}\n")
        file.flush()
        spent = clock(lambda: subprocess.run(["nft", "-f", file.name], check=True))
    subprocess.run(["nft", "delete", "table", "inet", "bench"], check=True)
    return spent


def measure(count: int) -> str:
    elements = ranges(count)
    peer = nft_file(elements)
    backend = Nftables()
    backend.lockdown(990)
    first, more = Ruleset(990, static=elements), Ruleset(990, static=elements | {_extra()})
    applied = clock(lambda: backend.apply(first), rounds=1)
    if backend.read() != backend.expect(first):
        raise SystemExit("the kernel does not hold what was applied")
    same = clock(lambda: backend.apply(first))
    start = time.perf_counter()
    backend.apply(more)
    one = (time.perf_counter() - start) * 1000
    seen = clock(backend.read)
    backend.apply(first)
    learned = clock(lambda: backend.learn([(_extra(), 60)]), rounds=200) * 1000
    backend.teardown()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = (peer, applied, same, one, seen)
    return f"| {count:,} | " + " | ".join(f"{figure:.0f}" for figure in figures) + f" | {learned:.0f} | {memory:.0f} |"


def _extra() -> Element:
    return Element(IPv4Network("203.0.113.9/32"), "tcp", 443)


def main() -> None:
    if os.environ.get("INITD_BENCH_INSIDE") != "1":
        os.environ["INITD_BENCH_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, *sys.argv])
    print("| ranges | nft -f ms | first apply ms | nothing new ms | one more ms | read back ms | learn us | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for count in map(int, sys.argv[1:] or SIZES):
        print(measure(count), flush=True)


if __name__ == "__main__":
    main()
