"""The probe against real sockets on loopback, and the judgement on its outcomes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from initd import verify

EMPTY: dict = {"timeout": 0.3, "connect": [], "datagram": [], "ask": [], "reach": []}


def run_probe(plan: object) -> subprocess.CompletedProcess:
    code = "import sys; from initd import probe; sys.exit(probe.main())"
    return subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(plan), capture_output=True, text=True, timeout=120, check=False
    )


def outcomes(**plan: list) -> dict:
    done = run_probe({**EMPTY, **plan})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_open_refused_and_silent_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as idle:
        idle.bind(("127.0.0.1", 0))
        port, closed = listener.getsockname()[1], idle.getsockname()[1]
        result = outcomes(
            connect=[["127.0.0.1", port], ["127.0.0.1", closed]], reach=[["localhost", port], ["localhost", closed]]
        )
    assert [one["outcome"] for one in result["connect"]] == ["open", "refused"]
    assert [one["outcome"] for one in result["reach"]] == ["open", "refused"]


def test_silence_is_a_timeout() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        (one,) = outcomes(datagram=[["127.0.0.1", silent.getsockname()[1]]])["datagram"]
    assert one["outcome"] == "timeout"
    assert one["ms"] >= 300


@pytest.mark.parametrize("plan", [[], {}, {**EMPTY, "timeout": "soon"}, {**EMPTY, "connect": 7}])
def test_what_is_not_a_plan_is_64(plan: object) -> None:
    done = run_probe(plan)
    assert done.returncode == 64
    assert "not a plan" in done.stderr


def outcome(word: str, ms: float = 0.5, target: tuple = ("192.0.2.1", 443)) -> dict:
    return {"target": list(target), "outcome": word, "ms": ms}


@pytest.mark.parametrize(
    ("kind", "word", "ms", "ok"),
    [
        ("connect", "refused", 0.4, True),
        ("connect", "unreachable", 0.4, True),
        ("connect", "refused", 1500.0, False),  # far away said no, not our rule
        ("connect", "open", 0.4, False),
        ("connect", "timeout", 2000.0, False),
        ("connect", "ECONNRESET", 1.0, False),
        ("datagram", "refused", 0.4, True),
        ("datagram", "open", 3.0, False),
        ("datagram", "timeout", 2000.0, False),
        ("ask", "nxdomain", 0.4, True),
        ("ask", "noerror", 9.0, False),
        ("ask", "servfail", 9.0, False),
        ("ask", "timeout", 2000.0, False),
    ],
)
def test_only_a_refusal_at_once_counts(kind: str, word: str, ms: float, *, ok: bool) -> None:
    found = verify.judge({"connect": [], "datagram": [], "ask": [], "reach": [], kind: [outcome(word, ms)]})
    assert [check.ok for check in found] == [ok]
    assert bool(verify.failed(found, fatal=True)) is not ok


def test_one_listed_name_that_answers_is_enough() -> None:
    reach = [outcome("timeout", 2000, ("a.example", 443)), outcome("open", 9, ("b.example", 443))]
    (found,) = verify.judge({"connect": [], "datagram": [], "ask": [], "reach": reach})
    assert found.ok
    assert "b.example" in found.name
    (found,) = verify.judge({"connect": [], "datagram": [], "ask": [], "reach": reach[:1]})
    assert not found.ok
    assert not found.fatal
