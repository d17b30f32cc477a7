"""The DNS guard of a whole box, on the real kernel: what a client can do with an answer, and what it cannot.

Each test holds its negative control: the same client, the same question, refused where the guard is not asked first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import holding, product
from tests.support.box import Box
from tests.support.lab import Lab
from tests.support.remote import RESOLVER4, RESOLVER6, SILENT4, THIRD4
from tests.support.zone import Entry, Fault

pytestmark = pytest.mark.kernel

CLIENT = Path(__file__).parents[1] / "support" / "box_client.py"
POLICY = """
site.example
v4.example
v6.example
rotating.example
fresh.example
chain.example
many.example
rebind.example
stray.example
*.wild.example
!no.wild.example
"""
ZONE = [
    Entry("rotating.example", {"A": tuple(f"203.0.113.{n}" for n in range(100, 160))}, ttl=1, pick=1),
    Entry("hasty.wild.example", {"A": tuple(f"192.0.2.{n}" for n in range(101, 221, 2))}, ttl=0, pick=1),
    Entry("fresh.example", {"A": ("203.0.113.90",)}, delay=0.1),
    Entry("chain.example", {"CNAME": ("one.cdn.invalid",)}),
    Entry("one.cdn.invalid", {"CNAME": ("two.cdn.invalid",)}),
    Entry("two.cdn.invalid", {"A": ("203.0.113.91",), "AAAA": ("2001:db8:2::91",)}),
    Entry("many.example", {"A": tuple(f"192.0.2.{n}" for n in range(2, 242, 2))}),
    Entry("rebind.example", {"A": ("203.0.113.92", "10.9.9.9", "169.254.169.254", "127.0.0.1", "100.64.9.9")}),
    Entry(
        "rebind6.wild.example", {"AAAA": ("fd00:9::9", "::ffff:203.0.113.93", "64:ff9b::cb00:715d", "::1", "fe80::1")}
    ),
    Entry("stray.example", {"A": ("203.0.113.94",)}, stray=(("other.example", "A", "203.0.113.95"),)),
    Entry("evil.example", {"A": ("203.0.113.66",), "TXT": ('"secret"',)}),
    Entry("short.wild.example", {"A": ("203.0.113.96",)}, ttl=0),
    *(Entry(f"ttl{n}.wild.example", {"A": (f"203.0.113.{70 + n}",)}, ttl=n) for n in (0, 1, 5)),
]


def run(box: Box, *words: str, timeout: float = 60.0):
    """One command of the client in the box, as the session user; what it printed."""
    done = box.exec([str(product.PYTHON), "-S", str(CLIENT), *words], timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(box: Box, *questions: str):
    """Each "name/type[/server[/transport[/timeout]]]": (rcode or error, addresses, seconds)."""
    defaults = ("", "1", "127.0.0.1", "udp", "5")
    whole = ["/".join([*(parts := one.split("/")), *defaults[len(parts) :]]) for one in questions]
    return [tuple(one) for one in run(box, "many", *whole)]


def connects(box: Box, *targets: str) -> list[str]:
    return run(box, "connects", *targets)


@contextlib.contextmanager
def listing(box: Box, more: str) -> Iterator[None]:
    """The box with `more` listed as well, for as long as it takes."""
    try:
        for text in (POLICY + more, POLICY):
            box.write_policy(text)
            assert box.fwctl("reload").returncode == 0
            if text != POLICY:
                yield
    finally:
        box.write_policy(POLICY)


@pytest.fixture(scope="module", params=["xtables", "nftables"])
def whole(request: pytest.FixtureRequest) -> Iterator[tuple[Lab, Box]]:
    """One box for the tests that only look; each backend in a lab of its own, because rules outlive their box.

    Its leases are long: what the guard asks by itself to keep them would come into the account of some test.
    """
    with Lab() as lab:
        lab.dns.load(ZONE)
        box = lab.box(policy=POLICY, env={"INITD_BACKEND": request.param, "INITD_DNS_FLOOR": "3600"})
        box.start()
        yield lab, box


@pytest.fixture
def guarded(whole: tuple[Lab, Box]) -> tuple[Lab, Box]:
    lab, box = whole
    lab.clear()
    return lab, box


class TestBeforeTheAnswer:
    def test_ten_thousand_connects_to_a_rotating_name_never_fail(self, guarded):
        lab, box = guarded
        assert connects(box, "203.0.113.161/443", "192.0.2.251/443") == ["ConnectionRefusedError"] * 2
        hasty = run(box, "chase", "hasty.wild.example", "4000", timeout=300)
        slow = run(box, "chase", "rotating.example", "6000", timeout=300)
        assert (hasty["failures"], slow["failures"]) == (0, 0), (hasty, slow)
        assert hasty["addresses"] == 60
        assert slow["addresses"] >= 2  # TTL 1: one address a second
        assert len(lab.dns.queries("hasty.wild.example")) >= 4000  # TTL 0: every one a new answer

    def test_fifty_clients_of_a_never_seen_name_all_get_through(self, guarded):
        lab, box = guarded
        lab.dns.set("crowd.wild.example", {"A": "203.0.113.97"}, delay=0.15)
        assert connects(box, "203.0.113.97/443") == ["ConnectionRefusedError"]
        assert run(box, "crowd", "crowd.wild.example", "50") == ["ok"] * 50
        assert len(lab.dns.queries("crowd.wild.example")) == 1

    def test_that_client_notices_an_address_that_is_not_there_yet(self, guarded):
        """Negative control: somebody takes what was learned out again, all the time."""
        lab, box = guarded
        nft = box.status()["backend"] == "nftables"
        flush = ["nft", "flush", "set", "inet", "initd"] if nft else ["ipset", "flush"]
        argv = [str(product.PYTHON), "-S", str(CLIENT), "chase", "hasty.wild.example", "400"]
        failures = 0
        for _ in range(10):  # the moment between an answer and its connect may be missed
            with box.popen(argv) as client:
                while client.poll() is None:
                    assert lab.exec([*flush, "initd4-learned"]).returncode == 0
                assert client.stdout is not None
                failures += json.loads(client.stdout.read())["failures"]
            if failures:
                break
        assert failures
        assert box.fwctl("reload").returncode == 0  # what is cached is put into the set again


SERVERS = (RESOLVER4, RESOLVER6, THIRD4, "203.0.113.10", "192.0.2.99")


class TestNothingElseGetsOut:
    NAMES = (
        "evil.example", "EVIL.example", "payload.site.example.evil.example", "www.site.example", "no.wild.example",
        "a.no.wild.example", ".".join(["x" * 60] * 4), "1.113.0.203.in-addr.arpa", "_dns.resolver.arpa", "com",
    )  # fmt: skip

    def test_the_unlisted_is_refused_here_whatever_it_is_asked_as(self, guarded):
        lab, box = guarded
        ways = (("127.0.0.1", "udp"), ("::1", "udp"), ("127.0.0.1", "tcp"), ("::1", "tcp"))
        kinds = (1, 28, 16, 15, 255, 10, 33, 12, 65, 5, 6, 2, 48, 65399)
        questions = list(itertools.product(self.NAMES, kinds, ways))
        answers = ask(box, *(f"{name}/{kind}/{server}/{transport}" for name, kind, (server, transport) in questions))
        assert {rcode for rcode, _, _ in answers} <= {0, 3}
        assert all(not found for _, found, _ in answers)
        took: dict[object, list[float]] = {}
        for question, (_, _, seconds) in zip(questions, answers, strict=True):
            for part in question:
                took.setdefault(part, []).append(seconds)
        # No name, type or way in is slow; single ones are, on a machine that is busy elsewhere.
        assert {part: times for part, times in took.items() if statistics.median(times) >= 0.02} == {}
        assert lab.dns.queries() == []
        assert lab.packets() == []
        lab.dns.set("control.wild.example", {"A": "203.0.113.98"})
        assert ask(box, "control.wild.example/1")[0][0] == 0
        assert [query.name for query in lab.dns.queries()] == ["control.wild.example"]

    def test_the_same_questions_go_upstream_once_they_are_listed(self, guarded):
        """Negative control."""
        lab, box = guarded
        with listing(box, "evil.example\n*.evil.example\nwww.site.example\n"):
            ask(box, *(f"{name}/1" for name in self.NAMES))
            asked = {query.name.lower() for query in lab.dns.queries()}
        assert asked == {"evil.example", "payload.site.example.evil.example", "www.site.example"}
        assert lab.packets()

    def test_no_other_server_can_be_asked_not_even_an_upstream(self, guarded):
        lab, box = guarded
        answers = ask(box, *(f"site.example/1/{one}/{how}/0.5" for one in SERVERS for how in ("udp", "tcp")))
        assert not any(isinstance(rcode, int) for rcode, _, _ in answers), answers
        assert all(seconds < 0.4 for _, _, seconds in answers), "nobody waits for an answer"
        assert set(connects(box, *(f"{one}/853" for one in SERVERS))) == {"ConnectionRefusedError"}
        assert lab.dns.queries() == []
        assert lab.packets() == []

    @pytest.mark.parametrize("how", ["udp", "tcp"])
    def test_the_port_of_a_question_that_the_warden_just_asked_opens_nothing(self, guarded, how):
        lab, box = guarded
        name = f"{how}{os.urandom(3).hex()}.wild.example"
        lab.dns.set(name, {"A": "203.0.113.87"}, ttl=0, fault=Fault.TRUNCATED if how == "tcp" else None)
        assert ask(box, f"{name}/1")[0][0] == 0
        flows = lab.exec(["conntrack", "-L", "-p", how, "--dport", "53", "-d", RESOLVER4]).stdout
        ports = re.findall(r"sport=(\d+) dport=53", flows)
        assert ports, "the control: connection tracking still knows the warden's flow"
        lab.clear()
        assert set(run(box, "ride", RESOLVER4, how, *ports)) <= {"PermissionError", "OSError", "ConnectionRefusedError"}
        assert lab.dns.queries() == []
        assert lab.packets() == []

    def test_broken_queries_leak_nothing(self, guarded):
        lab, box = guarded
        assert run(box, "mutate", "7", "20000")["answered"] > 200
        assert ask(box, "site.example/1")[0][0] == 0
        assert {query.name for query in lab.dns.queries()} <= {"site.example"}
        assert not [event for event in box.logs().events if event["event"] == "dns.bug"]


class TestSpecialAddresses:
    def test_they_are_stripped_logged_and_not_learned(self, guarded):
        lab, box = guarded
        (four, six) = ask(box, "rebind.example/1", "rebind6.wild.example/28")
        assert four[1] == ["203.0.113.92"]
        assert six[:2] == (0, [])
        assert connects(box, "203.0.113.92/443") == ["ok"]  # the control: what is left works
        lab.clear()
        assert (
            connects(box, "10.9.9.9/443", "169.254.169.254/80", "100.64.9.9/443", "fd00:9::9/443")
            == ["ConnectionRefusedError"] * 4
        )
        assert lab.packets() == []
        stripped = [event for event in box.logs().events if event["event"] == "dns.stripped"]
        assert {"10.9.9.9", "169.254.169.254", "127.0.0.1", "100.64.9.9"} <= {
            a for e in stripped for a in e["addresses"]
        }

    def test_a_stray_record_is_not_learned(self, guarded):
        _, box = guarded
        assert ask(box, "stray.example/1")[0][1] == ["203.0.113.94"]
        assert connects(box, "203.0.113.94/443", "203.0.113.95/443") == ["ok", "ConnectionRefusedError"]

    def test_both_are_let_through_once_they_are_listed(self, guarded):
        """Negative control."""
        lab, box = guarded
        lab.dns.set("other.example", {"A": "203.0.113.95"})
        with listing(box, "10.9.9.9\nother.example\n"):
            assert set(ask(box, "rebind.example/1")[0][1]) == {"203.0.113.92", "10.9.9.9"}
            assert ask(box, "other.example/1")[0][1] == ["203.0.113.95"]
            assert connects(box, "10.9.9.9/443", "203.0.113.95/443") == ["ok"] * 2


class TestUpstream:
    @pytest.mark.parametrize(
        "fault",
        [
            Fault.SILENT, Fault.SERVFAIL, Fault.REFUSED, Fault.GARBAGE, Fault.CUT, Fault.WRONG_ID, Fault.WRONG_QUESTION,
            Fault.SPOOFED, Fault.TRUNCATED_DEAD,
        ],
    )  # fmt: skip
    def test_a_faulty_server_costs_bounded_time_and_then_it_recovers(self, guarded, fault):
        lab, box = guarded
        took = []
        while not took or (min(took) >= 3.0 and len(took) < 4):  # 2.8 s: a busy machine may not run us for the rest
            name = f"{fault.value}{os.urandom(3).hex()}.wild.example"
            lab.dns.set(name, {"A": "203.0.113.99"})
            lab.dns.server(RESOLVER4, fault=fault)
            try:
                (rcode, found, seconds) = ask(box, f"{name}/1/127.0.0.1/udp/20")[0]
                assert (rcode, found) == (2, [])
                took.append(seconds)
            finally:
                lab.dns.server(RESOLVER4)
        assert min(took) < 3.0
        assert ask(box, f"{name}/1")[0][:2] == (0, ["203.0.113.99"])
        assert connects(box, "203.0.113.99/443") == ["ok"]

    def test_truncated_answers_come_over_tcp(self, guarded):
        lab, box = guarded
        name = f"tc{os.urandom(3).hex()}.wild.example"
        lab.dns.set(name, {"A": "203.0.113.88"}, fault=Fault.TRUNCATED)
        assert ask(box, f"{name}/1")[0][:2] == (0, ["203.0.113.88"])
        assert {query.transport for query in lab.dns.queries(name)} == {"udp", "tcp"}


class TestTime:
    def test_short_lived_answers_are_usable(self, guarded):
        _, box = guarded
        for ttl in (0, 1, 5):
            assert connects(box, f"203.0.113.{70 + ttl}/443") == ["ConnectionRefusedError"]
            assert ask(box, f"ttl{ttl}.wild.example/1")[0][1] == [f"203.0.113.{70 + ttl}"]
        time.sleep(6)  # longer than every TTL
        assert connects(box, *(f"203.0.113.{70 + ttl}/443" for ttl in (0, 1, 5))) == ["ok"] * 3

    @pytest.mark.slow
    def test_an_open_connection_outlives_its_lease_and_afterwards_a_new_one_is_refused(self, lab: Lab):
        lab.dns.load(ZONE)
        box = lab.box(policy="*.wild.example:443,5000\n", env={"INITD_DNS_FLOOR": "1", "INITD_DNS_GRACE": "12"})
        box.start()
        assert ask(box, "short.wild.example/1")[0][0] == 0
        argv = [str(product.PYTHON), "-S", str(CLIENT), "hold", "203.0.113.96", "5000"]
        with box.popen(argv) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            assert json.loads(client.stdout.readline()) == "open"
            time.sleep(20)  # the lease alone would have ended after 13
            client.stdin.write(b"still\n")
            assert json.loads(client.stdout.readline()) == "still\n"
            assert connects(box, "203.0.113.96/443") == ["ok"]
            client.kill()
        until = time.monotonic() + 40
        while connects(box, "203.0.113.96/443") == ["ok"]:
            assert time.monotonic() < until, "the address stayed open"
            time.sleep(1)
        assert ask(box, "short.wild.example/1")[0][0] == 0
        assert connects(box, "203.0.113.96/443") == ["ok"]


class TestSetTrouble:
    def test_a_full_set_is_servfail_and_it_recovers(self, lab: Lab):
        names = {f"full{n}.wild.example": f"192.0.2.{n}" for n in range(2, 62)}
        lab.dns.load([*ZONE, *(Entry(name, {"A": (address,)}) for name, address in names.items())])
        box = lab.box(policy=POLICY, env={"INITD_BACKEND": "xtables"})
        box.start()
        fill(lab)
        answers = ask(box, *(f"{name}/1" for name in names))
        # A hash that is full in one region may take an element in another; what counts is that each answer is true.
        outcomes = connects(box, *(f"{address}/443" for address in names.values()))
        for (rcode, found, _), outcome, address in zip(answers, outcomes, names.values(), strict=True):
            assert (rcode, found, outcome) in [(0, [address], "ok"), (2, [], "ConnectionRefusedError")]
        assert [rcode for rcode, _, _ in answers].count(2) >= 10
        assert [event for event in box.logs().events if event["event"] == "dns.set"]
        assert lab.exec(["ipset", "flush", "initd4-learned"]).returncode == 0
        until = time.monotonic() + 60  # answers from the cache are put into the set again every 10 s
        while True:
            assert {rcode for rcode, _, _ in ask(box, *(f"{name}/1" for name in names))} == {0}
            if set(connects(box, *(f"{address}/443" for address in names.values()))) == {"ok"}:
                break
            assert time.monotonic() < until
            time.sleep(1)


def fill(lab: Lab) -> None:
    """Put strangers into the learned set until it takes no more in most of its regions."""
    most = int(lab.exec(["ipset", "list", "-t", "initd4-learned"]).stdout.partition("maxelem ")[2].split()[0])
    lines = [
        f"add initd4-learned 198.18.{n >> 8 & 255}.{n & 255},tcp:{1 + (n >> 16)} timeout 300" for n in range(2 * most)
    ]
    refused = 0
    while lines and refused < 400:
        done = subprocess.run(
            ["ip", "netns", "exec", lab.netns, "ipset", "restore", "-!"],
            input="\n".join(lines) + "\n",
            text=True,
            capture_output=True,
            check=False,
        )
        assert "full" in done.stderr, done.stderr
        refused += 1
        del lines[: int(re.findall(r"line (\d+)", done.stderr)[0])]


class TestWardenKilled:
    def test_every_client_is_answered_again_and_nothing_is_lost_or_opened(self, guarded):
        lab, box = guarded
        before = ask(box, "site.example/1", "hasty.wild.example/1", "chain.example/1")
        clients = [
            box.popen([str(product.PYTHON), "-S", str(CLIENT), "load", name, "6"])
            for name in ("site.example", "hasty.wild.example", "chain.example", "v4.example")
        ]
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == b"begun\n"
        time.sleep(1)
        os.kill(box.pids()["warden"], signal.SIGKILL)
        learned = [f"{found[0]}/443" for _, found, _ in before]
        assert connects(box, *learned) == ["ok"] * 3  # at once, without a warden
        assert connects(box, "203.0.113.66/443") == ["ConnectionRefusedError"]
        for client in clients:
            result = json.loads(client.communicate(timeout=90)[0])
            assert result["longest"] < 8, result  # under two seconds on an idle machine
            assert result["answers"] > 100, result
        assert connects(box, *learned, "203.0.113.66/443") == ["ok"] * 3 + ["ConnectionRefusedError"]
        assert [query for query in lab.dns.queries() if query.name == "evil.example"] == []
        assert ask(box, "evil.example/1")[0][0] == 3


class TestWithoutTheRules:
    def test_the_same_attempts_get_out(self, guarded):
        """Last of those that share the box, which it leaves open: the negative control of who may be asked."""
        lab, box = guarded
        holding.flush(lab, box.status()["backend"])
        servers = SERVERS[:3]
        answers = ask(box, *(f"site.example/1/{one}/{how}/5" for one in servers for how in ("udp", "tcp")))
        assert {rcode for rcode, _, _ in answers} == {0}
        assert {query.server for query in lab.dns.queries()} == set(servers)
        for how in ("udp", "tcp"):
            lab.clear()
            run(box, "ride", RESOLVER4, how, *map(str, range(40000, 40008)))  # one may be taken
            assert lab.packets(to=RESOLVER4, port=53, proto=how)


class TestResolvConf:
    def test_it_is_pointed_here_put_right_and_restored(self, lab: Lab):
        text = f"# mine\nnameserver {RESOLVER4}\nnameserver {SILENT4}\nsearch corp.example\noptions ndots:2\n"
        box = lab.box(policy=POLICY, resolv_conf=text)
        box.start()
        now = box.read("/etc/resolv.conf")
        lines = [line for line in now.splitlines() if not line.startswith("#")]
        assert lines == ["nameserver 127.0.0.1", "search corp.example", "options ndots:2"]
        assert box.exec(["getent", "ahosts", "site.example"]).returncode == 0
        (box.directory / "etc" / "resolv.conf").write_text(f"nameserver {THIRD4}\nsearch other.example\n")
        until = time.monotonic() + 60
        while [one["server"] for one in box.status()["guard"]["upstreams"]] != [THIRD4]:
            assert time.monotonic() < until, "the new one is not asked"
            time.sleep(0.5)
        assert "nameserver 127.0.0.1\n" in box.read("/etc/resolv.conf")
        lab.clear()
        assert ask(box, "v4.example/1")[0][0] == 0
        assert ask(box, "late.wild.example/1")[0][0] == 3
        assert {query.server for query in lab.dns.queries("late.wild.example")} == {THIRD4}
        assert box.stop().code == 0
        assert (box.directory / "etc" / "resolv.conf").read_text() == f"nameserver {THIRD4}\nsearch other.example\n"
