"""When no resolver answers, names that worked a moment ago go on working, also across a restart of the box."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.support.attempts import attempt
from tests.support.remote import RESOLVER4
from tests.support.zone import Fault

if TYPE_CHECKING:
    from tests.support.box import Box
    from tests.support.lab import Lab

pytestmark = pytest.mark.kernel

POLICY = "known.example\nshort.example\n"
KNOWN, OTHER = "203.0.113.7", "203.0.113.8"


def resolves(box: Box, name: str) -> list[str]:
    return sorted({line.split()[0] for line in box.exec(["getent", "ahostsv4", name]).stdout.splitlines()})


@pytest.fixture
def armed(lab: Lab) -> Box:
    """A box that has resolved what is listed, and DNS that has fallen silent since."""
    lab.dns.set("known.example", {"A": KNOWN}, ttl=300)
    lab.dns.set("short.example", {"A": KNOWN}, ttl=1)
    box = lab.box(policy=POLICY, env={"INITD_RESOLVE_TIMEOUT": "1"})
    box.start()
    assert [resolves(box, name) for name in ("known.example", "short.example")] == [[KNOWN], [KNOWN]]
    return box


def test_an_answer_that_has_expired_is_given_again_while_nobody_answers(lab: Lab, armed: Box) -> None:
    lab.dns.server(RESOLVER4, fault=Fault.SILENT)
    time.sleep(1.5)  # longer than its TTL
    try:
        assert resolves(armed, "short.example") == [KNOWN]
        assert attempt(armed, ("tcp", KNOWN, 443)).error is None
        assert armed.status()["guard"]["stale"] >= 1
    finally:
        lab.dns.server(RESOLVER4)


def test_a_start_without_dns_uses_the_last_run_s_answers(lab: Lab, armed: Box) -> None:
    armed.stop()
    lab.dns.server(RESOLVER4, fault=Fault.SILENT)
    armed.start()
    assert "names.remembered" in {event["event"] for event in armed.logs().events}
    assert resolves(armed, "known.example") == [KNOWN]
    assert attempt(armed, ("tcp", KNOWN, 443)).error is None
    assert attempt(armed, ("tcp", OTHER, 443)).error == "ECONNREFUSED"


def test_without_a_last_run_such_a_start_knows_no_address(lab: Lab, armed: Box) -> None:
    armed.stop()
    (armed.state / "state.toml").unlink()
    lab.dns.server(RESOLVER4, fault=Fault.SILENT)
    armed.start()
    assert resolves(armed, "known.example") == []
    assert attempt(armed, ("tcp", KNOWN, 443)).error == "ECONNREFUSED"


def test_a_name_that_is_gone_is_not_remembered(lab: Lab, armed: Box) -> None:
    armed.stop()
    lab.dns.set("known.example", fault=Fault.NXDOMAIN)
    armed.start()
    assert resolves(armed, "known.example") == []
    assert "names.remembered" not in {event["event"] for event in armed.logs().events}
