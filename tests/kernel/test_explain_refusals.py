"""What was refused is explained: by whom, why, and which line would allow it. On both backends, with real refusals."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections import Counter

import pytest

from initd import narrative, recorder
from initd.core.policy import dump, parse
from tests.support import product
from tests.support.attempts import attempt_all
from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

POLICY = "site.example\n!bad.example\ncorp.example\n"
REFUSED = [
    ("tcp", "203.0.113.99", 443),
    ("tcp", "site.example", 8443),
    ("tcp", "evil.example", 443),
    ("tcp", "x.bad.example", 443),
    ("udp", "203.0.113.98", 123),
    ("udp", "203.0.113.98", 53),
    ("tcp", "169.254.169.254", 80),
    ("tcp", "2001:db8:2::9", 443),
]

FORGED = """
import socket
name = bytes.fromhex("09610a6e65770a1b5b32046576696c00")  # "a\\nnew\\n\\x1b[2", "evil"
query = bytes.fromhex("000101000001000000000000") + name + bytes.fromhex("00010001")
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(query, ("127.0.0.1", 53))
"""

# Asks for unlisted names under a command line of emoji, each of which is twelve bytes in JSON.
WORDY = """
import socket, time
for number in range(40):
    name = b"wordy%d" % number
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 53))
        sock.send(bytes.fromhex("000101000001000000000000") + bytes([len(name)]) + name + bytes.fromhex("0000010001"))
        sock.recv(512)
    time.sleep(0.06)  # below the guard's twenty looks a second
