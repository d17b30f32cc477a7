"""The soak itself, short; that it notices a broken box; and its judgement, case by case."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.soak import world
from tests.soak.figures import Figures, Sample
from tests.soak.report import table
from tests.soak.run import Plan, Soak
from tests.soak.schedule import LONG, events
from tests.soak.world import History, Spans
from tests.support.attempts import Attempt
from tests.support.dns_server import Logged
from tests.support.lab import ROOT
from tests.support.packets import Packet

if TYPE_CHECKING:
    from tests.support.lab import Lab

POOL0, POOL0_ADDRESS = world.POOL[0], "203.0.113.128"


# For real


@pytest.mark.kernel
@pytest.mark.slow
def test_two_minutes_without_a_problem(lab: Lab) -> None:
    """Seed 1 kills a warden straight after a reload, twice."""
    soak = Soak(Plan(seconds=110, seed=1), lab, say=print)
    soak.run()
    print(table(soak))
    assert not soak.told
    assert not soak.problems
    assert soak.counts["kill"] == 2
    assert soak.counts["listed"] > 50
    assert soak.counts["refused"] > 50
    assert soak.counts["packets"] > 500


@pytest.mark.kernel
@pytest.mark.slow
def test_a_box_without_rules_is_noticed(lab: Lab) -> None:
    """Negative control: somebody takes the rules away half-way."""

    def open_it(lab: Lab) -> None:
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            assert lab.exec([tool, "-F", "OUTPUT"]).returncode == 0

    soak = Soak(Plan(seconds=12, seed=1, backend="xtables", meddle=open_it), lab, say=print)
    soak.run()
    assert soak.problems["leak"]
    assert soak.problems["health"]
    assert any("unlisted" in line for line in soak.told), "seen on the wire, too"


@pytest.mark.kernel
@pytest.mark.slow
def test_a_box_without_dns_is_noticed(lab: Lab) -> None:
    """Negative control: nobody says that the resolvers lie, so the names that fail are false refusals."""

    def break_it(lab: Lab) -> None:
        lab.dns.remove(world.PORTS, *world.POOL)

    soak = Soak(Plan(seconds=24, seed=1, meddle=break_it), lab, say=print)
    soak.run()
    assert soak.problems["false refusal"]
    assert not soak.problems["leak"]


@pytest.mark.kernel
def test_interrupted_it_judges_what_was_run() -> None:
    argv = [sys.executable, "-m", "tests.soak", "--seconds", "600"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as soak:
        assert soak.stdout is not None
        for line in soak.stdout:
            if "sessions" in line:
                os.killpg(soak.pid, signal.SIGINT)  # as a terminal does: everybody gets it
                break
        rest, _ = soak.communicate(timeout=240)
    assert "(interrupted)" in rest
    assert "Traceback" not in rest
    assert soak.returncode == 130, rest


# The schedule


def test_a_seed_decides_everything() -> None:
    assert list(events(7, 300)) == list(events(7, 300))
    assert list(events(7, 300)) != list(events(8, 300))


def test_in_the_middle_of_a_long_run_no_warden_is_killed() -> None:
    kills = [event.at for event in events(7, LONG * 4) if event.kind == "kill"]
    assert kills
    assert not [at for at in kills if LONG < at < LONG * 3]
    assert all(later - earlier >= 60 for earlier, later in itertools.pairwise(kills))


# The judgement


def packet(dst: str, *, at: float = 50.0, proto: str = "tcp", dport: int = 443, kind: int = -1) -> Packet:
    return Packet(at, 6 if ":" in dst else 4, "198.51.100.2", dst, proto, 40000, dport, "S", kind)


@pytest.fixture
def history() -> History:
    """The first name of the pool is listed from 10 to 100, with reloads that take 2 s; rotation at 40."""
    made = History()
    made.listed({POOL0}, 10, done=False)
    made.listed({POOL0}, 12, done=True)
    made.listed(set(), 98, done=False)
    made.listed(set(), 100, done=True)
    made.give({"203.0.113.100"}, 0, among=("203.0.113.100", "203.0.113.101"))
    made.give({"203.0.113.101"}, 40, among=("203.0.113.100", "203.0.113.101"))
    return made


@pytest.mark.parametrize(
    "one",
    [
        packet("203.0.113.10"),
        packet("2001:db8:2::10", dport=80),
        packet("203.0.113.91", dport=8443),
        packet("203.0.113.70"),
        packet("203.0.113.53", proto="udp", dport=53),
        packet("203.0.113.53", proto="icmp", dport=0, kind=3),
        packet(POOL0_ADDRESS),
        packet(POOL0_ADDRESS, at=99),
        packet("203.0.113.100", at=99),
    ],
)
def test_no_leak(history: History, one: Packet) -> None:
    assert history.leak(one) is None


@pytest.mark.parametrize(
    "one",
    [
        packet("203.0.113.240"),
        packet("203.0.113.10", dport=8443),
        packet("203.0.113.10", proto="udp"),
        packet("203.0.113.91"),
        packet("203.0.113.70", dport=80),
        packet("203.0.113.80"),
        packet("203.0.113.53"),
        packet("203.0.113.54", proto="udp", dport=53),
        packet("203.0.113.53", proto="icmp", dport=0, kind=8),
        packet("169.254.169.254", dport=80),
        packet(POOL0_ADDRESS, at=9),
        packet(POOL0_ADDRESS, at=101),
        packet(POOL0_ADDRESS, dport=8443),
        packet("203.0.113.129"),
        packet("203.0.113.100", at=101),
        packet("203.0.113.102"),
    ],
)
def test_leak(history: History, one: Packet) -> None:
    assert history.leak(one)


def test_an_outage_prolongs_the_last_answer_and_no_older_one(history: History) -> None:
    for begin, end in ((38, 42), (70, 80)):
        history.dns_bad.begin(begin)
        history.dns_bad.end(end)
    assert history.leak(packet("203.0.113.100", at=169)) is None, "42 + 30, within which the next begins: 80 + 30 + 60"
    assert history.leak(packet("203.0.113.100", at=171))
    history.give({"203.0.113.102"}, 180, among=("203.0.113.101", "203.0.113.102"))
    history.dns_bad.begin(190)
    assert history.leak(packet("203.0.113.101", at=239)) is None
    assert history.leak(packet("203.0.113.101", at=241)), "there was time to ask again before the outage"


@pytest.mark.parametrize(
    ("name", "at", "leaks"),
    [
        (world.SITE, 1.0, False),
        ("h1.wild.example", 1.0, False),
        (world.WILD, 1.0, True),
        (POOL0, 50.0, False),
        (POOL0, 103.0, True),
        ("exfiltrated.attacker.example", 50.0, True),
    ],
)
def test_questions(history: History, name: str, at: float, *, leaks: bool) -> None:
    asked = Logged(at, name, "A", "udp", "198.51.100.2", "203.0.113.53")
    assert bool(history.leaked_question(asked)) == leaks


@pytest.mark.parametrize(
    ("name", "begin", "end", "expected"),
    [
        (POOL0, 13, 97, True),
        (POOL0, 11, 13, None),  # the reload may not have come so far
        (POOL0, 97, 99, None),
        (POOL0, 1, 9, False),
        (POOL0, 101, 102, False),
        (world.UNLISTED, 1, 2, False),
        (world.SITE, 1, 2, True),
    ],
)
def test_expectation(history: History, name: str, begin: float, end: float, expected: object) -> None:
    assert history.expected(("tcp", name, 443), begin, end) is expected


def test_while_no_resolver_works_only_refusals_are_judged(history: History) -> None:
    history.dns_bad.begin(20)
    history.dns_bad.end(30)
    for begin, end in ((19, 21), (25, 26), (29, 40), (35, 40)):
        assert history.expected(("tcp", POOL0, 443), begin, end) is None
        assert history.expected(("tcp", world.UNLISTED, 443), begin, end) is False
        assert history.expected(("tcp", world.IN_RANGE, 443), begin, end) is True
    assert history.expected(("tcp", POOL0, 443), 36.1, 40) is True


@pytest.mark.parametrize(
    ("name", "error", "wrong"),
    [
        (world.SITE, None, None),
        (world.SITE, "ECONNREFUSED", "refused although listed"),
        (world.SITE, "EAI_NONAME", "refused although listed"),
        (world.UNLISTED, "EAI_NONAME", None),
        (world.UNLISTED, None, "answered although not listed"),
    ],
)
def test_outcome(history: History, name: str, error: str | None, wrong: str | None) -> None:
    said = history.wrong(("tcp", name, 443), Attempt(error, None, 1.0), begin=50, end=51)
    assert (said is None) if wrong is None else (said is not None and said.startswith(wrong))


def test_spans() -> None:
    spans = Spans()
    assert not spans.touch(0, 9)
    spans.begin(1)
    spans.begin(2)
    assert spans.cover(1, 99)
    spans.end(5)
    spans.end(6)
    assert spans.cover(1, 5)
    assert not spans.cover(4, 5.1)
    assert spans.touch(5, 7)
    assert not spans.touch(5.1, 7)


# The figures


def life(rss: list[int], *, fds: int = 14, pid: int = 7) -> Figures:
    figures = Figures()
    figures.samples["warden"] = [Sample(2.0 * n, pid, value, fds) for n, value in enumerate(rss)]
    return figures


def test_a_plateau_is_flat_and_a_slope_is_not() -> None:
    flat, slope = (life([40_000 + n * each for n in range(100)]).trend("warden") for each in (10, 100))
    assert flat is not None
    assert slope is not None
    assert flat.flat
    assert not slope.flat


def test_the_longest_life_is_judged() -> None:
    figures = life([40_000] * 50)
    figures.samples["warden"] += [Sample(100 + 2.0 * n, 8, 60_000, 14) for n in range(80)]
    trend = figures.trend("warden")
    assert trend is not None
    assert trend.rss == (60_000, 60_000)


def test_more_descriptors_are_not_flat() -> None:
    figures = life([40_000] * 100)
    figures.samples["warden"] = [one._replace(fds=10 + n // 10) for n, one in enumerate(figures.samples["warden"])]
    trend = figures.trend("warden")
    assert trend is not None
    assert not trend.flat


def test_a_short_life_says_nothing() -> None:
    assert life([40_000] * 8).trend("warden") is None
