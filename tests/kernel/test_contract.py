"""What every backend must do to real packets. Each refusal is preceded by the same attempt without a ruleset."""

from __future__ import annotations

import contextlib
import math
import re
import select
import socket
import struct
import time
from ipaddress import ip_address, ip_network

import pytest

from initd.core.ruleset import Element, Endpoint, Ruleset
from initd.enforce import Enforcer
from tests.kernel.wire import BOX4, BOX6, SESSION, WARDEN, Wire, as_user, attempt, run

pytestmark = pytest.mark.kernel

LISTED4, LISTED6 = "203.0.113.9", "2001:db8:2::9"
LEARNED4, LEARNED6 = "192.0.2.7", "2001:db8:2:7::7"
UPSTREAM4, UPSTREAM6 = "203.0.113.53", "2001:db8:2::53"
PRIVATE4, PRIVATE6 = "10.20.3.4", "fd00:20::4"
RULESET = Ruleset(
    WARDEN,
    upstreams=frozenset({Endpoint(ip_address(UPSTREAM4)), Endpoint(ip_address(UPSTREAM6))}),
    static=frozenset(
        {
            Element(ip_network("203.0.113.8/29"), "tcp", 443),
            Element(ip_network("203.0.113.9/32"), "udp", 443),
            Element(ip_network("2001:db8:2::8/125"), "tcp", 443),
            Element(ip_network("2001:db8:2::9/128"), "udp", 443),
        }
    ),
    private=frozenset(
        {Element(ip_network("10.20.0.0/16"), "tcp", 443), Element(ip_network("fd00:20::/32"), "tcp", 443)}
    ),
)
UNLISTED = (
    ("tcp", "203.0.113.77"), ("udp", "203.0.113.77"), ("icmp", "203.0.113.77"), ("icmp", LISTED4),
    ("tcp", "2001:db8:2::77"), ("udp", "2001:db8:2::77"), ("icmp", "2001:db8:2::77"), ("icmp", LISTED6),
    ("tcp", LISTED4, 80), ("udp", LISTED4, 80), ("tcp", LISTED6, 80), ("udp", LISTED6, 80),
    ("tcp", "203.0.113.16"), ("tcp", "203.0.113.7"), ("udp", "203.0.113.10"), ("tcp", "2001:db8:2::10"),
    ("tcp", UPSTREAM4, 53), ("udp", UPSTREAM4, 53), ("udp", UPSTREAM6, 53),
)  # fmt: skip
SPECIAL = (
    ("tcp", "169.254.169.254", 80), ("udp", "169.254.169.254", 53), ("icmp", "169.254.169.254"),
    ("tcp", "10.21.0.1"), ("udp", "10.20.3.4"), ("tcp", "192.168.7.7"), ("tcp", "172.16.9.9"), ("tcp", "100.64.1.1"),
    ("tcp", "198.18.0.1"), ("tcp", "fd00:ec2::254", 80), ("tcp", "fd00:21::1"), ("udp", "fd00:20::4"),
    ("tcp", "64:ff9b::cb00:7109"), ("tcp", "2002:cb00:7109::1"), ("tcp", PRIVATE4, 80), ("tcp", PRIVATE6, 80),
)  # fmt: skip
LISTED = (
    ("tcp", LISTED4), ("udp", LISTED4), ("tcp", LISTED6), ("udp", LISTED6), ("tcp", "203.0.113.15"),
    ("tcp", "2001:db8:2::f"), ("tcp", PRIVATE4), ("tcp", PRIVATE6),
)  # fmt: skip


def element(address: str, port: int = 443, proto: str = "tcp") -> Element:
    return Element(ip_network(address), proto, port)


def armed(backend, ruleset: Ruleset = RULESET):
    """A backend that holds `ruleset` and was seen to."""
    made = backend()
    made.lockdown(ruleset.warden_uid)
    Enforcer(made).enforce(ruleset)
    return made


def tries(targets, uid: int = SESSION):
    return [attempt(*target, uid=uid) for target in targets]


