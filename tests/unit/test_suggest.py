"""The narrowest line that would allow what was refused, and the cases in which none is proposed."""

from __future__ import annotations

import pytest

from initd.core.events import Actor, Event, Ring
from initd.core.policy import Service, parse
from initd.core.suggest import propose, suggest

LOOKUP = parse("site.example\n!bad.example\n203.0.113.0/24:443\n").lookup()
HTTPS, SSH, NTP = Service("tcp", 443), Service("tcp", 22), Service("udp", 123)


@pytest.mark.parametrize(
    ("host", "services", "line"),
    [
        ("a.example", [HTTPS], "a.example:443"),
        ("a.example", [HTTPS, SSH], "a.example:22,443"),
        ("a.example", [NTP, SSH], "a.example:22\na.example:123/udp"),
        ("site.example", [Service("tcp", 8443), HTTPS], "site.example:8443"),
        ("203.0.113.9", [SSH, HTTPS], "203.0.113.9:22"),
        ("2001:db8::9", [HTTPS], "[2001:db8::9]:443"),
        ("10.0.0.1", [HTTPS], "10.0.0.1:443"),
    ],
)
def test_narrowest_line_and_it_is_one(host, services, line):
    proposal = propose(host, services, LOOKUP)
    assert proposal.line == line
    after = parse(line).lookup()
    if ":" not in host and not host[0].isdigit():
        assert after.decide(host).services <= set(services)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("x.bad.example", "line 2: !bad.example"),
        ("site.example", "listed by now"),
        ("203.0.113.9", "listed by now"),
        ("169.254.169.254", "credentials"),
        ("224.0.0.1", "224.0.0.0/4"),
        ("168.63.129.16", "credentials"),
        ("com", "no line can allow it"),
        ("10.0.0.0/8", "no line can allow it"),
        ("203.0.0.0/8", "no line can allow it"),
        ("*.evil.example", "no line can allow it"),
        ("@github", "no line can allow it"),
        ("!bad.example", "no line can allow it"),
        ("evil.example:1,2", "no line can allow it"),
        ("EVIL.example", "no line can allow it"),
        ("a\\010b", "no line can allow it"),
        ("x; rm -rf", "no line can allow it"),
    ],
)
def test_none(host, reason):
    proposal = propose(host, [HTTPS], LOOKUP)
    assert proposal.line is None
    assert reason in proposal.reason


def rows(*events: Event) -> Ring:
    ring = Ring()
    for event in events:
        ring.add(event, 1.0)
    return ring


def name(subject: str, kind: str = "A", *, allowed: bool = False) -> Event:
    return Event("name", subject, kind, "unlisted", allowed=allowed, actor=Actor(501, "claude"))


def connection(subject: str, port: int | None, proto: str = "tcp", *, allowed: bool = False) -> Event:
    return Event("connection", subject, proto, "unlisted", "203.0.114.1", port, allowed, Actor(501, "claude"))


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ([name("a.example")], "a.example:443"),
        ([name("a.example", allowed=True), connection("a.example", 8443, allowed=True)], "a.example:8443"),
        ([name("a.example", allowed=True)], None),
        ([name("a.example", "TXT")], None),
        ([connection("203.0.114.1", None, "47")], None),
        ([connection("a.example", 80), connection("a.example", 443)], "a.example:80,443"),
    ],
)
def test_what_a_subject_needs(events, line):
    (one,) = suggest(rows(*events), LOOKUP)
    assert (one.proposal.line, one.count, list(one.by)) == (line, len(events), ["claude"])


def test_a_port_that_nobody_came_to_is_a_guess():
    (one,) = suggest(rows(name("a.example")), LOOKUP)
    assert one.proposal.guessed
    (one,) = suggest(rows(name("a.example"), connection("a.example", 443)), LOOKUP)
    assert not one.proposal.guessed
    (one,) = suggest(rows(name("a.example")), parse("a.example:22\n").lookup())
    assert (one.proposal.line, one.proposal.reason) == (None, "it is listed by now")


def test_most_frequent_first():
    ring = rows(name("b.example"), name("a.example"), name("a.example"))
    assert [one.subject for one in suggest(ring, LOOKUP)] == ["a.example", "b.example"]
