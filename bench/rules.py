"""Ranges into the kernel: compile, apply, read back and reload, beside the tool's own bulk load of the same elements.

    sudo .venv/bin/python -m bench.rules [--backend xtables|nftables] [--runs N] [RANGES …]

The peer is `ipset restore` for xtables and `nft -f` for nftables, fed from a file, elements only. Peer and backend take
turns in one process in one network namespace that ends with it; each figure is the median of the runs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from ipaddress import IPv4Network
from typing import TYPE_CHECKING, Any

from initd.core.policy import DEFAULT_SERVICES, Origin, RangeRule
from initd.core.ruleset import Element, Surroundings, compile_ruleset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SIZES = (100, 10_000, 100_000)
CLASSES = {"xtables": "Xtables", "nftables": "Nftables"}
PEERS = {"xtables": "ipset restore", "nftables": "nft -f"}
COLUMNS = ("compile", "apply", "read back", "reload, one more", "peer", "apply ÷ peer")


def rules(count: int) -> list[RangeRule]:
    """Networks of which no two can be merged, each for the three default services."""
    origin = Origin(1, "bench")
    return [RangeRule(IPv4Network(((11 << 24) + index * 512, 24)), DEFAULT_SERVICES, origin) for index in range(count)]


def compiled(ranges: list[RangeRule]) -> Any:
    return compile_ruleset(ranges, [], networks={}, around=Surroundings(990))


def clock(what: Callable[[], Any]) -> tuple[float, Any]:
    """(milliseconds, result), with the collector in the state that `initd.enforce` leaves it in."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    result = what()
    spent = (time.perf_counter() - start) * 1000
    gc.enable()
    return spent, result


def restore_lines(elements: Iterable[Element], size: int) -> str:
    lines = [f"create bench hash:net,port maxelem {max(65_536, size * 2)}"]
    lines += [f"add bench {one.network},{one.proto}:{one.port}" for one in elements]
    return "\n".join(lines) + "\n"


def nft_lines(elements: Iterable[Element], _size: int) -> str:
    members = ", ".join(f"{one.network} . {one.proto} . {one.port}" for one in elements)
    declared = "set inet bench ranges { type ipv4_addr . inet_proto . inet_service; flags interval; }"
    return f"add table inet bench\nadd {declared}\nadd element inet bench ranges {{ {members} }}\n"


PEER_FILES = {"xtables": restore_lines, "nftables": nft_lines}
PEER_COMMANDS = {
    "xtables": (["ipset", "restore", "-file"], ["ipset", "destroy", "bench"]),
    "nftables": (["nft", "-f"], ["nft", "delete", "table", "inet", "bench"]),
}


def peer_load(name: str, path: str) -> float:
    load, clean = PEER_COMMANDS[name]
    spent, _ = clock(lambda: subprocess.run([*load, path], check=True))
    subprocess.run(clean, check=True)
    return spent


def one_run(backend: Any, ranges: list[RangeRule], peer: Callable[[], float]) -> list[float]:
    beside = peer()
    backend.lockdown(990)
    compiling, ruleset = clock(lambda: compiled(ranges[:-1]))
    applying, _ = clock(lambda: backend.apply(ruleset))
    reading, held = clock(backend.read)
    if held != backend.expect(ruleset):
        raise SystemExit("bench: the kernel does not hold what was applied")
    reloading, _ = clock(lambda: backend.apply(compiled(ranges)))
    backend.teardown()
    return [compiling, applying, reading, reloading, beside, applying / beside]


def row(name: str, count: int, runs: int) -> str:
    backend = getattr(importlib.import_module(f"initd.kernel.{name}"), CLASSES[name])()
    backend.probe()  # imports and autoloads are the boot's business
    ranges = rules(count + 1)
    elements = compiled(ranges[:-1]).static
    with tempfile.NamedTemporaryFile("w", suffix=".bench") as file:
        file.write(PEER_FILES[name](elements, len(elements)))
        file.flush()
        results = [one_run(backend, ranges, lambda: peer_load(name, file.name)) for _ in range(runs)]
    *figures, ratio = (statistics.median(column) for column in zip(*results, strict=True))
    return f"| {count:,} | {len(elements):,} | " + " | ".join(f"{one:,.0f}" for one in figures) + f" | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.rules")
    parser.add_argument("--backend", choices=sorted(CLASSES), action="append")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("ranges", type=int, nargs="*")
    options = parser.parse_args()
    if os.environ.get("INITD_BENCH_INSIDE") != "1":
        os.environ["INITD_BENCH_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, "-m", "bench.rules", *sys.argv[1:]])
    for name in options.backend or CLASSES:
        print(f"## Rules: {name} beside `{PEERS[name]}`\n")
        print(f"Milliseconds, median of {options.runs} runs; three services for each range.\n")
        print("| ranges | elements | " + " | ".join(COLUMNS) + " |")
        print("|---:" * (len(COLUMNS) + 2) + "|")
        for count in options.ranges or SIZES:
            print(row(name, count, options.runs), flush=True)
        print()


if __name__ == "__main__":
    main()
