"""Beside a script that resolves once, as many are copied from project to project: `python -m bench.script`, as root.

The script is written anew here and does the least that such scripts do: it asks for each name with dig, puts the
addresses into an ipset and refuses the rest of IPv4. That it neither verifies nor looks after IPv6 and DNS counts in
its favour.
"""

from __future__ import annotations

import statistics
import sys
import time

from bench.boot import LATENCY, names, start
from tests.support.attempts import attempt
from tests.support.lab import Lab
from tests.support.remote import RESOLVER4

RUNS = 5
COUNTS = (10, 100)
MOVES = 20
MOVING = "moving.example"
INTRO = f"""\
## Beside a script that resolves once

Seconds to ready, {LATENCY * 1000:.0f} ms per DNS answer, medians of {RUNS} runs in turns. The script is of the kind
that is copied from project to project: dig, ipset, iptables, for IPv4 alone and without a look
whether it works (`bench/script.py`).
`initd` rules IPv6 and DNS as well, reads back what the kernel holds and tries as a session before it is ready.
"""
SCRIPT = """
set -e
ipset create allowed hash:net
for name in "$@"; do
    for address in $(dig +short A "$name" @{resolver}); do ipset add -exist allowed "$address"; done
done
iptables-legacy -A OUTPUT -o lo -j ACCEPT
iptables-legacy -A OUTPUT -p udp --dport 53 -j ACCEPT
iptables-legacy -A OUTPUT -m state --state ESTABLISHED,RELATED -j ACCEPT
iptables-legacy -A OUTPUT -m set --match-set allowed dst -j ACCEPT
iptables-legacy -A OUTPUT -j REJECT --reject-with icmp-admin-prohibited
"""


def run_script(lab: Lab, listed: list[str]) -> float:
    """Seconds that the script takes."""
    begin = time.monotonic()
    done = lab.exec(["bash", "-c", SCRIPT.format(resolver=RESOLVER4), "script", *listed], timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.monotonic() - begin


def script_start(count: int) -> float:
    with Lab() as lab:
        entries = names(count)
        lab.dns.load(entries)
        lab.dns.latency(LATENCY)
        return run_script(lab, [entry.name for entry in entries])


def move(lab: Lab, number: int) -> str:
    """Give the moving name another address, that somebody answers at."""
    address = f"203.0.113.{100 + number}"
    lab.dns.set(MOVING, {"A": address}, ttl=1)
    return address


def refused_behind_script() -> int:
    """How many moves of a listed name end in a refusal."""
    with Lab() as lab:
        move(lab, 0)
        run_script(lab, [MOVING])
        refused = 0
        for number in range(1, MOVES + 1):
            address = move(lab, number)
            refused += lab.exec(["bash", "-c", f"echo > /dev/tcp/{address}/443"]).returncode != 0
        return refused


def refused_behind_initd() -> int:
    with Lab() as lab:
        move(lab, 0)
        box = lab.box(policy=f"{MOVING}\n")
        box.start()
        refused = 0
        for number in range(1, MOVES + 1):
            address = move(lab, number)
            time.sleep(1.1)  # its TTL
            outcome = attempt(box, ("tcp", MOVING, 443))
            if outcome.error is None and outcome.address != address:
                raise RuntimeError(f"{outcome.address} is an old answer")
            refused += outcome.error is not None
        return refused


def main() -> int:
    print(INTRO)
    print("| names | script | initd, xtables | initd, nftables | script ÷ xtables |")
    print("|---:|---:|---:|---:|---:|")
    for count in COUNTS:
        rounds = [
            (script_start(count), start("xtables", count, LATENCY), start("nftables", count, LATENCY))
            for _ in range(RUNS)
        ]
        script, xtables, nftables = map(statistics.median, zip(*rounds, strict=True))
        print(f"| {count:,} | {script:.2f} | {xtables:.2f} | {nftables:.2f} | {script / xtables:.1f} |", flush=True)
    print(f"\nA listed name moves {MOVES} times, and a client follows DNS:")
    print(f"refused {refused_behind_script()} times behind the script, {refused_behind_initd()} behind `initd`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