"""


@pytest.fixture(scope="module", params=["nftables", "xtables"])
def told(request):
    """A box in which all of `REFUSED` was tried."""
    with Lab() as lab:
        lab.dns.set("site.example", {"A": "203.0.113.7"}, ttl=60)
        lab.dns.set("corp.example", {"A": "10.9.8.7"}, ttl=60)
        box = lab.box(
            policy=POLICY, env={"INITD_BACKEND": request.param, "INITD_METRICS_FILE": "/run/initd/initd.prom"}
        )
        box.start()
        outcomes = attempt_all(box, [*REFUSED, ("tcp", "site.example", 443)])
        assert all(one.error for one in outcomes[:-1])
        assert outcomes[-1].error is None, "negative control: what is listed is reached"
        yield box


def answer(box, *words: str, user: str = "session", code: int = 0):
    done = box.fwctl(*words, "--json", user=user)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def text(box, *words: str, code: int = 0) -> str:
    done = box.fwctl(*words, user="session")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_every_refusal_is_a_row_and_nothing_else_is(told):
    rows = answer(told, "log")["rows"]
    assert {(one["kind"], one["subject"], one["port"], one["proto"], one["reason"]) for one in rows} == {
        ("connection", "203.0.113.99", 443, "tcp", "unlisted"),
        ("connection", "site.example", 8443, "tcp", "port"),
        ("name", "evil.example", None, "AAAA", "unlisted"),
        ("name", "x.bad.example", None, "AAAA", "denied"),
        ("connection", "203.0.113.98", 123, "udp", "unlisted"),
        ("connection", "203.0.113.98", 53, "udp", "unlisted"),
        ("name", "corp.example", None, "A", "special"),
        ("connection", "169.254.169.254", 80, "tcp", "special"),
        ("connection", "2001:db8:2::9", 443, "tcp", "unlisted"),
    }
    assert {one["actor"]["uid"] for one in rows if one["subject"] != "corp.example"} == {501}
    assert all(one["subject"] != "site.example" or one["port"] == 8443 for one in rows)


def test_who_asked_for_a_name_is_known(told):
    (row,) = (one for one in answer(told, "log")["rows"] if one["subject"] == "evil.example")
    assert row["actor"]["user"] == "claude"
    assert "/lab/client.py attempts" in row["actor"]["command"]


def test_with_another_process_about_nobody_is_accused(told):
    other = told.popen(["sh", "-c", "echo; exec sleep 60"])
    try:
        other.stdout.readline()
        told.exec(["sh", "-c", "exec getent hosts two.example"])
    finally:
        other.terminate()
        other.communicate()
    (row,) = (one for one in answer(told, "log")["rows"] if one["subject"] == "two.example")
    assert (row["actor"]["uid"], row["actor"]["pid"], row["actor"]["command"]) == (501, None, None)


def test_of_several_processes_the_session_is_known_when_there_is_but_one(told):
    told.exec(["setsid", "sh", "-c", "getent hosts three.example; true"])
    (row,) = (one for one in answer(told, "log")["rows"] if one["subject"] == "three.example")
    assert (row["actor"]["uid"], row["actor"]["pid"]) == (501, None)
    assert row["actor"]["session"]["command"] == "sh -c getent hosts three.example; true"


def test_a_verification_is_nobodys_refusal(told):
    before = answer(told, "log")["rows"]
    assert told.fwctl("verify").returncode == 0
    assert answer(told, "log")["rows"] == before


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("evil.example", "evil.example:443"),
        ("https://evil.example/path", "evil.example:443"),
        ("evil.example:22", "evil.example:22"),
        ("site.example", "site.example:8443"),
        ("203.0.113.98:123/udp", "203.0.113.98:123/udp"),
        ("203.0.113.98:53/udp", None),
        ("corp.example", "10.9.8.7:443"),
        ("corp.example:22", "10.9.8.7:22"),
        ("203.0.113.98", None),  # 53 was refused last
        ("2001:DB8:2:0::9", "[2001:db8:2::9]:443"),
        ("10.1.2.3:5432", "10.1.2.3:5432"),
        ("x.bad.example", None),
        ("169.254.169.254:80", None),
    ],
)
def test_why_proposes_the_exact_line(told, target, line):
    said = answer(told, "why", target, code=1)
    assert (said["allowed"], said["proposal"]["line"]) == (False, line)
    assert bool(said["proposal"]["reason"]) is (line is None)


def test_why_is_fit_for_an_agent(told):
    said = text(told, "why", "evil.example", code=1)
    assert said.startswith("evil.example:443/tcp: refused: not listed")
    for part in ("Only a person can change it", "\n    evil.example:443\n", "fwctl reload", "claude"):
        assert part in said
    allowed = text(told, "why", "site.example:443")
    assert "allowed: listed" in allowed
    assert "decided by line 1: site.example" in allowed
    assert "site.example is 203.0.113.7" in allowed


def test_blocked_is_folded(told):
    for _ in range(3):
        attempt_all(told, [("tcp", "203.0.113.97", 443)])
    (one,) = (one for one in answer(told, "blocked")["blocked"] if one["subject"] == "203.0.113.97")
    assert (one["count"], one["what"], one["by"]) == (3, "203.0.113.97:443/tcp", ["claude"])
    assert text(told, "blocked").splitlines()[0].split() == ["WHAT", "COUNT", "LAST", "WHY", "BY"]


def test_since_leaves_out_what_is_older(told):
    for seconds in (1, 10):  # a busy machine may not have asked within a second
        time.sleep(seconds + 0.1)
        begin = time.monotonic()
        attempt_all(told, [("tcp", "203.0.113.96", 443)])
        rows = answer(told, "log", "--since", f"{seconds}s")["rows"]
        if time.monotonic() - begin < seconds:
            break
    assert [one["subject"] for one in rows] == ["203.0.113.96"]
    assert len(answer(told, "log", "--since", "1h")["rows"]) > 5
    assert told.fwctl("log", "--since", "soon").returncode == 64


def test_follow_goes_on(told):
    follower = told.popen([str(product.FWCTL), "log", "-f", "--since", "0s", "--json"])
    try:
        until = time.monotonic() + 30
        while not select.select([follower.stdout], [], [], 0.8)[0]:  # it may not have begun to follow
            assert time.monotonic() < until
            told.exec(["getent", "hosts", "followed.example"])
        row = json.loads(follower.stdout.readline())
    finally:
        follower.terminate()
        follower.communicate()
    assert (row["subject"], row["reason"]) == ("followed.example", "unlisted")


def whole(shown: str) -> bool:
    """Whether every line begins as one of ours does, and none has anything that a terminal acts on."""
    return all(line.startswith("20") and line.isprintable() for line in shown.splitlines())


def test_nothing_a_session_sends_forges_a_line(told):
    told.exec(["python3", "-c", FORGED])
    shown = text(told, "log")
    assert r"a\010new\010\027[2.evil" in shown
    assert whole(shown)


def test_a_line_that_was_forged_would_be_seen(told):
    """Negative control: the same row with its name as it was sent."""
    rows = answer(told, "log")["rows"]
    assert whole(narrative.log({"rows": rows, "lost": 0}, color=False))
    (row,) = (row for row in rows if row["subject"].endswith("[2.evil"))
    assert not whole(narrative.log({"rows": [{**row, "subject": "a\nnew\n\x1b[2.evil"}], "lost": 0}, color=False))


def test_the_list_in_force_is_there_to_read_and_not_to_write(told):
    path = "/run/initd/policy.txt"
    assert dump(parse(told.exec(["cat", path]).stdout)) == dump(parse(POLICY))
    for command in (f"echo evil.example >> {path}", f"rm -f {path}", f"mv {path} /tmp/"):
        assert told.exec(["sh", "-c", command]).returncode != 0
    told.write_policy(POLICY + "more.example:443\n")
    assert "more.example" not in told.read(path), "negative control: the file is not the list in force"
    assert told.fwctl("reload").returncode == 0
    assert "more.example:443" in told.read(path).splitlines()
    told.write_policy(POLICY)
    told.fwctl("reload")


def test_status_counts_the_last_hour_and_names_the_most_frequent(told):
    refusals = told.status()["refusals"]
    rows = answer(told, "log")["rows"]
    assert refusals["hour"] == sum(row["count"] for row in rows) > 5
    counted = Counter()
    for row in rows:
        counted[row["subject"], row["port"]] += row["count"]
    assert refusals["top"][0]["count"] == max(counted.values())
    assert len({(one["subject"], one["port"]) for one in refusals["top"]}) == 3
    assert (len(refusals["top"]), refusals["lost"], refusals["listening"]) == (3, 0, True)
    assert f"in the last hour {refusals['hour']}: {refusals['top'][0]['subject']}" in text(told, "status")


def test_metrics_are_printed_and_written(told):
    printed = text(told, "metrics")
    (queries,) = re.findall(r"^initd_dns_queries_total (\d+)$", printed, re.MULTILINE)
    assert int(queries) >= 4
    names = re.findall(r"^# TYPE (\S+)", printed, re.MULTILINE)
    assert names == re.findall(r"^# TYPE (\S+)", told.read("/run/initd/initd.prom"), re.MULTILINE)


def test_on_a_terminal_it_fits_and_has_colour(told):
    shown = told.exec(["script", "-qc", "stty cols 60; fwctl status; fwctl blocked", "/dev/null"]).stdout
    plain = re.sub(r"\x1b\[\d*m", "", shown)
    assert plain != shown
    assert max(map(len, plain.splitlines())) <= 60
    assert "\x1b" not in text(told, "status") + text(told, "blocked")


def test_suggested_lines_allow_what_was_refused_and_are_put_into_force(told):
    said = answer(told, "suggest", "--write", "/workspace/more.txt")
    lines = [one["line"] for one in said["lines"]]
    assert {"evil.example:443", "site.example:8443", "203.0.113.98:123/udp", "[2001:db8:2::9]:443"} <= set(lines)
    assert not any("bad.example" in line or "169.254" in line for line in lines)
    assert {"x.bad.example", "169.254.169.254"} <= {one["subject"] for one in said["skipped"]}
    assert (told.workspace / "more.txt").read_text().split() == lines
    assert answer(told, "suggest", "--write", "/workspace/more.txt")["written"] == []
    told.write_policy(POLICY + (told.workspace / "more.txt").read_text())
    assert told.fwctl("reload").returncode == 0
    after = answer(told, "suggest")
    assert after["lines"] == []
    assert attempt_all(told, [("tcp", "203.0.113.99", 443)])[0].error is None
    told.write_policy(POLICY)
    told.fwctl("reload")


def test_what_was_refused_outlives_the_warden(told):
    before = {one["subject"]: one["count"] for one in answer(told, "log")["rows"]}
    until = time.monotonic() + 30
    while {row.event.subject: row.count for row in recorder.load(told.state / recorder.FILE)} != before:
        assert time.monotonic() < until, "it is not written down"
        time.sleep(0.1)
    generation = told.status()["generation"]
    os.kill(told.pids()["warden"], signal.SIGKILL)
    while told.status()["generation"] == generation:
        time.sleep(0.1)
    assert {one["subject"]: one["count"] for one in answer(told, "log")["rows"]} == before
    attempt_all(told, [("tcp", "203.0.113.99", 443)])
    after = {one["subject"]: one["count"] for one in answer(told, "log")["rows"]}
    assert after["203.0.113.99"] == before["203.0.113.99"] + 1, "the new warden listens"


def test_no_command_line_is_too_long_to_be_told(told):
    emoji = "\U0001f600" * 200
    told.exec(["bash", "-c", f'exec -a {emoji} python3 -c "$0"', WORDY])
    rows = [row for row in answer(told, "log")["rows"] if row["subject"].startswith("wordy")]
    assert len(rows) == 40
    assert sum(emoji[:100] in (row["actor"]["command"] or "") for row in rows) > 20, "the control: they are long"
    assert any("wordy" in one["line"] for one in answer(told, "suggest")["lines"])
    assert answer(told, "why", "wordy1", code=1)["refusals"]
