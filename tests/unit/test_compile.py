from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from initd.core.compile import Context, Membership, compile_ruleset
from initd.core.policy import Feed, parse
from initd.core.ruleset import Element, Endpoint

SUBNET = ip_network("172.18.0.0/16")


def context(*upstreams: str) -> Context:
    return Context(
        warden_uid=990,
        upstreams=frozenset(Endpoint(ip_address(one)) for one in upstreams),
        subnets=frozenset({SUBNET}),
        feeds={Feed.SUBNET: (SUBNET,), Feed.GITHUB: (ip_network("192.0.2.0/24"),)},
    )


def test_private_and_public_ranges_are_kept_apart() -> None:
    ruleset = compile_ruleset(parse("10.20.0.0/16:443\n203.0.113.0/24:443\n8.0.0.0/8:443\n"), context())
    assert ruleset.private == {Element(ip_network("10.20.0.0/16"), "tcp", 443)}
    assert ruleset.static == {
        Element(ip_network("203.0.113.0/24"), "tcp", 443),
        Element(ip_network("8.0.0.0/8"), "tcp", 443),
    }


def test_names_put_nothing_into_the_static_sets() -> None:
    ruleset = compile_ruleset(parse("github.com\n*.example.org\n"), context())
    assert not ruleset.static
    assert not ruleset.private


def test_feeds_count_only_when_they_are_listed() -> None:
    ruleset = compile_ruleset(parse("@subnet:5432\n"), context())
    assert ruleset.private == {Element(SUBNET, "tcp", 5432)}
    assert not ruleset.static
    assert {one.network for one in compile_ruleset(parse("@github\n"), context()).static} == {
        ip_network("192.0.2.0/24")
    }


def test_the_engines_resolver_opens_port_53_for_root_only_when_it_is_used() -> None:
    assert compile_ruleset(parse(""), context("127.0.0.11")).engine_dns
    assert not compile_ruleset(parse(""), context("203.0.113.53")).engine_dns


NETWORKS = st.builds(
    lambda number, length: ip_network((number >> (32 - length) << (32 - length), length)),
    st.integers(0, 2**32 - 1),
    st.integers(8, 32),
)


@given(st.lists(st.tuples(NETWORKS, st.sampled_from(["tcp", "udp"]), st.integers(1, 3)), max_size=20), st.data())
def test_membership_is_what_a_loop_over_all_elements_says(entries: list, data: st.DataObject) -> None:
    elements = [Element(*one) for one in entries]
    inside = [int(one.network.network_address) for one in elements]
    number = data.draw(st.sampled_from(inside) if inside else st.integers(0, 2**32 - 1))
    address = ip_address(max(0, min(2**32 - 1, number + data.draw(st.integers(-2, 2)))))
    proto, port = data.draw(st.sampled_from(["tcp", "udp"])), data.draw(st.integers(1, 3))
    expected = any((one.proto, one.port) == (proto, port) and address in one.network for one in elements)
    assert Membership(elements).holds(address, proto, port) is expected


def test_membership_tells_families_apart() -> None:
    held = Membership([Element(ip_network("::/0"), "tcp", 443)])
    assert held.holds(ip_address("2001:db8::1"), "tcp", 443)
    assert not held.holds(ip_address("203.0.113.1"), "tcp", 443)
