from __future__ import annotations

from ipaddress import ip_network

import pytest

from initd.core.membership import Membership
from initd.core.policy import Service, parse
from initd.core.ruleset import Element
from initd.errors import UsageError
from initd.explain import explain, parse_target
from initd.report import test as as_text

LOOKUP = parse(
    "# one\ngithub.com\n*.example.org:443,8443\napi.example.net\n!gist.github.com\n10.20.0.0/16:443\n@pypi\n"
).lookup()
HELD = Membership([Element(ip_network("10.20.0.0/16"), "tcp", 443), Element(ip_network("203.0.113.7/32"), "tcp", 443)])


@pytest.mark.parametrize(
    ("target", "allowed", "reason", "lines"),
    [
        ("github.com", True, "listed", [2]),
        ("GitHub.com.:22", True, "listed", [2]),
        ("github.com:25", False, "listed, but only for 22/tcp, 443/tcp, 80/tcp", [2]),
        ("github.com:443/udp", False, "listed, but only for 22/tcp, 443/tcp, 80/tcp", [2]),
        ("a.example.org:8443", True, "listed", [3]),
        ("example.org", False, "not listed, only names below it are", []),
        ("example.net", False, "not listed, only names below it are", []),
        ("gist.github.com", False, "an exception line says never", [5]),
        ("pypi.org", True, "listed", [7]),
        ("evil.example.com", False, "not listed", []),
        ("10.20.3.4", True, "listed", [6]),
        ("10.20.3.4:80", False, "in the special range 10.0.0.0/8, and not listed", []),
        ("203.0.113.7", True, "an address of a listed name or feed", []),
        ("203.0.113.8", False, "not listed", []),
        ("[2001:db8::1]:443", False, "not listed", []),
        ("localhost:3000", True, "the box itself: loopback is open, and needs no line", []),
        ("127.0.0.1:5432", True, "the box itself: loopback is open, and needs no line", []),
        ("[::1]:8080/udp", True, "the box itself: loopback is open, and needs no line", []),
        ("127.0.0.11:53", False, "in the special range 127.0.0.0/8, and not listed", []),
        ("169.254.169.254:80", False, "in the special range 169.254.0.0/16, and not listed", []),
    ],
)
def test_the_decision_and_the_line_that_decides(target: str, *, allowed: bool, reason: str, lines: list) -> None:
    answer = explain(target, LOOKUP, HELD)
    assert (answer["allowed"], answer["reason"]) == (allowed, reason)
    assert [one["line"] for one in answer["lines"]] == lines
    text = as_text(answer, color=False)
    assert reason in text
    assert ("allowed" in text.splitlines()[0]) is allowed


def test_a_preset_is_named() -> None:
    assert "line 7: @pypi" in as_text(explain("pypi.org", LOOKUP, HELD), color=False)


@pytest.mark.parametrize(
    ("text", "host", "service"),
    [
        ("a.b", "a.b", Service("tcp", 443)),
        ("a.b:53/udp", "a.b", Service("udp", 53)),
        ("B\u00fccher.example", "xn--bcher-kva.example", Service("tcp", 443)),
        ("g\u0456thub.com", "xn--gthub-n2e.com", Service("tcp", 443)),
        ("2001:db8::1", "2001:db8::1", Service("tcp", 443)),
        ("[2001:db8::1]", "2001:db8::1", Service("tcp", 443)),
        ("[2001:db8::1]:22", "2001:db8::1", Service("tcp", 22)),
    ],
)
def test_targets(text: str, host: str, service: Service) -> None:
    assert parse_target(text) == (host, service)


@pytest.mark.parametrize(
    "text",
    ["", ":443", "a.b:", "a.b:x", "a.b:0", "a.b:65536", "a.b:443/icmp", "https://a.b/", "a.b:" + "9" * 5000,
     "a.b:\u0663", "a." * 1000],
)  # fmt: skip
def test_what_is_not_a_target_says_so(text: str) -> None:
    if text == "a.b:":
        assert parse_target(text)[1] == Service("tcp", 443)
        return
    with pytest.raises(UsageError, match="port|HOST"):
        parse_target(text)