def apart(attempts, word: str):
    """Those that did not end as `word` says."""
    if word == "open":
        return [one for one in attempts if one.outcome != "open"]
    return [one for one in attempts if not one.refused_at_once]


@pytest.mark.parametrize("targets", [UNLISTED, SPECIAL], ids=["unlisted", "special"])
def test_refused_at_once_and_nothing_leaves(backend, wire, targets):
    assert apart(wire.do(tries, targets), "open") == [], "negative control: without rules all of it answers"
    assert wire.arrived(), "negative control: and is seen at the far side"
    wire.do(lambda: armed(backend) and None)
    wire.arrived()
    assert apart(wire.do(tries, targets), "refused") == []
    assert wire.arrived() == []


def test_listed_is_open(backend, wire):
    wire.do(lambda: armed(backend) and None)
    assert apart(wire.do(tries, LISTED), "open") == []
    emptied = Ruleset(WARDEN)
    wire.do(lambda: Enforcer(backend()).enforce(emptied))
    assert apart(wire.do(tries, LISTED), "refused") == [], "negative control: it was the elements that opened it"


def test_warden_alone_reaches_upstreams(backend, wire):
    targets = (("udp", UPSTREAM4, 53), ("tcp", UPSTREAM4, 53), ("udp", UPSTREAM6, 53))
    wire.do(lambda: armed(backend) and None)
    assert apart(wire.do(tries, targets, WARDEN), "open") == []
    assert apart(wire.do(tries, targets, SESSION), "refused") == []
    assert apart(wire.do(tries, targets, 0), "refused") == []
    other = (("tcp", UPSTREAM4, 443), ("udp", "203.0.113.77", 53), ("tcp", LISTED4, 80))
    assert apart(wire.do(tries, other, WARDEN), "refused") == []


def test_engine_dns_opens_port_53_to_root_only(backend, wire):
    targets = (("udp", "203.0.113.77", 53), ("tcp", "10.1.1.1", 53), ("udp", "2001:db8:2::77", 53))
    wire.do(lambda: armed(backend) and None)
    assert apart(wire.do(tries, targets, 0), "refused") == [], "negative control"
    wire.do(lambda: armed(backend, Ruleset(WARDEN, engine_dns=True)) and None)
    assert apart(wire.do(tries, targets, 0), "open") == []
    assert apart(wire.do(tries, targets, SESSION), "refused") == []


DOCKER = """*nat
:DOCKER_OUTPUT - [0:0]
:DOCKER_POSTROUTING - [0:0]
-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT
-A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING
-A DOCKER_OUTPUT -d 127.0.0.11/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination 127.0.0.11:39571
-A DOCKER_OUTPUT -d 127.0.0.11/32 -p udp -m udp --dport 53 -j DNAT --to-destination 127.0.0.11:51234
-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p tcp -m tcp --sport 39571 -j SNAT --to-source :53
-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p udp -m udp --sport 51234 -j SNAT --to-source :53
COMMIT
"""
FOREIGN = """*filter
:LOCAL - [0:0]
-A INPUT -p tcp -m tcp --dport 9999 -j ACCEPT
-A OUTPUT -d 192.0.2.200/32 -p udp -j LOCAL
-A LOCAL -m comment --comment "not ours" -j RETURN
COMMIT
"""
SAVES = ("iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save")


def docker(wire: Wire, flavour: str, rules: str = DOCKER) -> None:
    run("ip", "netns", "exec", wire.box, f"iptables-{flavour}-restore", "-n", text=rules)


ENGINE = (
    ("udp", "127.0.0.11", 53), ("tcp", "127.0.0.11", 53), ("udp", "127.0.0.11", 51234), ("tcp", "127.0.0.11", 39571),
    ("tcp", "127.0.0.11", 4444),
)  # fmt: skip


def engine():
    """What Docker's DNAT leads to; nothing listens on 4444."""
    stream = socket.create_server(("127.0.0.11", 39571))
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagram.bind(("127.0.0.11", 51234))

    def loop():
        while True:
            for sock in select.select([stream, datagram], [], [])[0]:
                if sock is stream:
                    sock.accept()[0].sendall(b"tcp")
                else:
                    sock.sendto(*sock.recvfrom(512))

    return loop


