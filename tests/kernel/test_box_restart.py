"""The warden may die at any moment: rules and connections stay, nothing opens, and soon all is as it was."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from tests.support import holding, product
from tests.support.attempts import attempt, attempt_all, client
from tests.support.https_server import Meta
from tests.support.zone import Entry

if TYPE_CHECKING:
    import subprocess

    from tests.support.box import Box, Session
    from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

BACK = 2.0  # seconds from SIGKILL until the next warden is armed, where a start takes no longer than one
UNLISTED = ("tcp", "203.0.113.20", 443)
LISTED = ("tcp", "203.0.113.10", 443)

# Asks the guard for names in turn, as fast as answers come, until input ends; prints how it went.
ASK = """
import json, select, socket, sys, time
names, answered, failed, longest = sys.argv[1:], 0, 0, 0.0
print("asking", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    name = names[(answered + failed) % len(names)]
    begin = time.monotonic()
    try:
        address = socket.getaddrinfo(name, 443, type=socket.SOCK_STREAM)[0][4]
        with socket.create_connection(address[:2], 2):
            answered += 1
    except OSError as error:
        failed += 1
        print("failed", name, error, file=sys.stderr)
    longest = max(longest, time.monotonic() - begin)
print(json.dumps({"answered": answered, "failed": failed, "longest": longest}))
"""


def kill_warden(box: Box) -> tuple[int, float]:
    """Its PID and when it was killed, in seconds since the epoch."""
    pid = box.pids()["warden"]
    os.kill(pid, signal.SIGKILL)
    return pid, time.time()


def armed_at(box: Box, generation: int) -> float:
    """When a warden said that it was armed, in seconds since the epoch; its log comes a moment later than its word."""
    until = time.monotonic() + 30
    while True:
        for event in box.logs().events:
            if event["event"] == "warden.armed" and event["generation"] == generation:
                return datetime.fromisoformat(event["timestamp"]).timestamp()
        assert time.monotonic() < until, box.logs().text
        time.sleep(0.05)


def learned(lab: Lab, backend: str) -> set[str]:
    """Addresses and ports in the kernel's learned sets."""
    found: set[str] = set()
    for version in "46":
        if backend == "nftables":
            text = lab.exec(["nft", "--stateless", "list", "set", "inet", "initd", f"initd{version}-learned"]).stdout
            found.update(re.findall(r"[0-9a-f.:]+ \. tcp \. \d+", text))
        else:
            text = lab.exec(["ipset", "list", f"initd{version}-learned"]).stdout
            found.update(re.findall(r"^\S+,tcp:\d+", text, re.MULTILINE))
    return found


def wait_for_questions(box: Box, more: int) -> None:
    """Until so many more than now have been asked."""
    have, until = box.status()["guard"]["queries"], time.monotonic() + 60
    while box.status()["guard"]["queries"] < have + more:
        assert time.monotonic() < until, "nobody asks"


def ended(session: Session) -> dict:
    out, _ = session.communicate(timeout=60)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("backend", ["xtables", "nftables"])
def test_killed_warden_leaves_everything_as_it_was(lab: Lab, backend: str) -> None:
    holding.let_ping(lab)
    box = lab.box(policy=holding.POLICY, env={"INITD_BACKEND": backend})
    start = box.start()
    holding.assert_holds(lab, box)
    talk = box.popen(client("talk", "site.example", "22"))
    assert talk.stdout is not None
    assert talk.stdout.readline() == b"open\n"
    rules, before, status = holding.rules(lab), learned(lab, backend), box.status()
    assert len(before) > 5

    pid, killed = kill_warden(box)
    assert holding.rules(lab) == rules
    assert learned(lab, backend) == before
    # Addresses only: there is nobody to ask for names.
    targets = [target for target in holding.TARGETS if target[0] == "tcp"]
    tried = attempt_all(box, [*targets, LISTED])
    assert holding.unrefused(targets, tried[:-1]) == {}
    assert tried[-1].error is None
    again = box.status()  # queues behind the socket that the keeper holds
    assert armed_at(box, 2) - killed < BACK * max(1.0, start)
    assert box.pids()["warden"] != pid
    assert again["generation"] == status["generation"] + 1
    assert again["policy"] == status["policy"]
    assert again["guard"]["leases"] == status["guard"]["leases"]
    assert holding.rules(lab) == rules
    assert learned(lab, backend) == before
    holding.assert_holds(lab, box)
    assert box.fwctl("health").returncode == 0
    assert talk.poll() is None, "the connection outlived the warden"
    talk.terminate()
    talk.communicate()


def test_the_check_sees_what_a_killed_warden_must_not_lose(lab: Lab) -> None:
    """Negative control: what is compared above does change when the rules go."""
    box = lab.box(policy=holding.POLICY)
    box.start()
    rules = holding.rules(lab)
    holding.flush(lab, box.status()["backend"])
    assert holding.rules(lab) != rules
    assert attempt(box, UNLISTED).error is None


def test_the_policy_in_force_survives_and_the_file_does_not_count(lab: Lab) -> None:
    """Nobody has asked for what is in the file since; a resumed warden must not read it."""
    box = lab.box(policy="site.example\nother.example\n")
    box.start()
    assert attempt(box, ("tcp", "other.example", 443)).error is None
    box.write_policy("site.example\n")
    assert box.fwctl("reload").returncode == 0
    box.write_policy("site.example\nother.example\nv4.example\n")
    kill_warden(box)  # at once: what was answered must have been written down
    assert box.status()["generation"] == 2
    names = ("site.example", "other.example", "203.0.113.20", "v4.example")
    tried = attempt_all(box, [("tcp", name, 443) for name in names])
    assert [one.error for one in tried] == [None, "EAI_NONAME", "ECONNREFUSED", "EAI_NONAME"]
    assert box.fwctl("reload").returncode == 0
    assert attempt(box, ("tcp", "other.example", 443)).error is None, "negative control: now somebody has asked"


def test_ranges_that_were_fetched_stay(lab: Lab) -> None:
    """GitHub's, while the next warden cannot fetch them again."""
    box = lab.box(policy="@github\n")
    box.start()
    static, rules = box.status()["rules"]["static"], holding.rules(lab)
    assert static > 0
    lab.web.meta(Meta.ERROR)
    kill_warden(box)
    assert box.status()["rules"]["static"] == static
    assert attempt(box, ("tcp", "192.0.2.100", 443)).error is None
    time.sleep(1.5)  # it tries to fetch them now
    assert box.status()["rules"]["static"] == static
    assert holding.rules(lab) == rules


def test_a_broken_file_does_not_stop_a_restart(lab: Lab) -> None:
    box = lab.box(policy=holding.POLICY)
    box.start()
    box.write_policy("*\n")
    kill_warden(box)
    assert box.status()["generation"] == 2
    assert attempt(box, ("tcp", "site.example", 443)).error is None


def test_what_was_learned_at_the_last_moment_can_still_be_revoked(lab: Lab) -> None:
    """An address in the kernel whose lease died with the warden before it was saved."""
    lab.dns.set("*.wild.example", {"A": "203.0.113.77"}, ttl=300)
    box = lab.box(policy=f"{holding.POLICY}*.wild.example\n")
    box.start()
    assert attempt(box, ("tcp", "a.wild.example", 443)).error is None
    kill_warden(box)
    assert box.status()["generation"] == 2
    assert attempt(box, ("tcp", "203.0.113.77", 443)).error is None, "no learned address is lost"
    box.write_policy(holding.POLICY)
    assert box.fwctl("reload").returncode == 0
    assert attempt(box, ("tcp", "203.0.113.77", 443)).error == "ECONNREFUSED"


def test_a_new_start_inherits_nothing(lab: Lab) -> None:
    """The namespace may outlive the box (a pod, a second start): what the last one learned is not this one's."""
    first = lab.box(policy="other.example\n10.9.9.9\n")
    first.start()
    assert attempt(first, ("tcp", "other.example", 443)).error is None
    assert first.stop().code == 0
    lab.clear()
    box = lab.box(policy=holding.POLICY)
    box.start()
    holding.assert_holds(lab, box)


def test_killed_under_query_load(lab: Lab) -> None:
    """Every client is answered again, no learned address is lost, nothing opens."""
    names = [f"n{number}.example" for number in range(40)]
    lab.dns.load([Entry(name, {"A": (f"203.0.113.{100 + number}",)}, ttl=1) for number, name in enumerate(names)])
    box = lab.box(policy="\n".join(names))
    box.start()
    backend = box.status()["backend"]
    before = learned(lab, backend)
    clients = [box.popen([str(product.PYTHON), "-I", "-c", ASK, *names[part::4]]) for part in range(4)]
    for one in clients:
        assert one.stdout is not None
        assert one.stdout.readline() == b"asking\n"
    for generation in (2, 3):
        wait_for_questions(box, 400)
        kill_warden(box)
        assert attempt(box, UNLISTED).error == "ECONNREFUSED"
        assert box.status()["generation"] == generation
        assert before <= learned(lab, backend)
    wait_for_questions(box, 400)
    for one in clients:
        told = ended(one)
        assert told["failed"] == 0, told
        assert told["answered"] > 20
        assert told["longest"] < 9.5, "glibc asks again after five seconds; twice would be ten"
    asked = {query.name for query in lab.dns.queries()}
    assert asked <= set(names), "and nothing unlisted was asked"


def talking(lab: Lab) -> tuple[Box, subprocess.Popen[bytes]]:
    """A box whose leases are short, and a connection in it to a name below a wildcard."""
    box = lab.box(policy="*.wild.example\n", env={"INITD_DNS_FLOOR": "1", "INITD_DNS_GRACE": "2"})
    box.start()
    talk = box.popen(client("talk", "a.wild.example", "22"))
    assert talk.stdout is not None
    assert talk.stdout.readline() == b"open\n"
    return box, talk


def test_a_connection_outlives_its_lease_and_nothing_else_does(lab: Lab) -> None:
    """Learned for TTL, floor and grace; kept while something is connected; refused after that."""
    lab.dns.set("*.wild.example", {"A": "203.0.113.77"}, ttl=1)
    lab.dns.set("unused.wild.example", {"A": "203.0.113.78"}, ttl=1)
    box, talk = talking(lab)
    used, unused = ("tcp", "203.0.113.77", 443), ("tcp", "203.0.113.78", 443)
    tried = attempt_all(box, [("tcp", "unused.wild.example", 443), unused])
    assert [one.error for one in tried] == [None, None], "while its lease lasts"
    time.sleep(6.0)
    assert attempt(box, unused).error == "ECONNREFUSED"
    assert talk.poll() is None, "the connection goes on"
    assert attempt(box, used).error is None, "a second one to the same address, which a client in use expects"
    talk.terminate()
    talk.communicate()
    assert attempt(box, ("tcp", "a.wild.example", 443)).error is None, "a new question opens it again"
    time.sleep(6.0)  # no polling: each try would be a connection that keeps the lease
    assert attempt(box, used).error == "ECONNREFUSED", "its lease is over"


def test_a_connection_that_outlives_its_lease_outlives_the_warden_too(lab: Lab) -> None:
    """Nobody asks for the name any more, so what was written down of its lease is old."""
    lab.dns.set("*.wild.example", {"A": "203.0.113.77"}, ttl=1)
    box, talk = talking(lab)
    time.sleep(7.0)
    kill_warden(box)
    time.sleep(BACK)
    box.write_policy("*.wild.example\nsite.example\n")
    said = json.loads(box.fwctl("reload", "--json").stdout)
    assert (said["added"], said["closed"]) == (["site.example"], [])
    assert talk.poll() is None
    talk.terminate()
    talk.communicate()
