from __future__ import annotations

from ipaddress import ip_network

from initd.core.diff import difference
from initd.core.ruleset import Element
from initd.kernel.base import Listing


def element(text: str, port: int = 443) -> Element:
    return Element(ip_network(text), "tcp", port)


RULES = {"ip/INITD-OUTPUT": ("-A one", "-A two", "-A three")}
SETS = {"initd4-static": frozenset({element("203.0.113.0/24"), element("192.0.2.0/24")})}
WHOLE = Listing(RULES, SETS, frozenset({"initd4-learned"}))


def changed(**fields) -> Listing:
    return Listing(**({"rules": RULES, "sets": SETS, "learned": frozenset({"initd4-learned"})} | fields))


def test_equal_is_silent():
    assert difference(WHOLE, changed()) == ()


def test_rules():
    for rules, lines in (
        ({}, ["ip/INITD-OUTPUT: chain missing, or nothing leads to it"]),
        ({"ip/INITD-OUTPUT": ("-A one", "-A three")}, ["ip/INITD-OUTPUT: missing at 2: -A two"]),
        ({"ip/INITD-OUTPUT": ("-A zero", *RULES["ip/INITD-OUTPUT"])}, ["ip/INITD-OUTPUT: unexpected at 1: -A zero"]),
        (
            {"ip/INITD-OUTPUT": ("-A one", "-A three", "-A two")},
            ["ip/INITD-OUTPUT: out of order from rule 2: -A three"],
        ),
        (
            {"ip/INITD-OUTPUT": ("-A one", "-A else", "-A three")},
            ["ip/INITD-OUTPUT: missing at 2: -A two", "ip/INITD-OUTPUT: unexpected at 2: -A else"],
        ),
        (RULES | {"ip/OTHER": ("-A x",)}, ["ip/OTHER: unexpected chain of 1 rules"]),
    ):
        assert list(difference(WHOLE, changed(rules=rules))) == lines


def test_a_rule_twice_is_seen():
    twice = ("-A one", "-A two", "-A two", "-A three")
    assert difference(WHOLE, changed(rules={"ip/INITD-OUTPUT": twice})) == ("ip/INITD-OUTPUT: unexpected at 3: -A two",)


def test_sets_are_counted_and_the_first_few_shown():
    many = frozenset(element(f"198.51.100.{index}/32") for index in range(7))
    absent, extra = difference(WHOLE, changed(sets={"initd4-static": many}))
    assert absent == "set initd4-static: 2 missing: 192.0.2.0/24 tcp/443, 203.0.113.0/24 tcp/443"
    assert extra.startswith("set initd4-static: 7 unexpected: 198.51.100.0/32 tcp/443, 198.51.100.1/32 tcp/443, ")
    assert extra.endswith(", 198.51.100.4/32 tcp/443 and 2 more")
    assert difference(WHOLE, changed(sets={})) == ("set initd4-static: missing",)
    assert difference(changed(sets={}), WHOLE) == ("set initd4-static: unexpected, 2 elements",)


def test_both_families_in_one_set_are_still_put_in_words():
    mixed = SETS["initd4-static"] | {element("2001:db8::/64")}
    (line,) = difference(WHOLE, changed(sets={"initd4-static": mixed}))
    assert line == "set initd4-static: 1 unexpected: 2001:db8::/64 tcp/443"


def test_learned_sets():
    assert difference(WHOLE, changed(learned=frozenset())) == ("set initd4-learned: missing, or not as it must be",)
    assert difference(changed(learned=frozenset()), WHOLE) == ("set initd4-learned: unexpected",)