@pytest.mark.parametrize("flavour", ["legacy", "nft"])
def test_engine_resolver_is_for_the_warden(backend, wire, flavour):
    ruleset = Ruleset(WARDEN, upstreams=frozenset({Endpoint(ip_address("127.0.0.11"))}))
    docker(wire, flavour)
    wire.background(engine)
    assert apart(wire.do(tries, ENGINE[:4], SESSION), "open") == [], "negative control"
    wire.do(lambda: armed(backend, ruleset) and None)
    assert apart(wire.do(tries, ENGINE, SESSION), "refused") == []
    assert apart(wire.do(tries, ENGINE, 0), "refused") == []
    assert apart(wire.do(tries, ENGINE[:4], WARDEN), "open") == []


def standing_in() -> tuple[str, str]:
    """Who hears a question of the warden's, and what it is told, when a session sends from 127.0.0.11:53 beforehand."""
    with as_user(SESSION):
        session = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        session.bind(("127.0.0.11", 53))
    with as_user(WARDEN):
        warden = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with session, warden:
        warden.bind(("127.0.0.1", 0))
        with contextlib.suppress(PermissionError):
            session.sendto(b"early", warden.getsockname())
            warden.recv(16)
        warden.connect(("127.0.0.11", 53))
        warden.settimeout(5)
        warden.send(b"question")
        heard = [session] if select.select([session], [], [], 0.2)[0] else []
        for one in heard:
            one.sendto(b"false", one.recvfrom(16)[1])
        return ("the session" if heard else "the engine"), warden.recv(16).decode()


@pytest.mark.parametrize("flavour", ["legacy", "nft"])
def test_nobody_stands_in_for_the_engine_resolver(backend, wire, flavour):
    docker(wire, flavour)
    wire.shell("sysctl", "-qw", "net.ipv4.ip_unprivileged_port_start=0")  # as engines do
    wire.background(engine)
    assert wire.do(standing_in) == ("the session", "false"), "negative control"
    wire.do(lambda: armed(backend, Ruleset(WARDEN, upstreams=frozenset({Endpoint(ip_address("127.0.0.11"))}))) and None)
    assert wire.do(standing_in) == ("the engine", "question")


def test_lockdown_refuses_everything(backend, wire):
    targets = [*UNLISTED, *SPECIAL, *LISTED]
    assert apart(wire.do(tries, targets), "open") == [], "negative control"
    wire.do(lambda: backend().lockdown(WARDEN))
    wire.arrived()
    assert apart(wire.do(tries, targets), "refused") == []
    assert apart(wire.do(tries, [("udp", UPSTREAM4, 53)], WARDEN), "refused") == []
    assert wire.arrived() == []
    assert wire.do(loopback) == "open"


def loopback() -> str:
    with socket.create_server(("127.0.0.1", 7001)), socket.create_connection(("127.0.0.1", 7001), 1):
        return "open"


def test_lockdown_closes_what_was_armed(backend, wire):
    wire.do(lambda: armed(backend) and None)
    assert apart(wire.do(tries, LISTED), "open") == [], "negative control"
    wire.do(lambda: backend().lockdown(WARDEN))
    assert apart(wire.do(tries, LISTED), "refused") == []


def test_learned_opens_and_expires(backend, wire):
    def learn():
        made = armed(backend)
        before = tries([("tcp", LEARNED4), ("tcp", LEARNED6)])
        made.learn([(element(LEARNED4), 2), (element(LEARNED6), 2), (element(LEARNED4, 80), 60)])
        during = tries([("tcp", LEARNED4), ("tcp", LEARNED6), ("tcp", LEARNED4, 80)])
        time.sleep(2.6)
        after = tries([("tcp", LEARNED4), ("tcp", LEARNED6)])
        return before, during, after, tries([("tcp", LEARNED4, 80), ("tcp", LEARNED4, 22)]), made.learned()

    before, during, after, rest, held = wire.do(learn)
    assert apart(before, "refused") == [], "negative control"
    assert apart(during, "open") == []
    assert apart(after, "refused") == []
    assert rest[0].outcome == "open"
    assert rest[1].refused_at_once
    assert list(held) == [element(LEARNED4, 80)]
    assert 40 <= held[element(LEARNED4, 80)] <= 60


