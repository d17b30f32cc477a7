"""Does the policy hold? One question with one answer, asked before, during and after whatever is done to a box.

The box's policy is POLICY. Each target below answers in a lab without a box: that is the negative control, and
`unrefused` finds it out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import client as client_module
from tests.support.attempts import Attempt, attempt_all
from tests.support.remote import RESOLVER4, RESOLVER6

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.support.attempts import Target
    from tests.support.box import Box
    from tests.support.lab import Lab

POLICY = "site.example\nv4.example:443\n"
LISTED: tuple[Target, ...] = (
    ("tcp", "site.example", 443),
    ("tcp", "site.example", 80),
    ("tcp", "203.0.113.10", 22),
    ("tcp", "2001:db8:2::10", 443),
    ("tcp", "v4.example", 443),
)
REACHABLE = frozenset({"203.0.113.10", "2001:db8:2::10", "203.0.113.11", RESOLVER4, RESOLVER6})

UNLISTED: tuple[Target, ...] = (
    ("tcp", "203.0.113.20", 443),
    ("tcp", "203.0.113.20", 22),
    ("udp", "203.0.113.20", 443),
    ("tcp", "2001:db8:2::20", 443),
    ("udp", "2001:db8:2::20", 443),
)
OTHER_PORT: tuple[Target, ...] = (
    ("tcp", "203.0.113.10", 5000),
    ("tcp", "203.0.113.11", 80),
    ("udp", "203.0.113.10", 443),
    ("tcp", "2001:db8:2::10", 8443),
    ("udp", "2001:db8:2::10", 5000),
)
ICMP: tuple[Target, ...] = (
    ("icmp", "203.0.113.20", 0),
    ("icmp", "203.0.113.10", 0),
    ("icmp", "2001:db8:2::20", 0),
    ("icmp", "2001:db8:2::10", 0),
)
SPECIAL: tuple[Target, ...] = (
    ("tcp", "169.254.169.254", 80),
    ("udp", "169.254.169.254", 443),
    ("tcp", "10.9.9.9", 443),
    ("tcp", "192.168.7.7", 443),
    ("tcp", "100.64.9.9", 443),
    ("tcp", "fd00:9::9", 443),
)
RESOLVERS: tuple[Target, ...] = (("tcp", RESOLVER4, 53), ("tcp", RESOLVER6, 53), ("tcp", RESOLVER4, 443))
TARGETS = (*UNLISTED, *OTHER_PORT, *SPECIAL, *RESOLVERS)

REFUSALS = frozenset({"ECONNREFUSED", "EHOSTUNREACH", "EACCES", "EPERM"})
"""What REJECT looks like to a local sender. A time-out or a missing route is not a refusal."""


def let_ping(lab: Lab) -> None:
    """Let everybody in the box's namespace have ping sockets, as engines do."""
    lab.exec(["sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647"])


def without_box(lab: Lab, targets: Sequence[Target]) -> list[Attempt]:
    """Try targets from the box's namespace, as root and with no box around: only rules can refuse then."""
    done = lab.exec([sys.executable, "-I", str(Path(client_module.__file__)), "attempts", json.dumps(targets)])
    assert done.returncode == 0, done.stderr
    return [Attempt(**outcome) for outcome in json.loads(done.stdout)]


def unrefused(targets: Iterable[Target], tried: Iterable[Attempt]) -> dict[Target, Attempt]:
    """The targets that were not refused by a rule: they answered, timed out, or there was no route."""
    return {target: outcome for target, outcome in zip(targets, tried, strict=True) if outcome.error not in REFUSALS}


def answering(targets: Iterable[Target], tried: Iterable[Attempt]) -> set[Target]:
    return {target for target, outcome in zip(targets, tried, strict=True) if outcome.error is None}


def assert_holds(lab: Lab, box: Box) -> None:
    """The unlisted is refused, the listed answers, nothing strange leaves and no unlisted name is asked upstream."""
    begin = time.monotonic()
    tried = attempt_all(box, [*TARGETS, *LISTED, ("tcp", "other.example", 443)])
    refused, listed, unknown = tried[: len(TARGETS)], tried[len(TARGETS) : -1], tried[-1]
    assert unrefused(TARGETS, refused) == {}
    assert answering(LISTED, listed) == set(LISTED), listed
    assert unknown.error == "EAI_NONAME", unknown
    assert strange_packets(lab, since=begin) == set()
    assert strange_names(lab) == set()


def strange_packets(lab: Lab, *, since: float = 0.0) -> set[tuple[str, str, int]]:
    """(destination, protocol, port) of packets that left the box although POLICY does not list where they went."""
    return {
        (packet.dst, packet.proto, packet.dport)
        for packet in lab.packets()
        if packet.at >= since and (packet.dst not in REACHABLE or packet.proto not in {"tcp", "udp"})
    }


def strange_names(lab: Lab) -> set[str]:
    return {query.name for query in lab.dns.queries()} - {"site.example", "v4.example"}


def flush(lab: Lab, backend: str) -> None:
    """Switch the protection off from outside: what no session may be able to do."""
    if backend == "nftables":
        commands = [["nft", "delete", "table", "inet", "initd"]]
    else:
        chains = ("INITD-OUTPUT", "INITD-INPUT")
        commands = [[f"{ip}tables-legacy", "-F", chain] for ip in ("ip", "ip6") for chain in chains]
    for command in commands:
        done = lab.exec(command)
        assert done.returncode == 0, done.stderr


def rules(lab: Lab) -> str:
    """Every rule, chain and table in the namespace, of everybody, without counters and time stamps."""
    listed = []
    for command in (
        ["iptables-legacy-save"],
        ["ip6tables-legacy-save"],
        ["nft", "--stateless", "list", "ruleset"],
    ):
        done: subprocess.CompletedProcess[str] = lab.exec(command)
        assert done.returncode == 0, done.stderr
        listed += [line.rpartition(" [")[0] if line.startswith(":") else line for line in done.stdout.splitlines()]
    text = "\n".join(line for line in listed if not line.startswith("#"))
    return re.sub(r" timeout [0-9dhms]+", "", text)  # a lease taken up again has what is left of its time
