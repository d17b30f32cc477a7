"""Audit mode lets through and records, loudly and for a time; special ranges and exceptions stay shut."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from datetime import datetime

import pytest

from tests.support import holding
from tests.support.attempts import attempt_all, client
from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

POLICY = "site.example\n!bad.example\n"
OPENED = [("tcp", "203.0.113.99", 443), ("tcp", "other.example", 443), ("tcp", "2001:db8:2::9", 443)]
SHUT = [
    ("tcp", "169.254.169.254", 80),
    ("tcp", "10.9.9.9", 443),
    ("tcp", "203.0.113.53", 53),
    ("tcp", "x.bad.example", 443),
]
LOUD = "NOTHING IS ENFORCED"


BACKENDS = ["nftables", "xtables"]


@pytest.fixture(scope="module", params=BACKENDS)
def place(request):
    with Lab() as lab:
        holding.let_ping(lab)
        lab.dns.set("site.example", {"A": "203.0.113.7"}, ttl=60)
        lab.dns.set("other.example", {"A": "203.0.113.8"}, ttl=60)
        lab.dns.set("x.bad.example", {"A": "203.0.113.9"}, ttl=60)
        lab.dns.set("rebind.example", {"A": "10.9.9.9"}, ttl=60)
        box = lab.box(policy=POLICY, env={"INITD_BACKEND": request.param})
        box.start()
        yield box


@pytest.fixture
def box(place):
    """Enforcing, before and after."""
    assert place.fwctl("audit", "--off").returncode == 0
    yield place
    place.fwctl("audit", "--off")


def open_ones(box, targets) -> list[bool]:
    return [one.error is None for one in attempt_all(box, targets)]


def answer(box, *words: str, code: int = 0):
    done = box.fwctl(*words, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def wait_for(what, seconds: float) -> float:
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)
    return time.monotonic() - begin


def logged(box, event: str) -> float:
    """When the log had an event last, in seconds since the epoch."""
    times = [one["timestamp"] for one in box.logs().events if one["event"] == event]
    return datetime.fromisoformat(times[-1]).timestamp()


def test_what_is_unlisted_is_let_through_and_recorded(box):
    assert not any(open_ones(box, OPENED + SHUT)), "negative control"
    answer(box, "audit", "--for", "1m")
    assert open_ones(box, OPENED) == [True] * 3
    assert open_ones(box, SHUT) == [False] * 4
    assert not open_ones(box, [("tcp", "rebind.example", 443)])[0]
    rows = [one for one in answer(box, "log")["rows"] if one["allowed"]]
    told = {(one["kind"], one["subject"], one["port"]) for one in rows}
    assert {
        ("name", "other.example", None),
        ("connection", "other.example", 443),
        ("connection", "203.0.113.99", 443),
        ("connection", "2001:db8:2::9", 443),
    } <= told
    assert not any("169.254" in subject or "bad" in subject or port == 53 for _, subject, port in told)
    lines = [one["line"] for one in answer(box, "suggest")["lines"]]
    assert "other.example:443" in lines


def test_leaving_closes_what_was_let_through_and_shuts_the_rest(box):
    box.fwctl("audit", "--for", "1m")
    talk = box.popen(client("talk", "other.example", "7"))
    assert talk.stdout.readline() == b"open\n"
    closed = answer(box, "audit", "--off")["closed"]
    assert [one.split()[0] for one in closed] == ["other.example"]
    assert json.loads(talk.stdout.read())["error"] is not None
    talk.communicate()
    assert not any(open_ones(box, OPENED + SHUT))
    assert open_ones(box, [("tcp", "site.example", 443)]) == [True]


def test_leaving_ends_what_is_neither_tcp_nor_udp(box):
    """A ping that goes on is one flow for connection tracking, which no rule would judge again."""
    box.fwctl("audit", "--for", "1m")
    ping = box.popen(client("talk", "203.0.113.99", "0", "icmp"))
    assert ping.stdout.readline() == b"open\n", "negative control"
    assert "203.0.113.99, protocol 1" in answer(box, "audit", "--off")["closed"]
    assert json.loads(ping.stdout.read())["error"] == "EPERM"
    ping.communicate()


def test_every_command_is_loud_and_none_is_afterwards(box):
    commands = (
        ["status"],
        ["health"],
        ["test", "site.example"],
        ["why", "site.example"],
        ["log"],
        ["verify"],
        ["reload"],
    )
    box.fwctl("audit", "--for", "1m")
    for command in commands:
        assert LOUD in box.fwctl(*command).stderr, command
    assert box.fwctl("status").stdout.startswith("AUDIT MODE")
    assert LOUD in box.fwctl("health").stdout
    status = box.status()
    assert (status["mode"], status["warnings"][0][:10]) == ("audit", "AUDIT MODE")
    assert LOUD in box.read("/run/initd/policy.txt")
    assert "initd_enforcing 0" in box.fwctl("metrics").stdout
    box.fwctl("audit", "--off")
    for command in commands:
        assert LOUD not in box.fwctl(*command).stderr + box.fwctl(*command).stdout, command
    assert LOUD not in box.read("/run/initd/policy.txt")


def test_only_root_may(box):
    for words in (["--for", "1m"], ["--off"]):
        done = box.fwctl("audit", *words, user="session")
        assert (done.returncode, "only root" in done.stderr) == (77, True)
    assert box.fwctl("audit", user="session").returncode == 0
    assert box.status()["mode"] == "enforce"
    for wrong in ("0s", "25h", "5", "-1m", "ever"):
        assert box.fwctl("audit", f"--for={wrong}").returncode == 64
    assert box.status()["mode"] == "enforce"
    assert box.fwctl("audit", "--for", "1m").returncode == 0, "negative control"
    assert box.status()["mode"] == "audit"


def test_it_ends_by_itself_on_time_though_the_warden_is_killed(box):
    for seconds in (3, 12):  # a busy machine may not have looked before it is over
        begin = time.monotonic()
        box.fwctl("audit", "--for", f"{seconds}s")
        generation = box.status()["generation"]
        os.kill(box.pids()["warden"], signal.SIGKILL)
        wait_for(lambda generation=generation: box.status()["generation"] > generation, 30)
        audit, opened = box.status().get("audit"), open_ones(box, OPENED[:1])
        if time.monotonic() < begin + seconds:
            break
    assert audit["seconds_left"] < seconds
    assert opened == [True], "negative control: it goes on until then"
    wait_for(lambda: box.status()["mode"] == "enforce", 60)
    wait_for(lambda: not any(open_ones(box, OPENED)), 60)
    assert time.monotonic() - begin > seconds - 0.1
    wait_for(lambda: logged(box, "audit.ended") > logged(box, "audit.entered"), 60)
    assert logged(box, "audit.ended") - logged(box, "audit.entered") < seconds + 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_ends_it_when_nobody_else_can(lab, backend):
    box = lab.box(policy="", env={"INITD_BACKEND": backend})
    box.start()
    box.fwctl("audit", "--for", "8s")
    pids = box.pids()
    for name in ("keeper", "warden"):
        os.kill(pids[name], signal.SIGKILL)
    assert open_ones(box, OPENED[::2]) == [True] * 2, "negative control: it goes on until then"
    time.sleep(8)
    assert not any(open_ones(box, OPENED[::2]))


def test_what_it_let_through_ends_also_when_the_warden_was_away_at_its_end(lab):
    box = lab.box(policy="")
    box.start()
    box.fwctl("audit", "--for", "5s")
    end = time.monotonic() + 5.1
    talk = box.popen(client("talk", "203.0.113.99", "7"))
    assert talk.stdout.readline() == b"open\n", "negative control"
    while time.monotonic() < end:
        with contextlib.suppress(KeyError, ProcessLookupError):
            os.kill(box.pids()["warden"], signal.SIGKILL)
        time.sleep(0.05)
    wait_for(lambda: box.fwctl("status").returncode == 0, 60)
    assert json.loads(talk.communicate(timeout=60)[0])["error"] is not None


def test_what_stays_shut_in_it_would_answer(box):
    """Negative control, and the last with this box: without the rules, and without the exception."""
    answer(box, "audit", "--for", "1m")
    assert open_ones(box, SHUT) == [False] * 4
    box.write_policy("site.example\n")
    assert box.fwctl("reload").returncode == 0
    flush = "nft delete table inet initd || iptables-legacy -F INITD-OUTPUT"
    assert box.exec(["sh", "-c", flush], user="root").returncode == 0
    assert open_ones(box, SHUT) == [True] * 4


def test_a_box_may_start_in_it_and_can_leave_it(lab):
    lab.dns.set("site.example", {"A": "203.0.113.7"}, ttl=60)
    box = lab.box(policy="site.example\n", env={"INITD_MODE": "audit"})
    box.start()
    status = box.status()
    assert (status["mode"], status["audit"]["seconds_left"]) == ("audit", None)
    assert open_ones(box, OPENED[:1]) == [True]
    assert any(event.get("event") == "box.warning" and "AUDIT" in event["text"] for event in box.logs().events)
    box.fwctl("audit", "--off")
    os.kill(box.pids()["warden"], signal.SIGKILL)
    wait_for(lambda: box.fwctl("status").returncode == 0 and box.status()["generation"] == 2, 60)
    assert box.status()["mode"] == "enforce"
    assert not any(open_ones(box, OPENED))