@pytest.mark.parametrize("seconds", [5, pytest.param(math.inf, id="negative control")])
def test_audit_ends_in_the_kernel(backend, wire, seconds):
    # Not ICMP: pings of one id are one flow, which goes on.
    targets = [target for target in UNLISTED if target[2:] != (53,) and target[0] != "icmp"]

    def audit():
        begin = time.monotonic()
        backend().apply(Ruleset(WARDEN, audit=begin + seconds))
        during = tries(targets)
        time.sleep(begin + 5.6 - time.monotonic())
        after = tries(targets)
        backend().apply(Ruleset(WARDEN))
        return during, after, tries(targets)

    during, after, enforced = wire.do(audit)
    assert apart(during, "open") == []
    assert apart(after, "refused" if seconds == 5 else "open") == []
    assert apart(enforced, "refused") == []


def test_learning_again_refreshes_and_forgetting_closes(backend, wire):
    def learn():
        made = armed(backend)
        made.learn([(element(LEARNED4), 5)])
        made.learn([(element(LEARNED4), 500)])
        refreshed = made.learned()
        made.learn([(element(LEARNED4), 50)])
        shortened = made.learned()
        made.forget([element(LEARNED4), element("192.0.2.99")])
        return refreshed, shortened, made.learned(), tries([("tcp", LEARNED4)])

    refreshed, shortened, gone, after = wire.do(learn)
    assert 490 <= refreshed[element(LEARNED4)] <= 500
    assert 40 <= shortened[element(LEARNED4)] <= 50
    assert gone == {}
    assert apart(after, "refused") == []


def test_learned_special_address_is_refused_unless_it_was_learned(backend, wire):
    """The DNS guard learns a special address only when its range is listed by name."""

    def learn():
        made = armed(backend)
        before = tries([("tcp", "192.168.7.7")])
        made.learn([(element("192.168.7.7"), 60)])
        return before, tries([("tcp", "192.168.7.7"), ("tcp", "192.168.7.7", 80), ("tcp", "192.168.7.8")])

    before, after = wire.do(learn)
    assert apart(before, "refused") == []
    assert [one.outcome for one in after[:1]] == ["open"]
    assert apart(after[1:], "refused") == []


def test_learned_outlives_reload_and_a_new_process(backend, wire):
    wire.do(lambda: armed(backend).learn([(element(LEARNED4), 600), (element(LEARNED6), 600)]))
    wire.do(lambda: Enforcer(backend()).enforce(Ruleset(WARDEN)))
    assert set(wire.do(lambda: backend().learned())) == {element(LEARNED4), element(LEARNED6)}
    assert apart(wire.do(tries, [("tcp", LEARNED4), ("tcp", LEARNED6)]), "open") == []


def test_inbound(backend, wire):
    """From the far side: its own subnet may connect once it is listed, nobody else."""

    def serve():
        server = socket.create_server(("::", 7070), family=socket.AF_INET6, dualstack_ipv6=True)

        def loop():
            while True:
                server.accept()

        return loop

    def knock(source: str, target: str) -> str:
        with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET) as sock:
            sock.settimeout(5)
            sock.setsockopt(*((41, 78) if ":" in target else (0, 15)), 1)  # IPV6_FREEBIND, IP_FREEBIND
            sock.bind((source, 0))
            try:
                sock.connect((target, 7070))
            except OSError as error:
                return type(error).__name__
            return "open"

    pairs = (("198.51.100.1", BOX4), ("203.0.113.5", BOX4), ("2001:db8:1::1", BOX6), ("2001:db8:2::5", BOX6))
    wire.background(serve)
    assert wire_far(wire, lambda: [knock(*pair) for pair in pairs]) == ["open"] * 4, "negative control"
    subnets = frozenset({ip_network("198.51.100.0/24"), ip_network("2001:db8:1::/64")})
    wire.do(lambda: armed(backend, Ruleset(WARDEN, subnets=subnets)) and None)
    results = wire_far(wire, lambda: [knock(*pair) for pair in pairs])
    assert [results[0], results[2]] == ["open"] * 2
    assert [results[1], results[3]] == ["ConnectionRefusedError"] * 2, "and nobody else waits for a time-out"


