"""What `fwctl doctor` makes of answers, ports and exceptions; tests/kernel/test_explain_doctor.py has real servers."""

from __future__ import annotations

import pytest

from initd import doctor
from initd.core.policy import parse


@pytest.mark.parametrize(
    ("status", "location", "target"),
    [
        ("301", "https://b.example/x", "https://b.example/x"),
        ("302", "/login", "https://a.example:443/login"),
        ("307", "//b.example/", "https://b.example/"),
        ("308", "http://b.example:8080/", "http://b.example:8080/"),
        ("200", "https://b.example/", None),
        ("304", "https://b.example/", None),
        ("302", "ftp://b.example/", None),
        ("302", "javascript:alert(1)", None),
        ("302", "https://b.example:99999/", None),
    ],
)
def test_where_an_answer_leads(status, location, target):
    head = f"HTTP/1.1 {status} Whatever\r\nServer: x\r\nLOCATION:  {location} \r\n\r\n".encode()
    assert doctor._location("https://a.example:443/", head) == target


@pytest.mark.parametrize(
    "head", [b"", b"\xff\xfe", b"HTTP/1.1", b"HTTP/1.1 302 Found\r\n\r\n", b"garbage\r\nlocation\r\n"]
)
def test_an_answer_that_is_none_leads_nowhere(head):
    assert doctor._location("https://a.example/", head) is None


def test_a_hostile_port_is_an_error_that_is_caught():
    with pytest.raises(ValueError):
        doctor._where("https://b.example:99999/")


@pytest.mark.parametrize(
    ("line", "ports"),
    [("a.example", [443]), ("a.example:22", [22]), ("a.example:80,443,22", [443]), ("a.example:53/udp", [])],
)
def test_which_ports_are_tried(line, ports):
    (rule,) = parse(line).names
    assert [one.port for one in doctor._to_try(rule)] == ports


def test_what_has_no_name_of_its_own_is_untried_and_an_exception_wins():
    answer = doctor.examine(parse("*.a.example\n203.0.113.0/24:443\n@host\nb.example\n!b.example\n"), inside=False)
    assert {one["entry"]: one["state"] for one in answer["entries"]} == {
        "*.a.example": "untried",
        "203.0.113.0/24:443": "untried",
        "@host": "untried",
        "b.example": "warning",
    }
    assert (answer["untried"], answer["warning"], answer["failed"]) == (3, 1, 0)


def test_shared_addresses_are_named():
    found = [doctor.Finding(f"{name}.example", 1, addresses=["104.16.0.1"]) for name in "abcde"]
    doctor._compare(found, inside=True)
    assert found[0].notes == [
        "shares an address with b.example, c.example, d.example and 1 more",
        "served by Cloudflare: the same addresses serve other sites",
    ]
    private = doctor.Finding("x.example", 1, addresses=["10.0.0.1"])
    doctor._compare([private], inside=False)
    assert "special range 10.0.0.0/8" in private.notes[0]
    reached = doctor.Finding("x.example", 1, addresses=["10.0.0.1"])
    doctor._compare([reached], inside=True)
    assert reached.notes == []
