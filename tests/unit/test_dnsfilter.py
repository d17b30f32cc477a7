"""Which answer for which name, and which address for which answer."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from initd.core import wire
from initd.core.dnsfilter import (
    Fate,
    GuardOptions,
    Judged,
    case_mask,
    escape,
    judge,
    mix_case,
    name_text,
    name_wire,
    screen,
)
from initd.core.policy import DEFAULT_SERVICES, Decision, Verdict, parse
from initd.core.special import special_of

POLICY = """
github.com
*.example.org
!bad.example.org
api.deep.example
registry
db.corp.internal
*.office.lan
"""
LOOKUP = parse(POLICY).lookup()
OPTIONS = GuardOptions(
    local_names={"registry": (ip_address("172.18.0.5"),), "unlisted-host": (ip_address("172.18.0.6"),)},
    own_names={"box": (ip_address("172.18.0.2"),)},
)


def fate(name: bytes | str) -> Judged:
    return judge(name_wire(name) if isinstance(name, str) else name, LOOKUP.decide, OPTIONS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("github.com", Fate.FORWARD),
        ("a.example.org", Fate.FORWARD),
        ("a.b.c.example.org", Fate.FORWARD),
        ("_srv.example.org", Fate.FORWARD),
        ("bad.example.org", Fate.REFUSE),
        ("below.bad.example.org", Fate.REFUSE),
        ("deep.example", Fate.EMPTY),
        ("example", Fate.EMPTY),
        ("com", Fate.EMPTY),
        ("www.github.com", Fate.REFUSE),
        ("payload.github.com.evil.test", Fate.REFUSE),
        ("notgithub.com", Fate.REFUSE),
        ("1.113.0.203.in-addr.arpa", Fate.REFUSE),
        ("registry", Fate.HOSTS),
        ("unlisted-host", Fate.REFUSE),
        ("box", Fate.OWN),
        ("localhost", Fate.OWN),
        ("x.localhost", Fate.OWN),
        (b"\0", Fate.EMPTY),
        (b"\x0agithub.com\0", Fate.REFUSE),  # one label with a dot in it
        (b"\x06github\x04com\0\0", Fate.REFUSE),  # a NUL
        (b"\x01*\x07example\x03org\0", Fate.REFUSE),
        (b"\x02\xc3\xa4\x07example\x03org\0", Fate.REFUSE),
        (b"\x02a \x07example\x03org\0", Fate.REFUSE),
    ],
)
def test_fate(name, expected):
    assert fate(name).fate is expected


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=6))
def test_only_a_name_that_is_exactly_listed_is_ever_forwarded(labels):
    packed = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    judged = judge(packed.lower(), LOOKUP.decide, OPTIONS)
    if judged.fate in (Fate.FORWARD, Fate.HOSTS):
        assert name_wire(judged.name) == packed.lower()
        assert LOOKUP.decide(judged.name).verdict is Verdict.LISTED
    escape(packed)


def test_escape_is_printable_and_unambiguous():
    assert escape(b'\x03a.b\x04\n\x1b"\\\0') == "a\\046b.\\010\\027\\034\\092"


@given(st.from_regex(r"[a-z0-9_-]{1,10}(\.[a-z0-9_-]{1,10}){0,4}", fullmatch=True), st.integers(0, 2**600))
def test_case_is_mixed_and_nothing_else(text, random):
    packed = name_wire(text)
    mixed = mix_case(packed, case_mask(packed), random)
    assert mixed.lower() == packed
    assert mix_case(packed, case_mask(packed), 0) == packed
    assert mix_case(packed, case_mask(packed), (1 << 8 * len(packed)) - 1)[1:] == packed.upper()[1:]
    assert name_text(packed) == text


SPECIAL = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192",
    "192.168.1.1", "198.18.0.1", "224.0.0.1", "255.255.255.255", "::", "::1", "::203.0.113.1", "::ffff:203.0.113.1",
    "64:ff9b::cb00:7101", "64:ff9b:1::1", "2002:cb00:7101::1", "fd00::1", "fd00:ec2::254", "fe80::1", "fec0::1",
    "ff02::1", "168.63.129.16",
]  # fmt: skip
ORDINARY = ["203.0.113.1", "1.1.1.1", "172.32.0.1", "172.15.255.255", "11.0.0.0", "2001:db8::1", "2606:4700::1111"]
PRIVATE = ["10.0.0.1", "100.64.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fd00::1"]


def screened(name, *addresses, options=OPTIONS):
    judged = judge(name_wire(name), LOOKUP.decide, options)
    return screen([ip_address(one).packed for one in addresses], judged, options)


def shown(found):
    passed = {str(ip_address(one)) for one in found.passed}
    return passed, set(map(str, found.learned)), set(map(str, found.stripped))


def test_special_addresses_are_stripped_and_not_learned():
    stripped = {str(ip_address(one)) for one in SPECIAL}
    assert shown(screened("github.com", *SPECIAL, *ORDINARY)) == (set(ORDINARY), set(ORDINARY), stripped)


@pytest.mark.parametrize("name", ["github.com", "a.example.org", "host.office.lan"])
def test_a_name_that_is_public_or_listed_by_wildcard_gets_no_private_address(name):
    assert shown(screened(name, *PRIVATE))[0] == set()


@pytest.mark.parametrize("name", ["db.corp.internal", "registry"])
def test_a_local_name_that_is_listed_literally_gets_private_ones_and_no_other(name):
    passed, learned, _ = shown(screened(name, *SPECIAL, "100.100.100.200"))
    assert learned == set(PRIVATE)
    loopback = {"127.0.0.1", "::1"} if name == "registry" else set()  # /etc/hosts may name it; it is open anyway
    assert passed == set(PRIVATE) | loopback


def test_an_address_in_a_listed_range_passes_and_opens_nothing_more():
    options = GuardOptions(range_listed=lambda address: str(address).startswith("10.0."))
    found = shown(screened("github.com", "10.0.0.1", "10.1.0.1", "203.0.113.1", options=options))
    assert found == ({"10.0.0.1", "203.0.113.1"}, {"203.0.113.1"}, {"10.1.0.1"})


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_the_fast_test_for_special_ranges_agrees_with_the_plain_one(address):
    found = screened("github.com", address)
    assert bool(found.stripped) == (special_of(address) is not None)


LISTED = Judged("site.example", Fate.FORWARD, Decision(Verdict.LISTED, DEFAULT_SERVICES, (), literal=True))
RECORD = st.tuples(
    st.sampled_from(["site.example", "a.example", "b.example", "evil.example"]),
    st.one_of(
        st.tuples(st.just("CNAME"), st.sampled_from(["site.example", "a.example", "b.example", "c.example"])),
        st.tuples(st.just("A"), st.one_of(st.ip_addresses(v=4), st.sampled_from(["10.0.0.1", "203.0.113.1"]))),
    ),
)


@settings(max_examples=400)
@given(st.lists(RECORD, max_size=12))
def test_what_is_learned_is_at_the_end_of_the_chain_and_not_special(records):
    asked = wire.build_query(1, name_wire("site.example"), wire.TYPE_A, edns=False)
    body = b""
    for owner, (kind, value) in records:
        data = name_wire(value) if kind == "CNAME" else ip_address(value).packed
        number = wire.TYPE_CNAME if kind == "CNAME" else wire.TYPE_A
        body += name_wire(owner) + number.to_bytes(2) + b"\0\1\0\0\0\x3c" + len(data).to_bytes(2) + data
    message = asked[:2] + b"\x81\x80\0\1" + len(records).to_bytes(2) + b"\0\0\0\0" + asked[12:] + body
    try:
        answer = wire.scan_answer(message, asked)
    except wire.Malformed:
        return
    reached, end = {"site.example"}, "site.example"
    aliases = dict(reversed([(owner, value) for owner, (kind, value) in records if kind == "CNAME"]))
    hosts = {owner for owner, (kind, _) in records if kind == "A"}
    while end not in hosts and end in aliases and aliases[end] not in reached:
        end = aliases[end]
        reached.add(end)
    allowed = {ip_address(value) for owner, (kind, value) in records if kind == "A" and owner == end}
    found = screen(answer.addresses, LISTED, OPTIONS)
    assert set(found.learned) == {address for address in allowed if special_of(address) is None}
    assert len(found.passed) == len(found.learned)