def wire_far(wire: Wire, function):
    """`function` in a child on the far side."""
    box, wire.box = wire.box, wire.far
    try:
        return wire.do(function)
    finally:
        wire.box = box


def foreign(wire: Wire) -> dict[str, str]:
    """Everybody else's rules in the words of each save program: no counters, none of our lines."""
    texts = {}
    for program in SAVES:
        text = re.sub(r"\[\d+:\d+\]", "", wire.shell(program))
        texts[program] = "\n".join(line for line in text.splitlines() if "INITD-" not in line and line[:1] != "#")
    return texts


def test_foreign_rules_are_untouched(backend, wire):
    docker(wire, "legacy", DOCKER + FOREIGN)
    docker(wire, "nft", DOCKER + FOREIGN)
    wire.shell("ip6tables-legacy", "-n", "-L")  # makes the empty table
    before = foreign(wire)
    assert all("not ours" in before[program] for program in SAVES if not program.startswith("ip6"))
    assert before["iptables-legacy-save"].count("DNAT") == 2
    for step in (
        lambda: backend().probe() and None,
        lambda: backend().lockdown(WARDEN),
        lambda: armed(backend) and None,
        lambda: armed(backend, Ruleset(WARDEN, engine_dns=True)) and None,
        lambda: backend().teardown(),
    ):
        wire.do(step)
        assert foreign(wire) == before
    wire.shell("iptables-legacy", "-D", "LOCAL", "1")
    assert foreign(wire) != before, "negative control: the comparison sees a rule that went"


def test_foreign_counters_survive(backend, wire):
    docker(wire, "legacy", FOREIGN.replace("192.0.2.200/32", "127.0.0.5/32"))
    wire.do(tries, [("udp", "127.0.0.5", 9)] * 3)
    counted = [line for line in wire.shell("iptables-legacy-save", "-c").splitlines() if "127.0.0.5" in line]
    assert not counted[0].startswith("[0:0]"), "negative control: something was counted"
    wire.do(lambda: armed(backend) and None)
    assert counted == [line for line in wire.shell("iptables-legacy-save", "-c").splitlines() if "127.0.0.5" in line]


def test_probe_leaves_nothing_and_finds_everything(backend, wire):
    texts = (
        [wire.shell(program) for program in SAVES[:2]],
        wire.shell("nft", "list", "ruleset"),
        wire.shell("ipset", "list"),
    )
    probe = wire.do(lambda: backend().probe())
    assert probe.backend == backend.name
    assert probe.usable, probe
    assert all(probe.capabilities.values())
    assert probe.missing == ()
    assert wire.shell("nft", "list", "ruleset") == texts[1]
    assert wire.shell("ipset", "list") == texts[2]
    assert "INITD" not in "".join(wire.shell(program) for program in SAVES[:2])


def test_sockets_of_the_warden_are_told_by_owner_not_by_mark(backend, wire):
    """NET_RAW is enough to set a mark, so no mark may open anything."""

    def marked():
        outcomes = []
        for mark in (1, 0x1D, 990, 0xFFFFFFFF):
            with as_user(SESSION):
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("=I", mark))
            try:
                sock.sendto(b"x", (UPSTREAM4, 53))
                outcomes.append("sent")
            except OSError as error:
                outcomes.append(error.errno)
        return outcomes

    assert wire.do(marked) == ["sent"] * 4, "negative control"
    wire.do(lambda: armed(backend) and None)
    wire.arrived()
    assert "sent" not in wire.do(marked)
    assert wire.arrived() == []
